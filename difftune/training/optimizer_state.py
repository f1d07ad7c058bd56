"""The state of an optimiser by the names of its parameters, so that every strategy reads every other's."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

_SHOWN = 4
_KERNELS = ("fused", "foreach", "capturable")


def parameter_names(groups: Iterable[dict[str, Any]], module: nn.Module) -> list[list[str]]:
    """Names of the parameters in the groups of an optimiser, as ``module.named_parameters()`` has them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def by_name(state: dict[str, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Put names in the place of the numbers that ``optimizer.state_dict()`` has.

    Args:
        state: ``{"state": {number: ...}, "param_groups": [{"params": [number, ...], ...}]}``.
        names: Of the parameters, group by group.

    Returns:
        The same with names; tensors are shared.
    """
    pairs = zip(state["param_groups"], names, strict=True)
    of_number = {n: name for group, own in pairs for n, name in zip(group["params"], own, strict=True)}
    return {
        "state": {of_number[number]: entry for number, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": list(own)} for group, own in zip(state["param_groups"], names, strict=True)
        ],
    }


def in_order(saved: dict[str, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Arrange a saved state, from whatever strategy, for an optimiser with these groups.

    ``optimizer.load_state_dict`` goes by the order of parameters alone; what this returns has the right order.
    Checkpoints of difftune 0.1 have numbers instead of names: they were written in the order of the groups, and are
    taken so if their counts are right.

    Args:
        saved: From a checkpoint: by name, or by number.
        names: Of the parameters to be loaded, group by group.

    Returns:
        The state by name, in the order of ``names``.

    Raises:
        ValueError: If it is the state of other parameters.
    """
    groups = saved["param_groups"]
    if all(isinstance(key, int) for group in groups for key in group["params"]):
        counts, expected = [len(group["params"]) for group in groups], [len(own) for own in names]
        if counts != expected:
            raise ValueError(
                f"the checkpoint's optimiser has {counts} parameters in its groups, this run {expected}, and it is of "
                "a version that did not save their names: resume with the settings of that run (what is trained, "
                "lambda_lr), or start from its weights as model.path"
            )
        saved = by_name(saved, names)
        groups = saved["param_groups"]
    group_of = {name: group for group in groups for name in group["params"]}
    wanted = [name for own in names for name in own]
    missing, extra = sorted(set(wanted) - group_of.keys()), sorted(group_of.keys() - set(wanted))
    if missing or extra:
        told = [
            f"{len(some)} {kind} ({_some(some)})" for kind, some in (("missing", missing), ("extra", extra)) if some
        ]
        raise ValueError(f"the optimiser of the checkpoint has not the parameters of this run: {', '.join(told)}")
    return {
        "state": {name: saved["state"][name] for name in wanted if name in saved["state"]},
        "param_groups": [{**group_of[own[0]], "params": list(own)} for own in names],
    }


def keep_own_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser, whatever it loads, go on by the kernels that it was built with.

    They are options of its groups, and a checkpoint has those of the run that saved it: a run on another number of
    devices may need others.
    """

    def keep(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [
            {**saved, **{key: own[key] for key in _KERNELS if key in own}}
            for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
        ]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(keep)


def split_tensors(states: Sequence[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Take the tensors out of named optimiser states.

    Returns:
        Tensor by ``optimizer_0.PARAMETER.KEY``, and the states without them.
    """
    tensors: dict[str, torch.Tensor] = {}
    rest = []
    for index, state in enumerate(states):
        kept: dict[str, dict[str, Any]] = {}
        for name, entry in state["state"].items():
            kept[name] = {}
            for key, value in entry.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{_prefix(index)}{name}.{key}"] = value
                else:
                    kept[name][key] = value
        rest.append({**state, "state": kept})
    return tensors, rest


def join_tensors(tensors: dict[str, torch.Tensor], rest: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Undo :func:`split_tensors`; names that are not an optimiser's are passed over."""
    states: list[dict[str, Any]] = [
        {**state, "state": {n: dict(e) for n, e in state["state"].items()}} for state in rest
    ]
    for index, state in enumerate(states):
        prefix = _prefix(index)
        for full, tensor in tensors.items():
            if full.startswith(prefix):
                name, key = full.removeprefix(prefix).rsplit(".", 1)
                state["state"][name][key] = tensor
    return states


def is_optimizer_tensor(name: str) -> bool:
    """Whether a name in a checkpoint's tensors is of an optimiser."""
    return name.startswith(_PREFIX)


_PREFIX = "optimizer_"


def _prefix(index: int) -> str:
    return f"{_PREFIX}{index}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
