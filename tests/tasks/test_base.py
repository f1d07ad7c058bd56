import pytest

from difftune.config import load_config
from difftune.tasks import KINDS
from difftune.tasks.base import TaskConfig


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_says_its_own_name_and_is_told_from_the_others(kind: str) -> None:
    default = next(field.default for name, field in KINDS[kind].__dataclass_fields__.items() if name == "kind")
    assert default == kind and issubclass(KINDS[kind], TaskConfig)
    assert KINDS[kind].operand is None or KINDS[kind].operand in KINDS[kind].__dataclass_fields__


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "{kind: maths, path: a.jsonl}",
            "evaluation.tasks.0.kind must be one of math, .*got 'maths'; did you mean 'math'?",
        ),
        ("{kind: math}", "evaluation.tasks.0.path is missing and has no default"),
        ("{path: a.jsonl, limt: 3}", "unknown key 'evaluation.tasks.0.limt'; did you mean 'evaluation.tasks.0.limit'?"),
        ("{path: a.jsonl, name: mean}", "evaluation.tasks: 'mean' cannot name a task"),
        ("{path: a.jsonl, name: a/b}", "evaluation.tasks: 'a/b' cannot name a task"),
    ],
)
def test_a_task_is_checked_by_its_kind(task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, ["model.path=m", f"evaluation.tasks=[{task}]"], command="evaluate")


def test_a_task_without_a_kind_is_a_set_of_problems() -> None:
    (task,) = load_config(
        None, ["model.path=m", "evaluation.tasks=[{path: a.jsonl}]"], command="evaluate"
    ).evaluation.tasks
    assert (task.kind, task.task_name(), type(task)) == ("math", "a", KINDS["math"])
