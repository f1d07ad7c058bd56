"""Who says whether a text is free of hallucination: what a judge is, and one behind an endpoint of OpenAI's kind.

Two more need no network: a local classifier in `difftune.evaluation.entailment`, a count of words in
`difftune.evaluation.span_support`.

Source:
    Chuang et al., "Lookback Lens" (2024), whose protocol the paper follows, asks GPT-4o: given document, reference and
    proposal, is everything in the proposal inferable from the document? The questions here are written anew in that
    form; so is the reading of the answer: what stands between "Conclusion: " and the next "**".
"""

import hashlib
import http.client
import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from difftune.evaluation.answer_cache import AnswerCache

log = logging.getLogger(__name__)

VERDICTS = ("true", "false", "unparsed")
"""Free of hallucination; not; the judge's answer said neither, which counts as not."""

MAX_BODY_BYTES = 8 * 2**20
"""A longer answer is none: a chat completion has some kilobytes."""

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

    at_once: int
    """Questions that may be asked together, from as many threads."""

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

    url: str = field(repr=False)
    """Up to and with the version, such as http://localhost:8000/v1."""
    model: str
    """Name of the model there."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token, to this host alone; it stands in no message and no answer that is kept."""
    cache: Path | None = None
    """File of the answers so far, a JSON object a line. None: nothing is kept."""
    retries: int = 5
    """Attempts after the first."""
    wait_s: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""
    timeout_s: float = 120.0
    """Seconds that an attempt may take, from its first byte to its last."""
    at_once: int = 8
    """Questions that are asked together."""

    def __post_init__(self) -> None:
        self.api_key = (self.api_key or "").strip() or None
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("the key of the judge has characters that no HTTP header can carry: set it anew")
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
        shown, problem = self._hide(_shown(self.url)), ""
        for attempt in range(self.retries + 1):
            if attempt:
                log.info("judge %s: %s; attempt %d of %d", shown, problem, attempt + 1, self.retries + 1)
                _sleep(self.wait_s * 2 ** (attempt - 1), is_over)
            if is_over():
                raise JudgeUnavailableError("the time was over")
            try:
                body = _within(self.timeout_s, is_over, lambda: self._post(request))
                return self._hide(_text_of(body, self._hide))
            except urllib.error.HTTPError as error:
                problem = _what(error, self._hide)
                if error.code < 500 and error.code not in _RETRIABLE:
                    raise ValueError(
                        f"the judge at {shown} refuses the request ({problem}): check url, judge_model and the key"
                    ) from None
            # What is no HTTP, no JSON, too deep or too long a body, and what is no address at all.
            except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
                problem = self._hide(f"{type(error).__name__}: {error}")
        raise JudgeUnavailableError(f"{shown} did not answer in {self.retries + 1} attempts ({problem})")

    def _post(self, request: dict[str, Any]) -> Any:
        """The body of the answer, read as JSON."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        asked = urllib.request.Request(address, json.dumps(request).encode(), headers)
        with urllib.request.build_opener(_NoRedirect).open(asked, timeout=self.timeout_s) as response:
            body = response.read(MAX_BODY_BYTES + 1)
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"the answer has more than {MAX_BODY_BYTES:,} bytes")
        return json.loads(body)

    def _hide(self, text: str) -> str:
        """A text without the key, which some endpoints repeat."""
        return text.replace(self.api_key, "***") if self.api_key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key along, to whatever host it is pointed to."""

    def redirect_request(self, *unused: Any, **options: Any) -> None:
        return None


def _within(seconds: float, is_over: Callable[[], bool], ask: Callable[[], Any]) -> Any:
    """What a call gives, if it ends in time: a socket's own timeout begins anew with every byte.

    Raises:
        TimeoutError: If it does not. Its thread ends with the connection, or with the process.
        JudgeUnavailableError: If the caller's time is over before.
    """
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((ask(), None))
        except BaseException as error:  # raised again below
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value, error = done.get(timeout=min(0.2, seconds))
        except queue.Empty:
            if is_over():
                raise JudgeUnavailableError("the time was over") from None
            continue
        if error is not None:
            raise error
        return value
    raise TimeoutError(f"no whole answer in {seconds:g} s")


def _what(error: urllib.error.HTTPError, hide: Callable[[str], str]) -> str:
    """What an endpoint says besides its code, as far as that can be read."""
    if 300 <= error.code < 400:
        target = _shown(error.headers.get("Location") or "nowhere")
        return f"HTTP {error.code}: it points to {target}, and redirects are not followed: give that address"
    try:
        said = hide(error.read(4096).decode(errors="replace"))[:300]
    except (OSError, http.client.HTTPException):
        said = "its message could not be read"
    return f"HTTP {error.code}: {said}"


def _shown(url: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "an address that cannot be read"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _text_of(body: Any, hide: Callable[[str], str]) -> str:
    """The text of a chat completion; JudgeSilentError where it has none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    # Hidden before it is cut: half a key is secret too.
    shown = hide(json.dumps(body, ensure_ascii=False))[:300]
    if not isinstance(choices, list) or not choices:
        raise JudgeSilentError(f"no choices in {shown}")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    said = message if isinstance(message, dict) else {}
    if said.get("refusal"):
        raise JudgeSilentError(f"refused: {hide(str(said['refusal']))}")
    content = said.get("content")
    if not isinstance(content, str) or not content.strip():
        raise JudgeSilentError(f"no text in {shown}")
    return content


def _sleep(seconds: float, is_over: Callable[[], bool]) -> None:
    """Wait, but no longer than the caller wants."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_over():
        time.sleep(min(0.2, max(0.0, end - time.monotonic())))
