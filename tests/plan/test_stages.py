"""What a plan says, against training that was measured and against sums done by hand."""

from pathlib import Path

import pytest
import torch

from benchmarks.plan import CONFIGURATIONS, DOCUMENTS_A_ROW, allocated_peak, overrides
from difftune.config import load_config
from difftune.plan import step as plan_step
from difftune.plan.stages import GIB, RESERVE, plan_stages

PAPER_3B = [
    "tokenizer=null",
    "model.vocab_size=100288",
    "model.hidden_size=3072",
    "model.intermediate_size=8192",
    "model.num_hidden_layers=28",
    "model.num_attention_heads=24",
    "model.dtype=bfloat16",
    "model.max_position_embeddings=65536",
    "data.seq_len=65536",
]


def planned(*keys: str, **options):
    (found,) = plan_stages(load_config(None, list(keys), command="plan"), **options)
    return found


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(name: str, tmp_path: Path) -> None:
    config = load_config(None, overrides(name, 2, tmp_path))
    plan = plan_stages(config)[0].peak.total
    assert plan == pytest.approx(allocated_peak(config, tmp_path), rel=0.1)


def test_the_benchmark_packs_as_the_plan_assumes() -> None:
    assert DOCUMENTS_A_ROW == plan_step.DOCUMENTS_A_ROW


def test_the_papers_3b_at_64k_with_lora_fits_one_gpu_with_checkpointing_and_says_so_without() -> None:
    keys = [*PAPER_3B, "adapter.preset=attention"]
    fits = planned(*keys, "model.gradient_checkpointing=true", gpus=1, gpu_memory_gib=80)
    assert fits.fits and fits.suggestions == [] and fits.peak.where.startswith("backward of block")
    without = planned(*keys, gpus=1, gpu_memory_gib=80)
    assert not without.fits and without.peak.total > 3 * fits.peak.total
    first = next(s for s in without.suggestions if s.change == "model.gradient_checkpointing=true")
    assert first.peak == fits.peak.total and first.saves == without.peak.total - fits.peak.total
    assert without.kept_with_checkpointing == fits.kept_a_block == 65536 * 3072 * 2
    # 28 blocks, hidden 3072, FFN 8192, embedding and head apart; 12 lambda vectors a block are 512 numbers.
    assert fits.parameters["total"] - fits.parameters["trainable"] == pytest.approx(
        28 * (4 * 3072**2 + 3 * 3072 * 8192) + 2 * 100288 * 3072, rel=1e-3
    )
    # Never held whole.
    assert fits.logits < 2**26 + 1 and fits.all_logits == 4 * 65536 * 100288


def test_training_the_whole_3b_needs_more_than_one_gpu_and_fits_eight_that_share_it() -> None:
    keys = [*PAPER_3B, "model.dtype=float32", "trainer.precision=bf16-mixed", "model.gradient_checkpointing=true"]
    keys += ["data.seq_len=4096"]
    alone = planned(*keys, gpus=1, gpu_memory_gib=40)
    together = planned(*keys, "trainer.strategy=fsdp", gpus=8, gpu_memory_gib=40)
    assert not alone.fits and together.fits
    assert together.peak.weights == alone.peak.weights // 8 and together.peak.optimizer == alone.peak.optimizer // 8
    assert together.peak.gathered > 0 and alone.peak.gathered == 0
    copies = planned(*keys, "trainer.strategy=ddp", gpus=8, gpu_memory_gib=40)
    assert copies.peak.total == alone.peak.total and planned(*keys, gpus=8, gpu_memory_gib=40).peak == together.peak
    assert "trainer.strategy=fsdp" in {s.change for s in copies.suggestions}


SMALL = [
    "tokenizer=digits",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "data.seq_len=128",
]


def test_hours_are_the_arithmetic_of_all_steps_over_the_stated_share_of_the_peak() -> None:
    plan = planned(*SMALL, "trainer.max_steps=1000", "trainer.accumulate_grad_batches=3", gpus=2, gpu="A100", mfu=0.5)
    assert plan.tokens_a_step == 128 * 3 * 2
    expected = 1000 * plan.tokens_a_step * plan.flops_per_token / (2 * 0.5 * 3.12e14) / 3600
    assert plan.hours == pytest.approx(expected)
    assert planned(*SMALL).hours is None


def test_an_evaluation_is_planned_with_the_cache_that_generation_makes() -> None:
    from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

    tasks = "evaluation.tasks=[{path: synthetic:arithmetic, max_new_tokens: 88}]"
    plan = planned(*SMALL, tasks, "evaluation.batch_size=3")
    shape = DiffTransformerConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    with torch.no_grad():
        cache = DiffTransformerForCausalLM(shape)(torch.zeros(3, 600, dtype=torch.int64)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan.moments[-1].where == "evaluation arithmetic"
    # One layer is there twice while it grows.
    assert plan.moments[-1].cache == held * 5 // 4


def test_the_cpu_is_planned_with_the_memory_of_the_machine_and_without_a_reserve() -> None:
    plan = planned(*SMALL, "trainer.accelerator=cpu")
    assert plan.available == plan.machine.memory and not plan.machine.is_gpu
    assert planned(*SMALL, gpu_memory_gib=24).available == 24 * GIB - RESERVE


def test_a_base_in_4_bits_takes_half_a_byte_a_weight_and_its_scales() -> None:
    keys = [*SMALL, "adapter.preset=attention", "model.dtype=bfloat16"]
    plain, four = planned(*keys).peak.weights, planned(*keys, "model.quantization=nf4").peak.weights
    projections = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    saved = projections * (2 - 0.5 - 1 / 64 - 4 / 64 / 256)
    assert plain - four == pytest.approx(saved, rel=0.01)


def test_a_teacher_that_runs_beside_counts_with_its_weights(tmp_path: Path) -> None:
    from difftune.modeling import DiffTransformerConfig

    shape = DiffTransformerConfig(
        vocab_size=200, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    shape.save_pretrained(tmp_path)
    alone = planned(*SMALL)
    taught = planned(*SMALL, f"distill.teacher={tmp_path}", "distill.top_k=null")
    assert taught.peak.weights > alone.peak.weights and taught.peak.total > alone.peak.total
    stored = planned(*SMALL, f"distill.teacher={tmp_path}", "distill.top_k=8")
    assert stored.peak.weights == alone.peak.weights


def test_what_cannot_be_planned_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"model\.path: .*model\.path=null"):
        planned("model.path=not/here/at/all")
    with pytest.raises(ValueError, match="--gpu H1000 is unknown: choose one of"):
        planned(*SMALL, gpu="H1000")
    with pytest.raises(ValueError, match="--mfu must be above 0"):
        planned(*SMALL, mfu=0.0)
