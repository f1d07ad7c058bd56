import io

from rich.console import Console

from difftune.commands import dry_run
from tests.clock import Clock


def test_a_model_is_too_large_above_four_fifths_of_the_memory(monkeypatch):
    count, needed = 29_000, 464_000
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    monkeypatch.setattr(dry_run, "total_memory_bytes", lambda: int(needed / 0.8) + 100)
    assert not dry_run.report_size(console, count, needed)
    monkeypatch.setattr(dry_run, "total_memory_bytes", lambda: int(needed / 0.8) - 100)
    assert dry_run.report_size(console, count, needed)
    assert "29,000 parameters; weights, gradients and optimiser need" in shown.getvalue()


def test_a_micro_batch_is_timed_after_the_first(monkeypatch):
    from difftune.training.finetune import FinetuneModule
    from tests.training.teaching import build_arithmetic, build_student

    module = FinetuneModule(build_student(), lr=1e-3, schedule="constant")
    Clock(monkeypatch, "difftune.commands.dry_run", a_look=0.5)
    cost = dry_run.measure_step(module, build_arithmetic(), "cpu", "bf16-mixed")
    assert cost.tokens == 2 * 64 and cost.seconds == 0.5 and cost.peak_memory_gib > 0
