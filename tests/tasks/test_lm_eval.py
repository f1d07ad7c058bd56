import importlib.util

import pytest

from difftune.tasks.base import Defaults
from difftune.tasks.lm_eval import HarnessTaskConfig

DEFAULTS = Defaults(max_new_tokens=7, batch_size=3, temperature=0.0, top_p=1.0, num_samples=1, seed=4)


def test_tasks_are_named_with_commas():
    settings = HarnessTaskConfig(tasks="hellaswag, arc_easy")
    assert settings.names() == ["hellaswag", "arc_easy"] and "arc_easy_acc" in settings.figures()


def test_without_the_harness_the_install_line_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'difftune\[lm-eval\]'"):
        HarnessTaskConfig(tasks="hellaswag").build(DEFAULTS)
