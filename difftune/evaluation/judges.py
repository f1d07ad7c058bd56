"""Who says whether a text is free of hallucination: a judge behind an endpoint, or a count of words.

A third one, a local classifier, is in `difftune.evaluation.entailment`.

Source:
    Chuang et al., "Lookback Lens" (2024), whose protocol the paper follows, asks GPT-4o: given document, reference and
    proposal, is everything in the proposal inferable from the document? The questions here are written anew in that
    form; so is the reading of the answer: what stands between "Conclusion: " and the next "**".
"""

import hashlib
import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from difftune.evaluation.answer_cache import AnswerCache

log = logging.getLogger(__name__)

VERDICTS = ("true", "false", "unparsed")
"""Free of hallucination; not; the judge's answer said neither, which counts as not."""

_SYSTEM = "You are a helpful assistant."
_SUMMARY = """\
Below are a document, a reference summary of it, and a proposed summary. Decide whether all that the proposed summary \
says can be inferred from the document itself. Anything that the document does not support makes the proposal false, \
even where it happens to be so. It may be worded quite differently from the reference and still be true. Give your \
reasons first.

#Document#: {document}

#Ground Truth Summary#: {gold}

#Proposed Summary#: {text}

"""
_ANSWER = """\
Below are a document, a question about it, a list of answers that are valid, and a proposed answer. Decide whether the \
proposed answer is right and can be inferred from the document itself. Anything that the document does not support \
makes the proposal false. It may be worded quite differently from the valid answers and still be true. Give your \
reasons first.

#Document#: {document}

#Question#: {question}

#Ground Truth Answers (a list of valid answers)#: {gold}

#Proposed Answer#: {text}

"""
_RULE = """\
Then end with the line **Conclusion: True** if the proposal is true, else with **Conclusion: False** and a line \
**Problematic Spans: [...]** that lists, word for word, what is not supported."""

_RETRIABLE = {408, 409, 425, 429}
_WORD = re.compile(r"\w[\w'.,]*\w|\w")
# Words that are in every text, and so support nothing.
_COMMON_WORDS = """
a about after all also an and any are as at be because been before but by can could did do does for from had has have he
her him his how i if in into is it its may more most no not of on one or other our out over s she so some such than that
the their them then there these they this those to up was we were what when which while who will with would you
"""
_COMMON = frozenset(_COMMON_WORDS.split())


@dataclass(frozen=True)
class Claim:
    """What is judged."""

    document: str
    """What everything must be inferable from."""
    question: str | None
    """Of the document; None: a summary was asked for."""
    gold: Sequence[str]
    """The reference summary, or the valid answers."""
    text: str
    """What the model wrote."""


@dataclass(frozen=True)
class Judgement:
    """What a judge says."""

    verdict: str
    """One of `VERDICTS`."""
    reason: str
    """The judge's own words, or numbers."""


class Judge(Protocol):
    """Anybody who judges."""

    @property
    def name(self) -> str:
        """For tables and samples."""

    def judge(self, claim: Claim, is_over: Callable[[], bool]) -> Judgement:
        """A judgement; `is_over` is asked while waiting, and ends it by `JudgeUnavailableError`.

        Raises:
            JudgeUnavailableError: If it cannot be reached now.
            JudgeSilentError: If it was reached and does not answer this question.
        """


class JudgeUnavailableError(Exception):
    """The judge cannot be reached now; the same question may be asked later."""


class JudgeSilentError(Exception):
    """The judge was reached and gave no answer to this question; it may answer others, and this one another time."""


def parse_conclusion(answer: str) -> str:
    """The verdict in a judge's answer.

    Example:
        >>> parse_conclusion("It is all there. **Conclusion: True**"), parse_conclusion("I cannot say.")
        ('true', 'unparsed')
    """
    _, found, rest = answer.rpartition("Conclusion: ")
    verdict = rest.partition("**")[0].strip().lower() if found else ""
    return next((known for known in ("true", "false") if verdict.startswith(known)), "unparsed")


@dataclass
class EndpointJudge:
    """A model behind an endpoint that speaks OpenAI's chat completions.

    Every answer is kept on disk before it is used: what was asked once is not paid for twice.
    """

    url: str
    """Up to and with the version, such as http://localhost:8000/v1."""
    model: str
    """Name of the model there."""
    api_key: str | None = None
    """Sent as a bearer token."""
    cache: Path | None = None
    """File of the answers so far, a JSON object a line. None: nothing is kept."""
    retries: int = 5
    """Attempts after the first."""
    wait_s: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""
    timeout_s: float = 120.0
    """Seconds that an attempt may take."""

    def __post_init__(self) -> None:
        self._answers = AnswerCache(self.cache)

    @property
    def name(self) -> str:
        """The model."""
        return self.model

    def judge(self, claim: Claim, is_over: Callable[[], bool]) -> Judgement:
        """Ask, or find the answer of an earlier time.

        Raises:
            JudgeUnavailableError: If no attempt reached it, or the time was over.
            JudgeSilentError: If it answered with no text, or with a refusal; that is not kept.
            ValueError: If it refused the request, as with a wrong key or model.
        """
        request = self._request(claim)
        key = hashlib.sha256(json.dumps([self.url, request], sort_keys=True).encode()).hexdigest()
        answer = self._answers.get(key)
        if answer is None:
            answer = self._ask(request, is_over)
            self._answers.keep(key, answer)
        return Judgement(parse_conclusion(answer), answer)

    def _request(self, claim: Claim) -> dict[str, Any]:
        form = _SUMMARY if claim.question is None else _ANSWER
        gold = claim.gold[0] if claim.question is None else json.dumps(list(claim.gold), ensure_ascii=False)
        values = {"document": claim.document, "question": claim.question, "gold": gold, "text": claim.text}
        content = form.format(**values) + _RULE
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "temperature": 0}

    def _ask(self, request: dict[str, Any], is_over: Callable[[], bool]) -> str:
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                log.info("judge %s: %s; attempt %d of %d", self.url, problem, attempt + 1, self.retries + 1)
                _sleep(self.wait_s * 2 ** (attempt - 1), is_over)
            if is_over():
                raise JudgeUnavailableError("the time was over")
            try:
                return self._post(request)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code < 500 and error.code not in _RETRIABLE:
                    raise ValueError(
                        f"the judge at {self.url} refuses the request ({problem}): check url, judge_model and the key"
                    ) from error
            except (OSError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise JudgeUnavailableError(f"{self.url} did not answer in {self.retries + 1} attempts ({problem})")

    def _post(self, request: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        asked = urllib.request.Request(address, json.dumps(request).encode(), headers)
        with urllib.request.urlopen(asked, timeout=self.timeout_s) as response:
            return _text_of(json.load(response))


def _text_of(body: Any) -> str:
    """The text of a chat completion; JudgeSilentError where it has none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    shown = json.dumps(body, ensure_ascii=False)[:300]
    if not isinstance(choices, list) or not choices:
        raise JudgeSilentError(f"no choices in {shown}")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    said = message if isinstance(message, dict) else {}
    if said.get("refusal"):
        raise JudgeSilentError(f"refused: {said['refusal']}")
    content = said.get("content")
    if not isinstance(content, str) or not content.strip():
        raise JudgeSilentError(f"no text in {shown}")
    return content


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


def _sleep(seconds: float, is_over: Callable[[], bool]) -> None:
    """Wait, but no longer than the caller wants."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_over():
        time.sleep(min(0.2, max(0.0, end - time.monotonic())))
