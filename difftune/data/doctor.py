"""The trace doctor: what a source teaches, and what is wrong with it, seen from its rows before any training.

Looks at rows as text. A fault is an *error* where training would learn the wrong thing and look healthy: another
column than the reasoning trace, answers that the data themselves call wrong, traces that never end, delimiters of
several kinds. It is a *warning* where the result would be worse, or measured wrongly: duplicates, problems of the test
sets.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from difftune.data.bad_rows import read_row
from difftune.data.contamination import ProblemIndex
from difftune.data.formats import FORMATS, Dropped, Example, resolve_format
from difftune.data.rows import Row
from difftune.data.sources import Source, read_rows
from difftune.data.tokenized import question_key

QUICK_ROWS = 2000
"""Rows of each source that are looked at before a run."""

WORTH_REFUSING = 0.01
"""Share of rows from which on a fault of single rows is one of the source."""

# Each: the mark that opens a trace and the one that closes it.
_DELIMITERS = {"<think>": "</think>", "<|begin_of_thought|>": "<|end_of_thought|>"}
_NO_OPENING = "</think> without <think>"
_NONE = "no trace"


@dataclass(frozen=True)
class Finding:
    """One fault of a source."""

    kind: str
    """Its name, such as `wrong_column`."""
    is_error: bool
    text: str
    """What it is, how many rows have it, and what to do."""


@dataclass
class SourceReport:
    """What was seen in the rows of a source."""

    source: str
    format: str
    why: str
    """By what the format was chosen."""
    learns: str
    """What of a row is learned."""
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)
    """Of each reason for which bad rows are dropped, the first row and what is wrong with it."""
    delimiters: Counter[str] = field(default_factory=Counter)
    """Learned answers by the delimiters of their trace."""
    trace_elsewhere: Counter[str] = field(default_factory=Counter)
    """Rows whose learned answer has no trace, by the column that has one."""
    known_wrong: int = 0
    unfinished: int = 0
    duplicates: int = 0
    same_question: int = 0
    """Rows that ask what an earlier one asked, answered otherwise."""
    contaminated: Counter[str] = field(default_factory=Counter)
    """Rows by the test set of which they hold a problem."""
    example: str = ""
    """The beginning and end of the first learned answer."""

    def findings(self) -> list[Finding]:
        """The faults, errors first."""
        found = [*self._errors(), *self._warnings()]
        return sorted(found, key=lambda finding: not finding.is_error)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        seen = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}
        return {**seen, "findings": [vars(finding) for finding in self.findings()]}

    def text(self) -> str:
        """What was seen, for people."""
        lines = [
            f"{self.source}: {self.rows:,} rows, {self.kept:,} learned",
            f"  format      {self.format} ({self.why})",
            f"  learned     {self.learns}",
            f"  such as     {self.example}",
            *[f"  dropped     {count:,} {reason}" for reason, count in self.dropped.most_common()],
            *[f"  first       {reason}: {text}" for reason, text in self.first_bad.items()],
            *[f"  delimiters  {count:,} {form}" for form, count in self.delimiters.most_common()],
            *[f"  {'ERROR' if f.is_error else 'warning':<11} {f.text}" for f in self.findings()],
        ]
        return "\n".join(lines)

    def _errors(self) -> Iterable[Finding]:
        elsewhere = sum(self.trace_elsewhere.values())
        if elsewhere > WORTH_REFUSING * self.kept:
            columns = ", ".join(sorted(self.trace_elsewhere))
            yield Finding(
                "wrong_column",
                True,
                f"{elsewhere:,} of {self.kept:,} learned answers have no reasoning trace, while the row has one "
                f"({columns}): this learns the reference solution, not the trace; set format=openthoughts for the "
                "conversations of OpenThoughts, or leave format out",
            )
        if self.known_wrong:
            yield Finding(
                "known_wrong",
                True,
                f"{self.known_wrong:,} learned answers are not verified as correct by their own column `correct`; set "
                "format=openthoughts, which drops them",
            )
        kinds = [form for form in self.delimiters if form != _NONE]
        if len(kinds) > 1:
            yield Finding(
                "mixed_delimiters",
                True,
                f"traces are delimited in {len(kinds)} ways ({', '.join(kinds)}): a model would learn all of them; set "
                "format=openthoughts, which brings them to one, or mend the rows",
            )
        if self.unfinished > WORTH_REFUSING * self.kept:
            yield self._unfinished(is_error=True)

    def _warnings(self) -> Iterable[Finding]:
        if 0 < self.unfinished <= WORTH_REFUSING * self.kept:
            yield self._unfinished(is_error=False)
        incomplete = self.dropped["no complete reasoning trace"]
        if incomplete > WORTH_REFUSING * self.rows:
            text = f"{incomplete:,} of {self.rows:,} rows have no complete trace and are dropped"
            yield Finding("incomplete_dropped", False, text)
        if self.duplicates:
            text = f"{self.duplicates:,} rows repeat an earlier one word for word, and count twice"
            yield Finding("duplicates", False, text)
        for name, count in self.contaminated.items():
            text = f"{count:,} rows hold a problem of the test set {name}: its accuracy will not be of unseen problems"
            yield Finding("contamination", False, text)
        if self.delimiters[_NONE] and len(self.delimiters) > 1:
            text = f"{self.delimiters[_NONE]:,} of {self.kept:,} learned answers have no trace, the others have"
            yield Finding("some_without_trace", False, text)

    def _unfinished(self, is_error: bool) -> Finding:
        text = (
            f"{self.unfinished:,} of {self.kept:,} learned traces never end, or end without a solution: their "
            "generation was cut, and a model learns not to stop; leave these rows out (format=openthoughts drops them)"
        )
        return Finding("truncated_traces", is_error, text)


def examine(source: Source, tests: ProblemIndex, *, limit: int | None = None) -> SourceReport:
    """Look at the rows of a source.

    Args:
        source: What to read.
        tests: The problems of test sets, to be looked for in the rows.
        limit: Rows to look at, the first ones. None: all.

    Raises:
        ValueError: If the source cannot be read, has no row, or a row does not fit its format.
    """
    report: SourceReport | None = None
    unread: list[Row] = []
    seen: dict[int, set[int]] = {}
    for row in islice(read_rows(source, streaming=limit is not None, keep_bad=True), limit):
        if report is None and row.bad is not None:
            # What is learned is known from the first row that can be read.
            read_row(row, None, source)
            unread.append(row)
            continue
        if report is None:
            row_format = resolve_format(source.format, row.columns, row.where)
            name = next(name for name, known in FORMATS.items() if known is row_format)
            why = (
                "named in the recipe" if source.format != "auto" else f"by its columns {', '.join(row_format.columns)}"
            )
            learns = "the final answer" if source.answer_only else _first_line(row_format.read.__doc__)
            report = SourceReport(source.path, name, why, learns)
            for bad in unread:
                _count_dropped(report, read_row(bad, None, source))
        example = read_row(row, row_format, source)
        if isinstance(example, Dropped):
            _count_dropped(report, example)
        else:
            report.rows += 1
            _look_at(report, row.columns, example, seen, tests)
    if report is None:
        raise ValueError(f"{source.path} has no row" + (" that can be read" if unread else ""))
    return report


def refuse_faults(reports: Iterable[SourceReport]) -> None:
    """Raise ValueError with every error that was found, if any."""
    errors = [f"{r.source}: {finding.text}" for r in reports for finding in r.findings() if finding.is_error]
    if errors:
        raise ValueError(
            "\n  ".join(["the training data are not fit to learn from:", *errors])
            + "\nSee `difftune prepare --check`; data.check=false trains on them all the same."
        )


def _count_dropped(report: SourceReport, row: Example | Dropped) -> None:
    assert isinstance(row, Dropped), "a bad row is dropped or raised"
    report.rows += 1
    report.dropped[row.reason] += 1
    if row.first is not None:
        report.first_bad.setdefault(row.reason, row.first)


def _look_at(
    report: SourceReport, columns: Mapping[str, Any], example: Example, seen: dict[int, set[int]], tests: ProblemIndex
) -> None:
    """Count one learned row."""
    report.kept += 1
    turns = {turn["role"]: turn["content"] for turn in example.messages}
    question, answer = turns.get("user", ""), turns.get("assistant", example.text or "")
    report.example = report.example or _shortened(answer)
    form = _delimiters_of(answer)
    report.delimiters[form] += 1
    report.unfinished += _is_unfinished(answer)
    report.known_wrong += "correct" in columns and columns["correct"] is not True
    if form == _NONE:
        others = [name for name, value in columns.items() if any(_delimiters_of(t) != _NONE for t in _texts(value))]
        # OpenThoughts-114k-math counts the tokens of R1's answer; its reference solutions are no traces.
        others = others or [name for name in ("generated_token_count",) if columns.get(name)]
        report.trace_elsewhere.update(others[:1])
    key, content = question_key(question or answer), hash(answer)
    if key in seen:
        repeated = content in seen[key]
        report.duplicates += repeated
        report.same_question += not repeated
    seen.setdefault(key, set()).add(content)
    report.contaminated.update(tests.found_in(question or answer))


def _delimiters_of(text: str) -> str:
    for opening in _DELIMITERS:
        if opening in text:
            return opening
    return _NO_OPENING if "</think>" in text else _NONE


def _is_unfinished(text: str) -> bool:
    """Whether a trace is opened and not closed, or closed with nothing behind."""
    for opening, closing in _DELIMITERS.items():
        if opening in text or closing in text:
            _, closed, after = text.rpartition(closing)
            return not closed or not re.sub(r"<\|(begin|end)_of_solution\|>", "", after).strip()
    return False


def _texts(value: Any) -> Iterable[str]:
    """The texts in a column: itself, or those of its turns."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (
            text for turn in value if isinstance(turn, Mapping) for text in turn.values() if isinstance(text, str)
        )


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0].rstrip(".")


def _shortened(text: str, length: int = 60) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 2 * length else f"{flat[:length]} ... {flat[-length:]}"
