r"""Is a predicted answer right? Exact comparison where that is safe, else math-verify in a process that can be killed.

A verdict is one of

* ``correct``, ``wrong``;
* ``unparsed``: no answer was found in the prediction (see `difftune.evaluation.answers` for the rules);
* ``timeout``: the comparison took too long and its process was killed;
* ``killed``: its process died, or reached its memory limit.

All but the first count as not right. Pairs of plain numbers and answers of the same spelling are decided here, as
math-verify would decide them; everything else goes to the worker, many pairs to a message.
"""

import atexit
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO

from difftune.evaluation.answer_forms import (
    are_different_units,
    choice_of,
    clock_time,
    is_words,
    math_form,
    percentage,
    short_form,
    split_unit,
    words_of,
)
from difftune.evaluation.answers import Answer, find_answer, may_hold_maths, normalise, plain_number

VERDICTS = ("correct", "wrong", "unparsed", "timeout", "killed")
# math-verify rounds decimals to six places; nearer than this to one another, it decides.
_SURELY_DIFFERENT = Decimal("0.00001")
# What a double holds for certain: beyond, math-verify's rounding decides.
_EXACT_DIGITS = 15
_START_TIMEOUT_S = 120.0
# The limit of a comparison is processor time, so that no verdict depends on what else the machine does. A process that
# gets none of it, as one that was stopped, has so many times as long by the clock.
_PATIENCE = 30
# Neither a fork nor multiprocessing's spawn: a process with threads and a GPU, a notebook and a script without a
# __main__ guard can all start it. It finds modules where the parent does.
_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[5:]; from difftune.evaluation.grading_worker import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))"
)


@dataclass(frozen=True)
class Grade:
    """What became of one prediction."""

    verdict: str
    """One of `VERDICTS`."""
    answer: str | None
    """The final answer that was found in the prediction."""

    @property
    def correct(self) -> bool:
        """Whether the prediction is right."""
        return self.verdict == "correct"


