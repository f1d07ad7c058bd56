import pytest

from difftune.config import load_config
from difftune.tasks.attention_noise import AttentionNoiseTaskConfig
from difftune.tasks.base import Defaults

DEFAULTS = Defaults(max_new_tokens=7, batch_size=3, temperature=0.0, top_p=1.0, num_samples=1, seed=4)


def test_so_many_prompts_at_each_depth_of_the_seed():
    settings = AttentionNoiseTaskConfig(depths=[0.0, 1.0], num_samples=3, options={"style": "terse", "filler": 9})
    task = settings.build(DEFAULTS)
    assert [probe.depth for probe in task.probes] == [0.0] * 3 + [1.0] * 3 and task.num_items == 6
    assert all(probe.context.startswith(probe.needle) for probe in task.probes[:3])
    assert [p.context for p in settings.build(DEFAULTS).probes] == [p.context for p in task.probes]


def test_the_depth_is_a_key_of_the_task():
    with pytest.raises(ValueError, match=r"evaluation.tasks.0.options.depth: use depths"):
        task = "{kind: attention_noise, options: {depth: 0.5}}"
        load_config(None, ["model.path=m", f"evaluation.tasks=[{task}]"], command="evaluate")
