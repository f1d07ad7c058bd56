"""What several devices can do with the rest of a recipe: refused with the remedy, or accepted."""

import pytest

from difftune.config import load_config

BASE = ("tokenizer=digits", "data.train=[{path: a.jsonl}]", "trainer.max_steps=10")
STAGES = "stages=[{name: a}, {name: b}]"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.strategy=fdsp"], "trainer.strategy must be one of auto, ddp, fsdp, got 'fdsp'; did you mean 'fsdp'"),
        (["trainer.strategy=fsdp", "trainer.precision=16-mixed"], "trainer.precision: fsdp has no gradient scaler"),
        (["trainer.strategy=fsdp", "trainer.accelerator=mps"], "trainer.strategy: fsdp runs on CUDA and the CPU"),
        (
            ["trainer.strategy=fsdp", "trainer.precision=bf16-mixed", "trainer.fsdp.param_dtype=bfloat16"],
            "trainer.fsdp.param_dtype: bfloat16 and precision=bf16-mixed say the same twice",
        ),
        (
            ["trainer.strategy=fsdp", "trainer.accelerator=cpu", "trainer.fsdp.cpu_offload=true"],
            "trainer.fsdp.cpu_offload: the model is in the memory of the host already",
        ),
        (["trainer.fsdp.tensor_parallel_size=2"], "trainer.fsdp.tensor_parallel_size: is for trainer.strategy=fsdp"),
        (["trainer.fsdp.tensor_parallel_size=0"], "trainer.fsdp.tensor_parallel_size must be at least 1, got 0"),
        (
            ["trainer.strategy=ddp", "trainer.fsdp.reshard_after_forward=false"],
            "trainer.fsdp: does nothing with trainer.strategy=ddp",
        ),
        ([STAGES, "stages.a.trainer.strategy=fsdp"], "trainer.strategy: a model is sharded once a run"),
        (
            [STAGES, "trainer.strategy=fsdp", "stages.b.trainer.fsdp.cpu_offload=true"],
            "trainer.strategy: a model is sharded once a run",
        ),
        (
            ["trainer.strategy=fsdp", "model.path=m", "adapter={}", "model.quantization=nf4"],
            "model.quantization: nf4 weights cannot be sharded",
        ),
        (["trainer.strategy=fsdp", "model.path=m", "adapter={use_dora: true}"], "adapter.use_dora: needs the length"),
        (
            ["trainer.strategy=fsdp", "model.path=m", "adapter={}", "trainer.fsdp.tensor_parallel_size=2"],
            "trainer.fsdp.tensor_parallel_size: divides whole projections, and adapter puts LoRA beside them",
        ),
        (["model.gradient_checkpointing_every=2"], "model.gradient_checkpointing_every: does nothing alone"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, expected):
    with pytest.raises(ValueError) as failure:
        load_config(None, [*BASE, *overrides])
    assert expected in str(failure.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.strategy=fsdp", "trainer.fsdp={param_dtype: bfloat16, reduce_dtype: float32}"],
        ["trainer.strategy=fsdp", "trainer.fsdp.tensor_parallel_size=2"],
        ["trainer.fsdp.reshard_after_forward=false"],
        [STAGES, "trainer.strategy=fsdp"],
        [STAGES, "stages.a.trainer.strategy=ddp"],
        ["trainer.strategy=fsdp", "model.path=m", "adapter={}"],
        ["model.gradient_checkpointing=true", "model.gradient_checkpointing_every=2"],
    ],
)
def test_what_goes_together_is_accepted(overrides):
    config = load_config(None, [*BASE, *overrides])
    # What was accepted is also what the run is built from, in every stage.
    sharded = "trainer.strategy=fsdp" in overrides
    assert all((stage.trainer.strategy == "fsdp") == sharded for stage in config.resolved_stages())
