from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from difftune.training.strategies import (
    FSDP2Strategy,
    build_strategy,
    choose_strategy,
    count_devices,
    kind_of_device,
    named_devices,
)

GIB = 2**30


def test_names_become_strategies():
    assert build_strategy("auto") == "auto"
    assert isinstance(build_strategy("ddp"), DDPStrategy)
    sharded = build_strategy("fsdp", devices=4, tensor_parallel_size=2, reshard_after_forward=False)
    assert isinstance(sharded, FSDP2Strategy)
    assert (sharded._data_parallel_size, sharded._tensor_parallel_size) == (2, 2)
    assert sharded.sharding == {"reshard_after_forward": False}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_wait_for_one_another_no_longer_than_asked(name):
    assert build_strategy(name, devices=2, timeout_s=7)._timeout == timedelta(seconds=7)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="must be one of auto, ddp, fsdp, got 'deepspeed'"):
        build_strategy("deepspeed")


def test_groups_that_do_not_fill_the_devices_are_refused():
    with pytest.raises(ValueError, match="3 devices do not divide into groups of tensor_parallel_size=2"):
        build_strategy("fsdp", devices=3, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("devices", "size", "expected"), [(1, 99, "auto"), (2, 5, "ddp"), (2, 6, "fsdp"), (8, 6, "fsdp")]
)
def test_half_a_device_decides(devices, size, expected):
    choice = choose_strategy(devices, size * GIB, 10 * GIB)
    assert choice.name == expected
    assert choice.reason == "one device" if devices == 1 else f"{size}.0 GiB" in choice.reason


def test_devices_are_counted_over_all_machines(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert count_devices("cpu", "auto") == 1
    assert count_devices("cpu", 3, num_nodes=2) == 6


@pytest.mark.parametrize(("devices", "count"), [(8, 8), ("8", 8), ([1, 3, 5], 3), ("0,1", 2), ("auto", 1), ("-1", 1)])
def test_devices_that_are_named_need_not_be_here(devices, count):
    accelerator = "cpu" if devices in ("auto", "-1") else "gpu"
    assert named_devices(accelerator, devices) == count
    assert named_devices(accelerator, devices, num_nodes=3) == 3 * count


def test_processes_that_torchrun_started_in_vain_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert count_devices("cpu", 2, num_nodes=2) == 4
    with pytest.raises(ValueError, match=r"torchrun started 4 processes, and trainer\.devices=auto"):
        count_devices("cpu", "auto")


def test_the_kind_of_device_is_what_is_here():
    assert kind_of_device("cpu") == "cpu"
    assert (kind_of_device("auto") == "cuda") == torch.cuda.is_available()
