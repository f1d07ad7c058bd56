import io

import pytest
import torch
from rich.console import Console

from difftune import dry_run
from difftune.modeling import DiffTransformerConfig

CONFIG = DiffTransformerConfig(
    vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
)


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_size_of_training_is_four_copies_of_the_weights(dtype, bytes_each, monkeypatch):
    count = 100 * 64 * 2 + 64 * 64 * 4 + 3 * 64 * 64 + 3 * 64 + 4 * 16 + 32
    needed = 4 * count * bytes_each
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    monkeypatch.setattr(dry_run, "total_memory_bytes", lambda: int(needed / 0.8) + 100)
    assert not dry_run.report_size(console, CONFIG, dtype)
    monkeypatch.setattr(dry_run, "total_memory_bytes", lambda: int(needed / 0.8) - 100)
    assert dry_run.report_size(console, CONFIG, dtype)
    assert f"{count:,} parameters; weights, gradients and optimiser need" in shown.getvalue()


def test_a_micro_batch_is_timed_after_the_first():
    from difftune.training.finetune import FinetuneModule
    from tests.training.teaching import build_arithmetic, build_student

    module = FinetuneModule(build_student(), lr=1e-3, schedule="constant")
    cost = dry_run.measure_step(module, build_arithmetic(), "cpu")
    assert cost.tokens == 2 * 64 and 0 < cost.seconds < 10 and cost.peak_memory_gib > 0
