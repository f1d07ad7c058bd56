"""The eight mathematics sets of the paper by name, and demonstrations for prompts."""

from dataclasses import dataclass
from pathlib import Path

from difftune.data.formats import Dropped, read_example, resolve_format
from difftune.data.sources import Source, read_rows


@dataclass(frozen=True)
class MathSet:
    """Where a set is."""

    path: str | None = None
    """A file, or the id of a data set of the hub. None: the hub has none that is known here."""
    hub_name: str | None = None
    """Its configuration."""
    split: str = "test"
    """The split that has the problems."""
    format: str = "auto"
    """What its columns are, by name of `difftune.data.formats.FORMATS`."""


MATH_SETS = {
    "gsm8k": MathSet("openai/gsm8k", "main"),
    "math": MathSet("DigitalLearningGmbH/MATH-lighteval", "default", format="math"),
    "svamp": MathSet("ChilleD/SVAMP", format="svamp"),
    "asdiv": MathSet("EleutherAI/asdiv", split="validation", format="asdiv"),
    "mawps": MathSet("MU-NLPC/Calc-mawps", format="calc_x"),
    "carp": MathSet(),
    "tabmwp": MathSet("Arietem/tabmwp", split="train", format="tabmwp"),
    "college_math": MathSet("di-zhang-fdu/College_Math_Test"),
}
"""GSM-8K, MATH, SVAMP, ASDiv, MAWPS, CARP, TABMWP and CollegeMath, on the hub.

The hub's copies of SVAMP, ASDiv, MAWPS and TABMWP have other problems than the files of the Qwen2.5-Math harness, or
fewer; docs/how-to/evaluate.md says how many, and how sure each id is.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, appendix C and Fig. 10.
"""


def locate_math_set(path: str, folder: str | None) -> MathSet:
    """Where the problems of a path or a name are.

    Args:
        path: A path as of `Source`, or a name of `MATH_SETS`; what exists on disk wins.
        folder: Folder with a file NAME.jsonl for each name, with columns question (or problem) and answer.

    Raises:
        ValueError: If the name's file is not there, and the hub has none that is known.
    """
    if path not in MATH_SETS or Path(path).exists():
        return MathSet(path)
    if folder is not None:
        file = Path(folder).expanduser() / f"{path}.jsonl"
        if not file.is_file():
            raise ValueError(f"{file} is not there: folder must hold {path}.jsonl, with columns question and answer")
        return MathSet(str(file))
    known = MATH_SETS[path]
    if known.path is None:
        raise ValueError(
            f"no data set of the hub is known for {path}: set folder to a folder with {path}.jsonl, "
            "columns question and answer (docs/how-to/evaluate.md says where it comes from)"
        )
    return known


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
