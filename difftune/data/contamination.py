"""Problems of test sets in training rows, found by runs of words that both have."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

RUN_WORDS = 13
"""Words in a row that a training question shares with a problem, or all of a shorter problem. Source: Brown et al.,
arXiv:2005.14165, appendix C."""
_SHORTEST = 5


class ProblemIndex:
    """An index of the problems of some test sets.

    Words are letters and digits in lower case, so layout, punctuation and LaTeX braces make no difference. Problems of
    fewer than 5 words ("Compute 3 + 4.") are left out: they turn up by chance, and are counted.

    Args:
        problems: The questions of each set, by its name.
    """

    def __init__(self, problems: Mapping[str, Iterable[str]]) -> None:
        self.too_short: Counter[str] = Counter()
        """Problems that were left out, by set."""
        self._sets: dict[int, set[str]] = {}
        self._lengths: set[int] = set()
        self._beginnings: set[int] = set()
        for name, questions in problems.items():
            for question in questions:
                words = _words(question)
                if len(words) < _SHORTEST:
                    self.too_short[name] += 1
                    continue
                length = min(len(words), RUN_WORDS)
                self._lengths.add(length)
                for run in _runs(words, length):
                    self._sets.setdefault(run, set()).add(name)
                self._beginnings.update(_runs(words, _SHORTEST))

    def found_in(self, text: str) -> set[str]:
        """The sets of which a problem is in a text."""
        if not self._sets:
            return set()
        words = _words(text)
        found: set[str] = set()
        # All runs begin with a short one of some problem, which few places of a text do: the rest is passed over.
        for place, run in enumerate(_runs(words, _SHORTEST)):
            if run in self._beginnings:
                for length in self._lengths:
                    for whole in _runs(words[place : place + length], length):
                        found |= self._sets.get(whole, set())
        return found


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _runs(words: list[str], length: int) -> Iterable[int]:
    # The length is part of it: a short problem is found whole, not as a part of a longer one's run.
    return (hash((length, *words[start : start + length])) for start in range(len(words) - length + 1))
