from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from difftune.config import load_config

SMALL = ["needle.lengths=[400, 600]", "needle.depths=[0, 1]", "needle.needles=2", "needle.samples=2"]


def test_the_command_measures_and_draws(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    results = evaluate("--task", "needle", *SMALL, "needle.max_new_tokens=4")
    assert results["needle"]["lengths"] == [400, 600] and results["needle"]["counts"] == [[2, 2], [2, 2]]
    assert results["needle"]["accuracy"] == 0.0 and results["needle"]["n"] == 8
    assert "accuracy by depth of the answer and length in tokens" in capsys.readouterr().out
    assert (tmp_path / "out" / "figures" / "needle.png").is_file()


def test_other_settings_do_not_go_on_with_old_results(evaluate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    evaluate("--task", "needle", *SMALL, "needle.max_new_tokens=2")
    evaluate("--task", "needle", *SMALL, "needle.max_new_tokens=2", "--batch-size", "1")
    with pytest.raises(AssertionError):
        evaluate("--task", "needle", *SMALL, "needle.max_new_tokens=3")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("queries: 9", "evaluation.tasks.0.queries: 9 of 8 needles cannot be asked for; raise needles"),
        ("lengts: [512]", "unknown key 'evaluation.tasks.0.lengts'; did you mean 'evaluation.tasks.0.lengths'?"),
        ("lengths: [12]", "evaluation.tasks.0.lengths.0 must be at least 64, got 12"),
        ("depths: [50]", "evaluation.tasks.0.depths.0 must be between 0 and 1, got 50"),
        ("prompt: completion, queries: 2", "prompt=completion asks for one number, got 2"),
        ("lengths: []", "evaluation.tasks.0.lengths: nothing to measure"),
    ],
)
def test_keys_are_checked(keys: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, ["model.path=m", f"evaluation.tasks=[{{kind: needle, {keys}}}]"], command="evaluate")
    assert message in str(error.value)
