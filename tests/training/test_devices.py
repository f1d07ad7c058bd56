"""Whether the devices of a recipe are here: with and without GPUs, which are pretended."""

import pytest
import torch

from difftune.training import devices
from difftune.training.devices import device_problem


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with so many GPUs and cores."""

    def pretend(gpus: int, cores: int = 2) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(devices.os, "cpu_count", lambda: cores)

    return pretend


@pytest.mark.parametrize(
    ("accelerator", "asked", "says"),
    [
        ("auto", 8, "came to the CPU"),
        ("auto", "8", "2 at most"),
        ("cpu", 4096, "4096 processes"),
        ("cpu", [0, 1], "a number of processes"),
        ("cpu", "0,1", "a number of processes"),
        ("gpu", 1, "no GPU here"),
        ("gpu", 8, "no GPU here"),
        ("cuda", "auto", "no GPU here"),
        ("mps", 1, "no Apple GPU"),
    ],
)
def test_without_a_gpu(machine, accelerator: str, asked: int | str | list[int], says: str) -> None:
    machine(gpus=0)
    problem = device_problem(accelerator, asked)
    assert problem is not None and says in problem and str(accelerator if "GPU" in says else asked) in problem


def test_processes_on_the_cpu_that_were_asked_for_are_given(machine) -> None:
    machine(gpus=0)
    for accelerator, asked in (("auto", 1), ("auto", 2), ("auto", "auto"), ("cpu", 8), ("cpu", "auto")):
        assert device_problem(accelerator, asked) is None


@pytest.mark.parametrize(("asked", "says"), [(8, "4 cuda devices are here"), ([0, 4], "no 4"), ("2,7", "no 7")])
def test_more_gpus_than_there_are(machine, asked: int | str | list[int], says: str) -> None:
    machine(gpus=4)
    for accelerator in ("auto", "gpu", "cuda"):
        assert says in str(device_problem(accelerator, asked))
        for fine in (4, [0, 3], "0,3", "auto", -1):
            assert device_problem(accelerator, fine) is None


def test_several_machines_need_a_launcher(machine) -> None:
    machine(gpus=0)
    assert "torchrun --nnodes 2" in str(device_problem("cpu", 1, 2, {}))
    assert device_problem("cpu", 1, 2, {"MASTER_ADDR": "10.0.0.1"}) is None
    assert device_problem("cpu", 1, 2, {"TORCHELASTIC_RUN_ID": "x"}) is None
