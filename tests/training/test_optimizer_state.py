import copy

import pytest
import torch
from torch import nn

from difftune.training.optimizer_state import (
    by_name,
    in_order,
    join_tensors,
    keep_own_kernels,
    parameter_names,
    split_tensors,
)


def build(order=("a", "b", "c"), fused=False):
    torch.manual_seed(0)
    module = nn.Module()
    for name, size in {"a": 3, "b": 4, "c": 5}.items():
        setattr(module, name, nn.Parameter(torch.randn(size)))
    groups = [
        {"params": [getattr(module, name) for name in order[:2]], "lr": 0.1},
        {"params": [getattr(module, name) for name in order[2:]], "lr": 0.2},
    ]
    return module, torch.optim.AdamW(groups, fused=fused)


def step(module, optimizer):
    for parameter in module.parameters():
        parameter.grad = torch.linspace(-1, 1, parameter.numel()) * (parameter.numel() + parameter.detach())
    optimizer.step()


def named(module, optimizer):
    return by_name(optimizer.state_dict(), parameter_names(optimizer.param_groups, module))


def test_an_optimiser_goes_on_from_names_whatever_the_order_of_its_parameters():
    module, optimizer = build()
    step(module, optimizer)
    # An optimiser takes tensors as they are: these are not to be those of the other.
    saved = copy.deepcopy(named(module, optimizer))
    assert saved["param_groups"][0]["params"] == ["a", "b"] and set(saved["state"]) == {"a", "b", "c"}
    other, its_optimizer = build(order=("b", "a", "c"))
    other.load_state_dict(module.state_dict())
    its_optimizer.load_state_dict(in_order(saved, parameter_names(its_optimizer.param_groups, other)))
    for pair in ((module, optimizer), (other, its_optimizer)):
        step(*pair)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("saved_by", "fused"), [(True, False), (False, True)])
def test_kernels_are_those_of_the_run_that_goes_on(saved_by, fused):
    module, optimizer = build(fused=saved_by)
    step(module, optimizer)
    _, other = build(fused=fused)
    keep_own_kernels(other)
    other.load_state_dict(optimizer.state_dict())
    assert [group["fused"] for group in other.param_groups] == [fused, fused]
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]


def test_a_state_by_number_is_taken_in_the_order_of_the_groups():
    module, optimizer = build()
    step(module, optimizer)
    names = parameter_names(optimizer.param_groups, module)
    taken = in_order(optimizer.state_dict(), names)
    assert taken["param_groups"] == named(module, optimizer)["param_groups"]
    assert torch.equal(taken["state"]["b"]["exp_avg"], optimizer.state[module.b]["exp_avg"])


def test_a_state_by_number_of_other_groups_is_refused():
    _, optimizer = build()
    with pytest.raises(
        ValueError, match=r"has \[2, 1\] parameters in its groups, this run \[3\], and it is of a version"
    ):
        in_order(optimizer.state_dict(), [["a", "b", "c"]])


def test_missing_and_extra_parameters_are_named():
    module, optimizer = build()
    saved = named(module, optimizer)
    with pytest.raises(ValueError, match=r"1 missing \(d\), 1 extra \(c\)"):
        in_order(saved, [["a", "b"], ["d"]])


def test_tensors_are_taken_out_and_put_back():
    module, optimizer = build()
    step(module, optimizer)
    saved = named(module, optimizer)
    tensors, rest = split_tensors([saved])
    assert {"optimizer_0.a.exp_avg", "optimizer_0.c.step"} <= tensors.keys()
    assert not any(rest[0]["state"].values())
    (joined,) = join_tensors({**tensors, "model.a": torch.zeros(3)}, rest)
    assert joined["param_groups"] == saved["param_groups"]
    assert all(
        torch.equal(value, joined["state"][name][key]) for name, e in saved["state"].items() for key, value in e.items()
    )
