"""A task for the lm-evaluation-harness that is on disk: no network, and small enough to do by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

CHOICES = ("7", "12", "3+4", "x")
SUMS = [{"question": f"{n}+{n}=", "choices": list(CHOICES), "gold": n % 4} for n in range(6)]


def write_own_task(folder: Path, rows: Sequence[dict[str, object]] = SUMS, name: str = "own_sums") -> None:
    """Write the definition of a multiple-choice task and its rows: `question`, `choices`, `gold` (an index)."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
