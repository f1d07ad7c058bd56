import json
from pathlib import Path

import pytest

from difftune.data.math_sets import MATH_SETS, load_demonstrations, locate_math_set
from difftune.data.problems import load_problems
from tests.conftest import shared_data

SIZES = {"gsm8k": 1319, "math": 5000, "svamp": 1000, "asdiv": 2215, "mawps": 2065, "carp": 976, "tabmwp": 1000}
SIZES["college_math"] = 2818


def test_a_name_is_a_file_of_the_folder_or_a_set_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "carp.jsonl").write_text("{}")
    assert locate_math_set("carp", str(tmp_path)) == (str(tmp_path / "carp.jsonl"), None)
    assert locate_math_set("gsm8k", None) == ("openai/gsm8k", "main")
    assert locate_math_set("other/gsm8k.jsonl", str(tmp_path)) == ("other/gsm8k.jsonl", None)
    with pytest.raises(ValueError, match=r"math\.jsonl is not there: folder must hold math\.jsonl"):
        locate_math_set("math", str(tmp_path))
    with pytest.raises(ValueError, match=r"carp is not on the hub .* set folder to a folder with carp\.jsonl"):
        locate_math_set("carp", None)


@pytest.mark.parametrize("name", MATH_SETS)
def test_the_real_sets_are_read_whole(name: str) -> None:
    path, _ = locate_math_set(name, str(shared_data() / "math_eval"))
    assert len(load_problems(path)) == SIZES[name]


def test_demonstrations_are_worked_answers(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [{"question": f"{n}+1", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_demonstrations(str(file), 2) == [("0+1", "0+1=1\n#### 1"), ("1+1", "1+1=2\n#### 2")]
    with pytest.raises(ValueError, match="has 3 worked answers, and 4 demonstrations are asked for"):
        load_demonstrations(str(file), 4)
