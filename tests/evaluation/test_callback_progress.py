from pathlib import Path

from difftune.evaluation.callback import ScheduledEvaluation
from tests.evaluation.test_callback import TOKENIZER, FakeTask, fit


def test_how_far_a_task_is_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    evaluation = ScheduledEvaluation([FakeTask(size=5)], TOKENIZER, at_end=False, on_progress=told.append)
    fit(evaluation, tmp_path, max_steps=1)
    assert told == ["evaluating fake, 5 of 5"]
