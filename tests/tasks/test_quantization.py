import pytest

from difftune.config import load_config
from difftune.tasks.base import Defaults
from difftune.tasks.math import MathTaskConfig
from difftune.tasks.quantization import QuantizationTaskConfig

DEFAULTS = Defaults(max_new_tokens=7, batch_size=3, temperature=0.0, top_p=1.0, num_samples=1, seed=4)


def test_the_other_task_is_a_mapping_of_its_own_kind():
    text = "{kind: quantization, bits: [16, 4], task: {path: 'synthetic:arithmetic', limit: 3}}"
    config = load_config(None, ["model.path=m", f"evaluation.tasks=[{text}]"], command="evaluate")
    (settings,) = config.evaluation.tasks
    assert isinstance(settings, QuantizationTaskConfig) and isinstance(settings.task, MathTaskConfig)
    assert settings.task_name() == "arithmetic_bits" and "accuracy_4bit" in settings.figures()
    task = settings.build(DEFAULTS)
    assert task.num_items == 6 and task.bits == (16, 4)
    task.close()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("bits: [4, 4], task: {path: x}", "bits: must be different"),
        ("bits: [1], task: {path: x}", "bits"),
        ("task: {kind: quantization, task: {path: x}}", "cannot be a quantization itself"),
        ("task: {kind: attention_noise, options: {depth: 0}}", "task.options.depth: use depths"),
        ("granularity: column, task: {path: x}", "granularity must be one of tensor, head, row"),
    ],
)
def test_what_cannot_be_measured_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, ["model.path=m", f"evaluation.tasks=[{{kind: quantization, {keys}}}]"], command="evaluate")
