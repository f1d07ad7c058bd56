"""One rank's moments: shards, caches, accumulation."""

import copy

import pytest

from difftune.config import load_config
from difftune.plan.model import architecture
from difftune.plan.step import Machine, Moment, cache_width, evaluation_caches, moments, phases, shards

SMALL = [
    "tokenizer=digits",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "data.seq_len=64",
]


def moments_of(*keys: str, devices: int = 1, strategy: str = "ddp") -> dict[str, Moment]:
    config = load_config(None, [*SMALL, *keys], command="plan")
    machine = Machine(True, devices, 0, "H100", 0.4, strategy)
    stage, shape = config.resolved_stages()[0], architecture(config)
    found = moments(config, stage, shape, machine, phases(config, stage, shape, machine))
    return {moment.where.split(" of ")[0]: moment for moment in found}


def test_accumulation_holds_gradients_from_the_first_micro_batch_on() -> None:
    once, twice = moments_of(), moments_of("trainer.accumulate_grad_batches=2")
    assert once["forward"].gradients == 0 and once["loss"].gradients == 0
    assert twice["forward"].gradients == twice["optimiser step"].gradients == once["optimiser step"].gradients
    assert once["optimiser step"].optimizer == 2 * once["optimiser step"].gradients


def test_shards_divide_and_gathered_blocks_come_on_top() -> None:
    whole, shared = moments_of(), moments_of(devices=4, strategy="fsdp")
    for name in ("weights", "optimizer"):
        assert getattr(shared["loss"], name) == getattr(whole["loss"], name) // 4
    assert shared["backward"].gathered > shared["loss"].gathered > 0 == whole["loss"].gathered
    kept = moments_of("trainer.fsdp.reshard_after_forward=false", devices=4, strategy="fsdp")
    assert kept["loss"].gathered > shared["loss"].gathered
    half = moments_of("trainer.fsdp.param_dtype=bfloat16", devices=4, strategy="fsdp")
    assert half["loss"].gathered == pytest.approx(shared["loss"].gathered / 2, rel=0.01)
    away = moments_of("trainer.fsdp.cpu_offload=true", devices=4, strategy="fsdp")
    assert away["optimiser step"].total == 0


def test_ranks_that_have_copies_need_what_one_needs() -> None:
    assert moments_of(devices=4) == moments_of()


@pytest.mark.parametrize(("kind", "width"), [("diff_v1", 128), ("diff_v2", 64), ("softmax", 128)])
def test_the_cache_of_a_token_is_keys_and_values_of_every_kind(kind: str, width: int) -> None:
    config = load_config(None, [*SMALL, f"model.attention={kind}"], command="plan")
    assert cache_width(architecture(config)) == width


def test_tasks_are_planned_with_their_own_lengths() -> None:
    tasks = "[{path: a.jsonl, max_new_tokens: 88}, {kind: needle, lengths: [100, 400], max_new_tokens: 10}]"
    keys = [*SMALL, f"evaluation.tasks={tasks}", "evaluation.batch_size=2"]
    config = load_config(None, keys, command="plan")
    stage, shape = config.resolved_stages()[0], architecture(config)
    machine = Machine(True, 2, 0, "H100", 0.4, "fsdp")
    found = evaluation_caches(config, stage, shape, machine)
    assert found == {"a": 2 * 600 * 128 * 4 * 5, "needle": 2 * 410 * 128 * 4 * 5}
    mixed, gathered = copy.deepcopy(stage), copy.deepcopy(stage)
    mixed.trainer.precision, gathered.trainer.fsdp.param_dtype = "bf16-mixed", "bfloat16"
    for other in (mixed, gathered):
        assert evaluation_caches(config, other, shape, machine)["a"] == found["a"] // 2


def test_a_model_is_sharded_over_all_devices_or_over_none() -> None:
    stage = load_config(None, SMALL, command="plan").resolved_stages()[0]
    assert shards(stage, Machine(True, 8, 0, "H100", 0.4, "fsdp")).model == 8
    assert shards(stage, Machine(True, 8, 0, "H100", 0.4, "ddp")).model == 1
