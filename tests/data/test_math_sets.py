import json
from collections.abc import Callable
from pathlib import Path

import pytest

from difftune.data.math_sets import MATH_SETS, MathSet, load_demonstrations, locate_math_set
from difftune.data.problems import load_problems
from difftune.tasks.base import Defaults
from difftune.tasks.math import MathTaskConfig
from tests.conftest import shared_data

SIZES = {"gsm8k": 1319, "math": 5000, "svamp": 1000, "asdiv": 2215, "mawps": 2065, "carp": 976, "tabmwp": 1000}
SIZES["college_math"] = 2818


def test_a_name_is_a_file_of_the_folder_or_a_set_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "carp.jsonl").write_text("{}")
    assert locate_math_set("carp", str(tmp_path)) == MathSet(str(tmp_path / "carp.jsonl"))
    assert locate_math_set("gsm8k", None) == MathSet("openai/gsm8k", "main", "test", "auto")
    assert locate_math_set("asdiv", None) == MathSet("EleutherAI/asdiv", None, "validation", "asdiv")
    assert locate_math_set("other/gsm8k.jsonl", str(tmp_path)) == MathSet("other/gsm8k.jsonl")
    with pytest.raises(ValueError, match=r"math\.jsonl is not there: folder must hold math\.jsonl"):
        locate_math_set("math", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"no data set of the hub is known for carp: set folder to a folder with carp\.jsonl"
    ):
        locate_math_set("carp", None)


@pytest.mark.parametrize("name", MATH_SETS)
def test_the_real_sets_are_read_whole(name: str) -> None:
    where = locate_math_set(name, str(shared_data() / "math_eval"))
    assert len(load_problems(str(where.path))) == SIZES[name]


# A made-up row of each set in the columns that the hub has.
HUB_ROWS = {
    "gsm8k": {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    "math": {"problem": "1+1?", "level": "Level 1", "solution": r"First \boxed{1}, then $\boxed{\frac{4}{2}}$."},
    "svamp": {"ID": "chal-1", "Body": "Ann has 1 pen", "Question": "And 1 more?", "Answer": "2.0", "Type": "Addition"},
    "asdiv": {"body": "Ann has 1 pen.", "question": "And 1 more?", "answer": "2 (pens)", "formula": "1+1=2"},
    "mawps": {"id": "a", "question": "1+1?", "chain": "<gadget/>", "result": "2", "result_float": 2.0},
    "tabmwp": {"table_title": "Pens", "table": "Ann | 1", "question": "More?", "choices": ["1", "2"], "answer": "2"},
    "college_math": {"question": "1+1?", "answer": "2"},
}  # fmt: skip
ASKED = {
    "svamp": "Ann has 1 pen. And 1 more?",
    "asdiv": "Ann has 1 pen. And 1 more?",
    "tabmwp": 'Read the following table regarding "Pens" and answer a question:\nAnn | 1\nMore? Please select from '
    "the following options: ['1', '2']",
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_the_hub_become_problems(name: str, write_jsonl: Callable[..., str]) -> None:
    (problem,) = load_problems(write_jsonl([HUB_ROWS[name]]), format=MATH_SETS[name].format)
    assert problem.question == ASKED.get(name, "1+1?")
    assert problem.answer == (r"\frac{4}{2}" if name == "math" else "2")


def test_the_task_asks_the_hub_for_the_split_and_configuration_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> list[dict[str, object]]:
        asked.append((path, name, split))
        return [HUB_ROWS["asdiv"]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    defaults = Defaults(max_new_tokens=4, batch_size=1, temperature=0.0, top_p=1.0, num_samples=1, seed=0)
    task = MathTaskConfig(path="asdiv").build(defaults)
    assert [problem.answer for problem in task.problems] == ["2"]
    MathTaskConfig(path="asdiv", split="train", hub_name="other").build(defaults)
    assert asked == [("EleutherAI/asdiv", None, "validation"), ("EleutherAI/asdiv", "other", "train")]


def test_a_solution_of_math_without_a_box_is_left_out(write_jsonl: Callable[..., str]) -> None:
    rows = [{"problem": "a", "solution": text} for text in ("none", r"open \boxed{1", r"\boxed{2}")]
    assert [p.answer for p in load_problems(write_jsonl(rows), format="math")] == ["2"]


def test_demonstrations_are_worked_answers(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [{"question": f"{n}+1", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_demonstrations(str(file), 2) == [("0+1", "0+1=1\n#### 1"), ("1+1", "1+1=2\n#### 2")]
    with pytest.raises(ValueError, match="has 3 worked answers, and 4 demonstrations are asked for"):
        load_demonstrations(str(file), 4)
