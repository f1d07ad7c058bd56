"""Texts with one label of several: the sets of many-shot in-context learning."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from difftune.data.sources import Source, read_rows


@dataclass(frozen=True)
class LabelledText:
    """One example."""

    text: str
    """What is to be classified."""
    label: str
    """Its class, in words."""


@dataclass(frozen=True)
class LabelledSet:
    """A public set: its files, its columns, and how it is put into a prompt."""

    train: str
    """Name of the file with demonstrations."""
    test: str
    """Name of the file with test examples."""
    label_column: str
    """The column with the label."""
    text_prefix: str
    """What stands before a text."""
    label_prefix: str
    """What stands before a label."""
    readable: Callable[[str], str]
    """The label in words."""


_COARSE = {
    "ABBR": "abbreviation",
    "ENTY": "entity",
    "DESC": "description",
    "HUM": "human",
    "LOC": "location",
    "NUM": "numeric",
}
_FINE = {
    "abb": "abbreviation",
    "exp": "expansion",
    "cremat": "creation",
    "dismed": "disease",
    "instru": "instrument",
    "lang": "language",
    "techmeth": "technique",
    "termeq": "term",
    "veh": "vehicle",
    "def": "definition",
    "desc": "description",
    "gr": "group",
    "ind": "individual",
    "mount": "mountain",
    "dist": "distance",
    "ord": "order",
    "perc": "percent",
    "temp": "temperature",
    "volsize": "size",
}


def readable_question_type(code: str) -> str:
    """A label of TREC in words.

    Example:
        >>> readable_question_type("NUM"), readable_question_type("NUM:dist")
        ('numeric', 'numeric distance')
    """
    coarse, _, fine = code.partition(":")
    return " ".join([_COARSE.get(coarse, coarse), *([_FINE.get(fine, fine)] if fine else [])])


def readable_intent(code: str) -> str:
    """A label of Banking-77 or Clinic-150 in words: `card_arrival` is `card arrival`."""
    return code.replace("_", " ")


SETS = {
    "trec": LabelledSet(
        "trec_train.jsonl", "trec_test.jsonl", "coarse_label", "Question:", "Type:", readable_question_type
    ),
    "trec_fine": LabelledSet(
        "trec_train.jsonl", "trec_test.jsonl", "fine_label", "Question:", "Type:", readable_question_type
    ),
    "banking77": LabelledSet(
        "banking77_train.jsonl", "banking77_test.jsonl", "label", "query:", "intent:", readable_intent
    ),
    "clinic150": LabelledSet(
        "clinic150_train.jsonl", "clinic150_test.jsonl", "label", "utterance:", "intent:", readable_intent
    ),
}
"""The sets of the paper by name: 6, 50, 77 and 150 classes.

Source:
    Prompts and names: Bertsch et al. 2024, "In-Context Learning with Long-Context Models",
    abertsch72/long-context-icl.
"""


def load_labelled(
    path: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    readable: Callable[[str], str] = readable_intent,
) -> list[LabelledText]:
    """Read examples from a data file.

    Args:
        path: A .jsonl, .json or .parquet file.
        text_column: The column with the text.
        label_column: The column with the label.
        readable: Makes words of a label.

    Raises:
        ValueError: If a column is missing or not text, or there is no row.
    """
    examples = []
    for row in read_rows(Source(path=str(path))):
        values = [row.columns.get(name) for name in (text_column, label_column)]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise ValueError(
                f"{row.where}: columns {text_column!r} and {label_column!r} must hold text; there are "
                f"{', '.join(sorted(row.columns))}"
            )
        examples.append(LabelledText(str(values[0]).strip(), readable(str(values[1]))))
    if not examples:
        raise ValueError(f"{path} has no example")
    return examples
