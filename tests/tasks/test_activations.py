import json

import pytest

from difftune.tasks.activations import ActivationsTaskConfig
from difftune.tasks.base import Defaults

DEFAULTS = Defaults(max_new_tokens=7, batch_size=3, temperature=0.0, top_p=1.0, num_samples=1, seed=4)


def test_the_text_is_read_from_a_file_or_a_generator(tmp_path):
    file = tmp_path / "book.jsonl"
    file.write_text("".join(json.dumps({"text": f"page {n}"}) + "\n" for n in range(5)))
    task = ActivationsTaskConfig(path=str(file), limit=3, num_tokens=50, length=8).build(DEFAULTS)
    assert list(task.documents) == ["page 0", "page 1", "page 2"]
    assert (task.name, task.num_items, task.num_tokens, task.length) == ("activations", 1, 50, 8)
    chats = ActivationsTaskConfig(path="synthetic:arithmetic", limit=2, name="outliers").build(DEFAULTS)
    assert chats.name == "outliers" and [chat[0]["role"] for chat in chats.documents] == ["user", "user"]


def test_the_figures_that_can_choose_a_checkpoint_are_measured():
    from difftune.evaluation.activations import ActivationsResult, ActivationsSample

    figures = {name: 1.0 for name in ("top_1", "top_100", "median")}
    result = ActivationsResult([ActivationsSample(0, 9, figures, figures, [figures], [figures])])
    assert set(ActivationsTaskConfig(path="x").figures()) <= set(result.metrics())


def test_a_source_without_documents_is_refused(tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(ValueError, match="no document"):
        ActivationsTaskConfig(path=str(file)).build(DEFAULTS)
