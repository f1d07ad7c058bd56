"""The process in which math-verify runs: it may hang or swallow memory, so it is one that can be killed.

Imports nothing of difftune and no torch: it starts in half a second, and its memory limit is its own.
"""

import logging
import os
import re
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_POLL_S = 2.0
_DOTS = re.compile(r"\\[lc]?dots[bcmo]?(?![A-Za-z])|\.{3}")
_BOX = re.compile(r"^\\boxed\s*\{(.*)\}$", re.DOTALL)
# Digits to which exact values are compared, and what they may differ in, as a share of the larger.
_DIGITS = 60
_EXACT = 1e-40
# math-verify rounds decimals to six places, which says nothing of values as small as that.
_SMALL = 1e-5
_ROUNDED = 1e-3


def main(fd: int, parent: int, memory_bytes: int, timeout_s: float) -> None:
    """Serve requests until the parent closes the connection, or is gone.

    A request is a list of pairs (prediction, gold); for each pair one verdict is sent back as soon as it is known.

    Args:
        fd: Descriptor of the connection to the parent.
        parent: Process id of the parent.
        memory_bytes: Address space that comparisons may take on top of the imported libraries.
        timeout_s: Processor time for one pair; SIGPROF ends the process that takes longer.
    """
    connection = Connection(fd)
    # Its own time limits are signals, which the parent's clock replaces; it would warn about that.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    verdict_of(r"\boxed{1}", r"\boxed{1}")  # imports, and compiles the expressions, before the limit is set
    limit = _address_space("VmSize") + memory_bytes
    _set_limit(resource.RLIMIT_AS, limit)
    # Its default, which ends the process also in the middle of compiled code.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    connection.send("ready")
    while True:
        # A child forked by the parent may hold the other end open: ask who the parent is, besides waiting for the end.
        while not connection.poll(_POLL_S):
            if os.getppid() != parent:
                return
        try:
            pairs = connection.recv()
        except EOFError:
            return
        for prediction, gold in pairs:
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            verdict = verdict_of(prediction, gold)
            signal.setitimer(signal.ITIMER_PROF, 0)
            # sympy and math-verify swallow a MemoryError, so look whether the limit was all but reached.
            if _address_space("VmPeak") > limit - memory_bytes // 8:
                connection.send("killed")
                return
            connection.send(verdict)


def verdict_of(prediction: str, gold: str) -> str:
    """math-verify's verdict on a pair: "correct", "wrong", or "unparsed" if it finds nothing in the prediction.

    Args:
        prediction: A text with the answer to be judged, usually one box.
        gold: A text with the right answer.
    """
    if _DOTS.search(prediction) or _DOTS.search(gold):
        return _verdict_of_listing(prediction, gold)
    return _verdict_of_value(prediction, gold)


def _verdict_of_value(prediction: str, gold: str) -> str:
    from math_verify import parse, verify

    answers = parse(prediction, parsing_timeout=None)
    if not answers:
        return "unparsed"
    wanted = parse(gold, parsing_timeout=None)
    # The order matters to math-verify: the form of the gold answer decides what is compared.
    right = verify(wanted, answers, timeout_seconds=None, allow_set_relation_comp=True)
    if not right or not wanted or _differ(wanted[0], answers[0]):
        return "wrong"
    return "correct"


def _verdict_of_listing(prediction: str, gold: str) -> str:
    r"""Verdict on answers with ``\ldots``, of which math-verify would read the first item alone: item by item."""
    given, wanted = _items(prediction), _items(gold)
    if len(given) != len(wanted):
        return "wrong"
    for left, right in zip(given, wanted, strict=True):
        if left == right:
            continue
        if _DOTS.search(left) or _DOTS.search(right):
            return "wrong"
        if _verdict_of_value(rf"\boxed{{{left}}}", rf"\boxed{{{right}}}") != "correct":
            return "wrong"
    return "correct"


def _items(form: str) -> list[str]:
    r"""The items of a listing in a box, without spaces, dots as ``\ldots``."""
    inside = _BOX.sub(r"\1", form.strip())
    inside = re.sub(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}", ",", _DOTS.sub(r"\\ldots ", inside))
    items, depth = [""], 0
    for character in inside:
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth <= 0:
            items.append("")
        elif not character.isspace():
            items[-1] += character
    return [item for item in (re.sub(r"^\\[,;: ]|\\[,;: ]$", "", item) for item in items) if item]


def _differ(left: Any, right: Any) -> bool:
    """Whether two expressions surely differ, though math-verify, which cuts small differences off, says equal."""
    from sympy import Expr, FiniteSet, Float, Interval, Rational, Tuple, UnevaluatedExpr, Union  # type: ignore[import-untyped]

    if isinstance(left, (FiniteSet, Tuple, Union)) and isinstance(right, (FiniteSet, Tuple, Union)):
        return any(all(_differ(one, other) for other in right.args) for one in left.args)
    if isinstance(left, Interval) and isinstance(right, Interval):
        return _differ(left.start, right.start) or _differ(left.end, right.end)
    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return False
    if left.has(UnevaluatedExpr) or right.has(UnevaluatedExpr) or left.free_symbols != right.free_symbols:
        return False  # 50% may be 50, and y = 2x is 2x
    rounded = left.has(Float) or right.has(Float)
    place = {symbol: Rational(17 + 2 * number, 13) for number, symbol in enumerate(sorted(left.free_symbols, key=str))}
    try:
        one, other = (side.subs(place).evalf(_DIGITS) for side in (left, right))
        if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
            return False
        size = max(abs(one), abs(other))
        if size == 0 or (rounded and size > _SMALL):
            return False
        return bool(abs(one - other) > size * (_ROUNDED if rounded else _EXACT))
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError):
        return False


def _set_limit(kind: int, value: int) -> None:
    """Lower the soft limit, below a hard limit that may exist already."""
    hard = resource.getrlimit(kind)[1]
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))


def _address_space(field: str) -> int:
    """A figure of /proc/self/status in bytes; 0 where there is none (macOS, which enforces no such limit either)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))
