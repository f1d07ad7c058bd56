"""No judge at all, but a count of the words of a text that stand in its document: offline, for following a model."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from difftune.evaluation.judges import Claim, Judgement

_WORD = re.compile(r"\w[\w'.,]*\w|\w")
# Words that are in every text, and so support nothing.
_COMMON_WORDS = """
a about after all also an and any are as at be because been before but by can could did do does for from had has have he
her him his how i if in into is it its may more most no not of on one or other our out over s she so some such than that
the their them then there these they this those to up was we were what when which while who will with would you
"""
_COMMON = frozenset(_COMMON_WORDS.split())


@dataclass
class SpanSupportJudge:
    """No judge at all, but a count that needs no network: are the words of the text in the document?

    A text is called true if at least a share `threshold` of its words, common ones aside, occur in the document or the
    question, all of its numbers among them; an answer must hold a valid answer besides. It cannot see a wrong relation
    between right words, nor forgive a paraphrase: good for following a model while it trains, not for a comparison with
    figures of a real judge, such as the paper's.
    """

    threshold: float = 0.8
    """Share of words that must be supported, in 0..1."""

    name = "span support (offline, no judge)"
    at_once = 1

    def judge(self, claim: Claim, is_over: Callable[[], bool] = lambda: False) -> Judgement:
        """Count."""
        source = set(words(f"{claim.document} {claim.question or ''}"))
        told = [word for word in words(claim.text) if word not in _COMMON]
        missing = [word for word in told if word not in source]
        support = 1 - len(missing) / len(told) if told else 0.0
        numbers = [word for word in missing if any(character.isdigit() for character in word)]
        right = claim.question is None or any(contains(claim.text, gold) for gold in claim.gold)
        verdict = bool(told) and support >= self.threshold and not numbers and right
        reason = f"{support:.2f} of {len(told)} words supported; not: {', '.join(dict.fromkeys(missing)) or 'none'}"
        return Judgement("true" if verdict else "false", reason + ("" if right else "; no valid answer"))


def words(text: str) -> list[str]:
    """Words in lower case, numbers without separators.

    Example:
        >>> words("In 1,204 BC, Troy's walls fell.")
        ['in', '1204', 'bc', "troy's", 'walls', 'fell']
    """
    found = [word.lower().strip(".,'") for word in _WORD.findall(text)]
    return [word.replace(",", "") if word[:1].isdigit() else word for word in found if word]


def contains(text: str, gold: str) -> bool:
    """Whether the words of an answer stand together in a text.

    Example:
        >>> contains("It was in the year 1,204.", "1204"), contains("Trojan", "Troy")
        (True, False)
    """
    inside, wanted = words(text), words(gold)
    starts = range(len(inside) - len(wanted) + 1)
    return bool(wanted) and any(inside[start : start + len(wanted)] == wanted for start in starts)
