import json
from pathlib import Path

import pytest

from difftune.tasks.base import Defaults
from difftune.tasks.math import MathTaskConfig

DEFAULTS = Defaults(max_new_tokens=7, batch_size=3, temperature=0.5, top_p=0.9, num_samples=2, seed=4)


def test_the_task_takes_its_own_settings_and_the_rest_from_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(9)))
    task = MathTaskConfig(path=str(file), limit=5).build(DEFAULTS)
    assert (task.kind, task.name, task.num_items) == ("math", "set", 5)
    assert (task.max_new_tokens, task.batch_size, task.num_samples, task.seed) == (7, 3, 2, 4)
    assert MathTaskConfig(path=str(file), max_new_tokens=9).build(DEFAULTS).max_new_tokens == 9
    task.close()


def test_demonstrations_must_not_show_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(9)))
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"question": "9+9", "answer": "#### 18"}) + "\n")
    task = MathTaskConfig(path=str(file), num_shots=1, shots_path=str(shots), prompt="plain").build(DEFAULTS)
    assert task.demonstrations == [("9+9", "18")] and task.prompt == "plain"
    with pytest.raises(ValueError, match=r"shows the answer of a problem of .*set\.jsonl: '0\+1'"):
        MathTaskConfig(path=str(file), num_shots=1, shots_path=str(file)).build(DEFAULTS)
    assert MathTaskConfig(path="a", num_shots=1).problems(DEFAULTS) == [
        "num_shots: goes with shots_path, a source of worked answers; set both, or neither"
    ]