class Grader:
    r"""Grades predictions; a context manager that owns the process in which math-verify runs.

    The process is started when a pair first needs it (half a second), restarted after it was killed, and reaped on
    `close`, on garbage collection and at exit. Safe to call from any thread, and after a fork.

    Args:
        timeout_s: Processor time for one comparison, in seconds.
        memory_gib: Memory for comparisons, in GiB, on top of the imported libraries.

    Raises:
        ValueError: If a limit is not positive.

    Example:
        >>> with Grader() as grader:
        ...     grader.grade(r"so it is \boxed{1,000}", "1000").verdict
        'correct'
    """

    def __init__(self, *, timeout_s: float = 5.0, memory_gib: float = 1.0) -> None:
        if timeout_s <= 0 or memory_gib <= 0:
            raise ValueError(f"timeout_s ({timeout_s}) and memory_gib ({memory_gib}) of a Grader must be above 0")
        self.counts = dict.fromkeys(VERDICTS, 0)
        self._timeout_s = timeout_s
        self._memory_bytes = int(memory_gib * 2**30)
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def grade(self, prediction: str, gold: str) -> Grade:
        """Grade one prediction; see `grade_all`."""
        return self.grade_all([(prediction, gold)])[0]

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        r"""Grade predictions against gold answers, and count the verdicts in `counts`.

        Args:
            pairs: Predictions (any text) and gold answers (``18``, ``\frac{1}{2}``, ``$x > 3$``, ``yes``; also a
                solution that ends in a box or in ``#### 18``).

        Returns:
            One grade a pair, in order.

        Raises:
            ValueError: If a gold answer is blank.
            RuntimeError: If the worker cannot be started.
        """
        answers: list[str | None] = []
        verdicts: list[str] = []
        open_cases: list[tuple[int, tuple[str, str]]] = []
        for index, (prediction, gold) in enumerate(pairs):
            if not gold.strip():
                raise ValueError(f"the gold answer of pair {index} is blank: nothing can be graded against it")
            answer = find_answer(prediction)
            verdict = _quick_verdict(answer, gold)
            if verdict is None:
                assert answer is not None
                open_cases.append((index, _forms(answer, gold)))
            answers.append(answer.text if answer else None)
            verdicts.append(verdict or "")
        if open_cases:
            with self._lock:
                replies = self._ask([case for _, case in open_cases])
            for (index, _), verdict in zip(open_cases, replies, strict=True):
                verdicts[index] = verdict
        for verdict in verdicts:
            self.counts[verdict] += 1
        return [Grade(verdict, answer) for verdict, answer in zip(verdicts, answers, strict=True)]

    def close(self) -> None:
        """End the worker. The grader can still be used, and would start another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, cases: list[tuple[str, str]]) -> list[str]:
        verdicts: list[str] = []
        while len(verdicts) < len(cases):
            if self._worker is not None and not self._worker.is_usable():
                self.close()
            if self._worker is None:
                self._worker = _Worker(self._memory_bytes, self._timeout_s)
            in_step = False
            try:
                for verdict in self._worker.verdicts(cases[len(verdicts) :]):
                    verdicts.append(verdict)
                in_step = verdicts[-1] not in ("timeout", "killed")
            finally:
                # Also after Ctrl-C: replies still under way would be taken for those to the next request.
                if not in_step:
                    self.close()
        return verdicts


class _Worker:
    """One process of `grading_worker` and the connection to it."""

    def __init__(self, memory_bytes: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._owner = os.getpid()
        self._connection, theirs = Pipe()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        arguments = [str(theirs.fileno()), str(self._owner), str(memory_bytes), str(timeout_s), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, *arguments],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            # The order of sympy's sets must not decide a verdict.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            # Ctrl-C and the signals of a cluster are for the parent to act upon.
            start_new_session=True,
        )
        theirs.close()
        self._reap = weakref.finalize(self, _end, self._process, self._connection, self._owner)
        try:
            started = self._connection.poll(_START_TIMEOUT_S) and self._connection.recv() == "ready"
        except (EOFError, ConnectionError):
            started = False
        if not started:
            self.close()
            self._stderr.seek(0)
            reason = self._stderr.read().decode(errors="replace").strip()[-2000:]
            raise RuntimeError(
                f"the grading process did not start (is math-verify installed?): {reason or 'no message'}"
            )

    def is_usable(self) -> bool:
        """Whether the process is alive and ours, not that of the process we were forked from."""
        return self._owner == os.getpid() and self._process.poll() is None

    def verdicts(self, cases: list[tuple[str, str]]) -> Iterator[str]:
        """Verdicts in the order of the cases. After "timeout" or "killed" come no more, and the worker is of no use."""
        try:
            self._connection.send(cases)
            for _ in cases:
                if not self._connection.poll(_PATIENCE * self._timeout_s):
                    yield "timeout"
                    return
                verdict = self._connection.recv()
                yield verdict
                if verdict == "killed":
                    return
        except (EOFError, ConnectionError):
            # The signal is that of the worker's own alarm.
            yield "timeout" if self._process.wait() == -signal.SIGPROF else "killed"

    def close(self) -> None:
        """Kill the process and wait for it."""
        self._reap()


def _end(process: "subprocess.Popen[bytes]", connection: Connection, owner: int) -> None:
    connection.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()


def _quick_verdict(answer: Answer | None, gold: str) -> str | None:
    """The verdict where it needs no mathematics; None for the worker to decide."""
    if answer is None:
        return "unparsed"
    right = normalise(_own_answer(gold))
    given = _said(answer, right)
    if _spelling(right) in (_spelling(given), _spelling(normalise(answer.text))):
        return "correct"
    letter, wanted = choice_of(given), choice_of(right)
    if letter and wanted:
        return "correct" if letter.letter == wanted.letter else "wrong"
    times = clock_time(given), clock_time(right)
    if all(times):
        return "correct" if times[0] == times[1] else "wrong"
    if (verdict := _compare_percentages(given, right)) is not None:
        return verdict
    said, meant = words_of(given), words_of(right)
    if said is not None and said == meant:
        return "correct"
    if answer.rule in ("whole", "tail") and not may_hold_maths(answer.text) and not is_words(right):
        # Babble, which math-verify would read as a product of one-letter variables, unless it is short.
        return "unparsed" if answer.rule == "tail" or is_words(answer.text) else None
    if are_different_units(split_unit(given)[1], split_unit(right)[1]):
        return "wrong"
    return None


def _said(answer: Answer, right: str) -> str:
    """What a prediction says, in one spelling; of a choice with its text, the text where that is what is asked for."""
    if answer.rule == "tail":
        return answer.text
    given = normalise(answer.text)
    if given != right:
        given = short_form(given)
    letter = choice_of(given)
    if letter and letter.rest and choice_of(right) is None:
        return normalise(letter.rest)
    return given


def _spelling(answer: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)


def _compare_percentages(given: str, right: str) -> str | None:
    """Verdict on two numbers of which any may be in percent: 28% is as good as 28 and 0.28, as math-verify has it."""
    parts = percentage(given), percentage(right)
    if (parts[0] is None) == (parts[1] is None):
        return _compare_numbers(parts[0] or given, parts[1] or right)
    share, other = (parts[0], right) if parts[0] is not None else (parts[1], given)
    left, value = plain_number(share or ""), plain_number(other)
    if left is None or value is None:
        return None
    verdicts = {_compare_numbers(f"{left:f}", f"{number:f}") for number in (value, value * 100)}
    return "correct" if "correct" in verdicts else None if None in verdicts else "wrong"


def _compare_numbers(given: str, right: str) -> str | None:
    """Verdict on two plain numbers, None where one is something else or where rounding decides."""
    left, other = plain_number(given), plain_number(right)
    if left is None or other is None:
        return None
    if left.as_tuple().exponent == 0 and other.as_tuple().exponent == 0:
        return "correct" if left == other else "wrong"
    if max(len(left.as_tuple().digits), len(other.as_tuple().digits)) > _EXACT_DIGITS:
        return None
    if left == other:
        return "correct"
    return "wrong" if abs(left - other) >= _SURELY_DIFFERENT else None


def _own_answer(gold: str) -> str:
    """The answer of a gold text, which may be a solution that ends in ``####``."""
    return gold.rsplit("####", 1)[1] if "####" in gold and gold.rsplit("####", 1)[1].strip() else gold


def _forms(answer: Answer, gold: str) -> tuple[str, str]:
    """Prediction and gold answer as math-verify shall read them."""
    right = normalise(_own_answer(gold))
    return math_form(_said(answer, right), answer.rule), _gold_form(gold)


def _gold_form(gold: str) -> str:
    """A gold answer as math-verify shall read it; one with boxes of its own is taken as it stands."""
    return gold if "\\boxed" in gold else math_form(normalise(_own_answer(gold)), "boxed")


_shared: Grader | None = None
_shared_lock = threading.Lock()


def grade(prediction: str, gold: str) -> bool:
    r"""Whether a prediction is right; every call of a process shares one worker, which ends with it.

    Args:
        prediction: Any text; the final answer is found by the rules of `difftune.evaluation.answers`.
        gold: The right answer.

    Raises:
        ValueError: If `gold` is blank.

    Example:
        >>> grade(r"The half is \boxed{0.5}.", "1/2")
        True
    """
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Grader()
            atexit.register(_shared.close)
    return _shared.grade(prediction, gold).correct
