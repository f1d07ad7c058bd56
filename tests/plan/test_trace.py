"""The phases of a traced step, and what a GPU's kernels keep."""

import contextlib
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from difftune import losses
from difftune.config import load_config
from difftune.modeling import DiffTransformerConfig
from difftune.plan import step as plan_step
from difftune.plan import trace as plan_trace
from difftune.plan.model import architecture
from difftune.plan.step import Machine, phases
from difftune.plan.trace import Phase, kept_a_block

GPU = Machine(is_gpu=True, devices=1, memory=0, gpu="H100", mfu=0.4)
CPU = Machine(is_gpu=False, devices=1, memory=0, gpu="H100", mfu=0.4)
SMALL = [
    "tokenizer=digits",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=5",
    "model.num_attention_heads=2",
    "data.seq_len=128",
]


def traced(machine: Machine, *keys: str) -> tuple[list[Phase], DiffTransformerConfig]:
    config = load_config(None, [*SMALL, *keys], command="plan")
    shape = architecture(config)
    return phases(config, config.resolved_stages()[0], shape, machine), shape


@pytest.mark.parametrize(
    "keys",
    [
        ("trainer.precision=bf16-mixed", "model.gradient_checkpointing=true"),
        ("adapter.preset=all_linear",),
    ],
)
def test_three_blocks_say_what_all_of_them_would(keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    few, _ = traced(CPU, *keys)
    for module in (plan_step, plan_trace):
        monkeypatch.setattr(module, "TRACED_BLOCKS", 5)
    monkeypatch.setattr(plan_step, "_traced", {})
    every, _ = traced(CPU, *keys)
    assert [str(phase) for phase in few] == [str(phase) for phase in every]
    assert list(map(astuple, few)) == list(map(astuple, every))


def test_a_step_goes_up_the_blocks_and_down_again() -> None:
    found, _ = traced(CPU)
    assert [str(phase) for phase in found] == [
        "forward, before the blocks",
        *(f"forward of block {block}" for block in range(5)),
        "loss",
        "backward of the loss",
        *(f"backward of block {block}" for block in reversed(range(5))),
        "backward, below the blocks",
    ]
    assert all(later.held == earlier.left for earlier, later in pairwise(found))
    # What stays at the end is the hidden states that the output holds, nothing of a block.
    assert found[-1].left < kept_a_block(found) / 4


@pytest.mark.parametrize(("kind", "attention"), [("diff_v1", 12), ("diff_v2", 6)])
def test_the_fused_kernels_keep_what_their_derivation_says(kind: str, attention: int) -> None:
    found, shape = traced(GPU, f"model.attention={kind}", "model.dtype=bfloat16")
    tokens, hidden, inner = 128, 64, 128
    heads, head_dim = shape.num_diff_heads, shape.head_dim
    # docs/kernels.md counts q, k, v, O_2, O and Y of a head with keys of its own.
    # Besides: both norms' outputs, the residual after attention, that after the unit, and four of the gated unit.
    expected = 2 * tokens * (attention * heads * head_dim + 4 * hidden + 4 * inner)
    # A float32 a token for each norm, two a head for the softmaxes; and V2's lambda with its input, in float32.
    expected += 4 * tokens * (2 + 2 * heads)
    if kind == "diff_v2":
        expected += 4 * tokens * (hidden + heads)
    assert kept_a_block(found) == pytest.approx(expected, rel=0.02)


def test_mixed_precision_keeps_less_of_a_block_than_float32() -> None:
    wide, _ = traced(GPU)
    mixed, _ = traced(GPU, "trainer.precision=bf16-mixed")
    assert kept_a_block(mixed) < 0.75 * kept_a_block(wide)


def test_a_teacher_is_traced_over_a_few_chunks_which_need_the_memory_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 100_288
    DiffTransformerConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path)
    keys = (f"model.vocab_size={vocabulary}", f"distill.teacher={tmp_path}", "data.micro_batch_size=8")
    chunks = []

    def counted(*arguments: Any) -> Any:
        chunks.append(1)
        return losses.forward_kl(*arguments)

    monkeypatch.setitem(losses.DIVERGENCES, "forward_kl", counted)
    few, _ = traced(CPU, *keys)
    assert len(chunks) == 3
    monkeypatch.setattr(plan_trace, "_few_chunks", contextlib.nullcontext)
    monkeypatch.setattr(plan_step, "_traced", {})
    every, _ = traced(CPU, *keys)
    assert len(chunks) > 3 + 5
    assert list(map(astuple, few)) == list(map(astuple, every))


def test_a_cpu_is_traced_with_its_own_attention() -> None:
    assert kept_a_block(traced(CPU, "data.packing=false")[0]) != kept_a_block(traced(GPU, "data.packing=false")[0])
