"""The eight mathematics sets of the paper by name, and demonstrations for prompts."""

from dataclasses import dataclass
from pathlib import Path

from difftune.data.formats import Dropped, read_example, resolve_format
from difftune.data.sources import Source, read_rows


@dataclass(frozen=True)
class MathSet:
    """Where a set is."""

    hub_id: str | None = None
    """Data set of the hub whose rows are read as they are. None: there is none, only files."""
    hub_name: str | None = None
    """Its configuration."""


MATH_SETS = {
    "gsm8k": MathSet("openai/gsm8k", "main"),
    "math": MathSet(),
    "svamp": MathSet(),
    "asdiv": MathSet(),
    "mawps": MathSet(),
    "carp": MathSet(),
    "tabmwp": MathSet(),
    "college_math": MathSet(),
}
"""GSM-8K, MATH, SVAMP, ASDiv, MAWPS, CARP, TABMWP and CollegeMath.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, appendix C and Fig. 10.
"""


def locate_math_set(path: str, folder: str | None) -> tuple[str, str | None]:
    """Where the problems of a path or a name are.

    Args:
        path: A path as of `Source`, or a name of `MATH_SETS`; what exists on disk wins.
        folder: Folder with a file NAME.jsonl for each name, with columns question (or problem) and answer.

    Returns:
        Path or hub id, and the configuration of the hub data set.

    Raises:
        ValueError: If the name's file is not there and the hub has no set that is read as it is.
    """
    if path not in MATH_SETS or Path(path).exists():
        return path, None
    if folder is not None:
        file = Path(folder).expanduser() / f"{path}.jsonl"
        if not file.is_file():
            raise ValueError(f"{file} is not there: folder must hold {path}.jsonl, with columns question and answer")
        return str(file), None
    known = MATH_SETS[path]
    if known.hub_id is None:
        raise ValueError(
            f"{path} is not on the hub in a form that is read as it is: set folder to a folder with {path}.jsonl, "
            "columns question and answer (docs/how-to/evaluate.md says where it comes from)"
        )
    return known.hub_id, known.hub_name


def load_demonstrations(
    path: str, count: int, *, format: str = "auto", split: str = "train", name: str | None = None
) -> list[tuple[str, str]]:
    """The first questions of a source with their worked answers, as they are learned.

    Args:
        path: As of a training source.
        count: How many.
        format: Name of the row format.
        split: Split of a hub data set, folder or generator.
        name: Configuration of a hub data set.

    Raises:
        ValueError: If there are fewer.
    """
    found: list[tuple[str, str]] = []
    row_format = None
    for row in read_rows(Source(path=path, format=format, split=split, name=name)):
        if len(found) == count:
            break
        row_format = row_format or resolve_format(format, row.columns, row.where)
        example = read_example(row_format, row.columns, row.where)
        if not isinstance(example, Dropped) and len(example.messages) >= 2:
            found.append((example.messages[-2]["content"], example.messages[-1]["content"]))
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} worked answers, and {count} demonstrations are asked for")
    return found
