import argparse
from typing import Any

import pytest
import torch

from benchmarks import long_context

SMALL = ["--threads=1", "--hidden-size=32", "--layers=1", "--heads=2", "--head-dim=16", "--vocab-size=64"]


def parsed(**values: Any) -> argparse.Namespace:
    defaults = {"hidden_size": 128, "layers": 2, "heads": 2, "head_dim": 32, "vocab_size": 256, "mlp_chunk": 512}
    return argparse.Namespace(**{**defaults, **values})


def kept_bytes(length: int, **values: Any) -> int:
    """What the forward of a step keeps for its backward, counting memory that several tensors share once."""
    args = parsed(**values)
    model, ids = long_context.build(args, length), long_context.tokens(args, length)
    of_weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in of_weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(input_ids=ids, labels=ids, use_cache=False)
    assert output.loss_sum.isfinite()
    return sum(storages.values())


def test_what_a_step_keeps_grows_no_faster_than_the_row() -> None:
    """Exact, by hooks: the memory of 4K tokens more is that of 2K more twice, to within a percent."""
    at_2k, at_4k, at_8k = (kept_bytes(length) for length in (2048, 4096, 8192))
    assert at_8k - at_4k <= 1.01 * 2 * (at_4k - at_2k)
    assert at_8k <= 4 * at_2k


def test_a_gated_unit_in_chunks_keeps_nothing_of_its_inner_width() -> None:
    whole, chunked = (kept_bytes(1024, mlp_chunk=chunk) for chunk in (0, 128))
    inner = 4 * 128 * 1024 * 4
    # Two layers, each with gate, activation and up; what goes in is kept instead.
    assert whole - chunked >= 2 * (3 * inner - inner / 4)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the children here, with the arguments that they would get."""
    reports: list[dict[str, Any]] = []

    def run_child(module: str, arguments: list[str], threads: int, timeout_s: float) -> dict[str, Any]:
        assert module == "benchmarks.long_context"
        long_context.main(arguments)
        return reports[-1]

    monkeypatch.setattr(long_context, "run_child", run_child)
    # Models this small do not raise the peak of a process that ran other tests before.
    monkeypatch.setattr(
        long_context, "report", lambda **values: reports.append(values | {"gib": values["labels"] / 64})
    )
    return reports


def test_every_point_is_printed_and_a_line_laid_through_them(
    in_process: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    long_context.main([*SMALL, "--tokens", "65", "129", "257"])
    assert len(in_process) == 6
    text = capsys.readouterr().out
    assert text.count("off the line by at most 0.0%; 4.00 times the memory for 3.95385 times the tokens") == 2


def test_nothing_is_printed_for_a_wrong_result(
    in_process: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        long_context, "report", lambda **values: in_process.append(values | {"gib": 1.0, "loss": len(in_process) + 1.0})
    )
    with pytest.raises(SystemExit, match="the NLL differs"):
        long_context.main([*SMALL, "--tokens", "64"])


def test_a_line_is_told_from_a_parabola() -> None:
    assert long_context.fit_line([1, 2, 4], [3, 5, 9]) == pytest.approx((1.0, 2.0, 0.0))
    assert long_context.fit_line([1, 2, 4], [1, 4, 16])[2] > 0.05
