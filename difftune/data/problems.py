"""Problems to evaluate on: question, gold answer, and the chat that asks it."""

import logging
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from difftune.data.examples import Dropped, Message
from difftune.data.formats import read_example, resolve_format
from difftune.data.sources import Source, read_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """A question with a known final answer."""

    id: str
    """Unique in its set."""
    question: str
    """The text of the last user turn."""
    answer: str
    """The gold final answer."""
    prompt_messages: list[Message]
    """The turns before the answer, as in training; render them with `add_generation_prompt=True`."""


class Problems(list[Problem]):
    """Problems of one set, and what of its rows is none."""

    dropped: dict[str, int]
    """Rows without a question or an answer, by the reason; of the whole set."""

    def __init__(self, problems: Iterable[Problem], dropped: Mapping[str, int]) -> None:
        super().__init__(problems)
        self.dropped = dict(dropped)


def load_problems(
    path: str,
    limit: int | None = None,
    seed: int = 0,
    *,
    format: str = "auto",
    split: str = "test",
    name: str | None = None,
    options: dict[str, Any] | None = None,
    columns: dict[str, str] | None = None,
) -> Problems:
    """Read problems from a source whose format knows the final answer.

    Args:
        path: As `Source.path`: a maths set as .jsonl, a hub id, or `synthetic:arithmetic`, of which the test
            half is read.
        limit: Take a random subset of this size, in the order of the source. None, or more than there are:
            all.
        seed: Of the subset.
        format: Name of the row format.
        split: Split of a hub data set, folder or generator.
        name: Configuration of a hub data set.
        options: Settings of a generator. `count` defaults to `limit`, or 1,000.
        columns: As `Source.columns`.

    Rows without a question or an answer are no problems: they are dropped, and counted in a warning.

    Raises:
        ValueError: If nothing can be read, no problem is left, or a row has no final answer; names the row.
    """
    options = dict(options or {})
    if path.startswith("synthetic:"):
        options.setdefault("count", limit or 1000)
    source = Source(path=path, format=format, split=split, name=name, options=options, columns=columns or {})
    if limit is not None and limit < 1:
        raise ValueError(f"limit of problems must be at least 1 or null (all), got {limit}")
    problems: list[Problem] = []
    row_format = None
    dropped: Counter[str] = Counter()
    for number, row in enumerate(read_rows(source)):
        row_format = row_format or resolve_format(format, row.columns, row.where)
        example = read_example(row_format, row.columns, row.where)
        if isinstance(example, Dropped):
            dropped[example.reason] += 1
            continue
        if not example.answer:
            raise ValueError(f"{row.where}: no final answer to grade against; evaluation needs a column answer")
        prompt = example.messages[:-1]
        problems.append(Problem(example.id or str(number), prompt[-1]["content"], example.answer, prompt))
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not problems:
        raise ValueError(f"{path} has no problem to evaluate on" + (f": {reasons}" if reasons else ""))
    if dropped:
        total = len(problems) + dropped.total()
        log.warning("%s: %d of %d problems dropped: %s", path, dropped.total(), total, reasons)
    if limit is None or limit >= len(problems):
        return Problems(problems, dropped)
    chosen = random.Random(seed).sample(range(len(problems)), limit)
    return Problems((problems[index] for index in sorted(chosen)), dropped)
