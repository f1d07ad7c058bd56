"""The problems that a recipe measures on, to be looked for in the rows that it trains on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from difftune.config import EvaluationConfig
from difftune.data.contamination import ProblemIndex
from difftune.data.math_sets import MATH_SETS
from difftune.tasks import MathTaskConfig, QuantizationTaskConfig


@dataclass
class HeldOut:
    """Questions of test sets, and what was not read."""

    questions: dict[str, list[str]] = field(default_factory=dict)
    """By the name of the set."""
    unread: dict[str, str] = field(default_factory=dict)
    """Sets that could not be read, and why."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks whose problems need not, or cannot, be looked for, and why."""

    def text(self, index: ProblemIndex) -> str:
        """What is looked for and what is not, for people.

        Args:
            index: Of these questions.
        """
        sets = []
        for name, asked in self.questions.items():
            short = f", {index.too_short[name]:,} too short" if index.too_short[name] else ""
            sets.append(f"{name} ({len(asked):,} problems{short})")
        lines = [f"looked for in the rows: {', '.join(sets) or 'no test set'}"]
        lines += [f"  warning     not looked for: {name}: {reason}" for name, reason in self.unread.items()]
        lines += [f"  not looked for: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def held_out_problems(evaluations: Iterable[EvaluationConfig], *, all_sets: bool = False) -> HeldOut:
    """Read the problems of the maths tasks of some evaluations, whole sets whatever the tasks' limits.

    Args:
        evaluations: Of one stage or several.
        all_sets: Also those of the paper's eight sets that no task names: from a folder in which a task has its file,
            else from the hub. After the first that finds no network no other is asked of it.
    """
    found = HeldOut()
    tasks: list[MathTaskConfig] = []
    for evaluation in evaluations:
        for given in evaluation.tasks:
            task = given.task if isinstance(given, QuantizationTaskConfig) else given
            if not isinstance(task, MathTaskConfig):
                reason = f"problems of the kind {task.kind} are not compared with training rows"
                found.left_out[task.task_name()] = reason
            elif task.path.startswith("synthetic:") and task.split in (None, "test"):
                found.left_out[task.task_name()] = "generated, and no problem is in both of a generator's halves"
            elif not any(_source(task) == _source(other) for other in tasks):
                tasks.append(task)
                _read(task, task.task_name(), evaluation.seed, found)
    if all_sets:
        _read_other_sets(tasks, found)
    return found


def _source(task: MathTaskConfig) -> tuple[str | None, ...]:
    """What tells one set from another, and from itself under other limits and prompts."""
    return task.path, task.folder, task.split, task.hub_name, task.format, task.name, str(task.columns)


def _read(task: MathTaskConfig, name: str, seed: int, found: HeldOut) -> bool:
    """Add the questions of a task's whole set; whether the hub, if asked, was there."""
    try:
        problems = task.read(seed, limit=None)
    except (ValueError, ImportError) as error:
        found.unread[name] = str(error)
        return not isinstance(error.__cause__, ConnectionError)
    found.questions.setdefault(name, []).extend(problem.question for problem in problems)
    return True


def _read_other_sets(tasks: Sequence[MathTaskConfig], found: HeldOut) -> None:
    named = {name for task in tasks for name in (task.path, Path(task.path).stem, task.task_name())}
    folders = _folders(tasks)
    online = True
    for name, known in MATH_SETS.items():
        if name in named or known.path in named:
            continue
        folder = next((str(folder) for folder in folders if (folder / f"{name}.jsonl").is_file()), None)
        if folder is None and known.path is not None and not online:
            found.unread[name] = f"no file {name}.jsonl where the recipe has its sets, and no network to read the hub's"
            continue
        online &= _read(MathTaskConfig(path=name, folder=folder), name, 0, found)


def _folders(tasks: Iterable[MathTaskConfig]) -> list[Path]:
    """Where the recipe says that sets are: as the folder of a task, or around the file of one."""
    folders: dict[Path, None] = {}
    for task in tasks:
        if task.folder is not None:
            folders[Path(task.folder).expanduser()] = None
        elif (file := Path(task.path).expanduser()).is_file():
            folders[file.parent] = None
    return list(folders)
