"""AdamW, its parameter groups, and the learning-rate schedule."""

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["linear", "cosine", "constant"]

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


def is_lambda(name: str) -> bool:
    """Whether a parameter belongs to a lambda module, by its name: ``...self_attn.lambda_full.lambda_q1``."""
    return "lambda_full" in name.split(".")[:-1]


def build_parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, lambda_lr: float | None = None
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups named ``decay``, ``no_decay`` and ``lambda``.

    Matrices decay, those of the embedding and the head among them. Vectors (norm gains, biases) do not: decay
    would pull a gain to 0, not to 1. Nothing inside a ``lambda_full`` module decays, in neither variant:
    decay would pull lambda to a constant that the model was never meant to have.

    Args:
        model: Its parameters that require a gradient are taken, a shared one once.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay of the group ``decay``.
        lambda_lr: Peak learning rate of the group ``lambda``. None: ``lr``.

    Returns:
        The groups that are not empty, for a torch optimiser.

    Raises:
        ValueError: If nothing is trainable.
    """
    groups: dict[str, dict[str, Any]] = {
        "decay": {"lr": lr, "weight_decay": weight_decay},
        "no_decay": {"lr": lr, "weight_decay": 0.0},
        "lambda": {"lr": lr if lambda_lr is None else lambda_lr, "weight_decay": 0.0},
    }
    for group in groups.values():
        group["params"] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lambda" if is_lambda(name) else "decay" if parameter.ndim >= 2 else "no_decay"
            groups[kind]["params"].append(parameter)
    filled = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not filled:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    return filled


def build_optimizer(
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float],
    eps: float,
    fused: bool = True,
    foreach: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW over ``groups``: one fused kernel where the devices of the parameters have it.

    Args:
        groups: From :func:`build_parameter_groups`.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        fused: False keeps to the plain implementation, which a gradient scaler (float16) needs for clipping.
        foreach: False takes one parameter at a time. None: torch's choice, where it is not fused.

    Returns:
        The optimiser.
    """
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = fused and devices <= _FUSED_DEVICES
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=fused, foreach=None if fused else foreach)


def lr_factor(step: int, *, warmup_steps: int, total_steps: float, schedule: Schedule, min_lr_ratio: float) -> float:
    """Learning rate of an optimiser step as a share of the peak.

    ``(step + 1) / warmup_steps`` during the warm-up, then from 1 at ``warmup_steps`` to ``min_lr_ratio`` at
    ``total_steps``, along a line or half a cosine; ``min_lr_ratio`` ever after.

    Args:
        step: Optimiser steps done before this one.
        warmup_steps: Optimiser steps of the warm-up; 0 is none.
        total_steps: Optimiser steps of the whole training, warm-up included; not read by ``constant``.
        schedule: ``linear``, ``cosine`` or ``constant`` (1 after the warm-up).
        min_lr_ratio: Where the decay ends.

    Returns:
        The factor, in ``(0, 1]`` for steps before ``total_steps``.

    Example:
        >>> line = {"warmup_steps": 2, "total_steps": 6, "schedule": "linear", "min_lr_ratio": 0.0}
        >>> [lr_factor(step, **line) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr_ratio + (1.0 - min_lr_ratio) * remaining


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    warmup_steps: int,
    total_steps: float,
    schedule: Schedule,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """The scheduler that multiplies the peak rate of every group by :func:`lr_factor`.

    Args:
        optimizer: Its groups hold the peak rates.
        warmup_steps: Optimiser steps of the warm-up.
        total_steps: Optimiser steps of the whole training.
        schedule: ``linear``, ``cosine`` or ``constant``.
        min_lr_ratio: Where the decay ends, as a share of the peak.

    Returns:
        A scheduler to be stepped once an optimiser step.

    Raises:
        ValueError: If the schedule is unknown, or has no end to decay to.
    """
    if schedule not in ("linear", "cosine", "constant"):
        raise ValueError(f"schedule must be linear, cosine or constant, got {schedule!r}")
    if schedule != "constant":
        # Lightning estimates -1 for data without an end.
        if not 0 < total_steps < math.inf:
            raise ValueError(
                f"schedule={schedule} must know where training ends: set trainer.max_steps, or use constant"
            )
        if warmup_steps > total_steps:
            raise ValueError(
                f"warmup_steps ({warmup_steps}) exceeds the {total_steps:g} steps of the training: lower "
                "optim.warmup_steps, or raise max_steps or max_epochs"
            )
    factor = partial(
        lr_factor,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        schedule=schedule,
        min_lr_ratio=min_lr_ratio,
    )
    return LambdaLR(optimizer, factor)


def reset_hyperparameters(scheduler: LambdaLR, groups: list[dict[str, Any]]) -> list[str]:
    """Give the optimiser of a resumed run the hyperparameters asked for now, and say which ones that changed.

    A restored optimiser and scheduler bring the values of the run that saved them. Unchanged values leave
    everything bitwise as it was.

    Args:
        scheduler: Restored, with its optimiser.
        groups: The groups as the optimiser was built with, parameters not needed: ``name`` and
            hyperparameters.

    Returns:
        One text a change, such as ``decay.lr 0.001 -> 0.0005``.
    """
    changes = []
    asked = {group["name"]: group for group in groups}
    for index, group in enumerate(scheduler.optimizer.param_groups):
        wanted = asked[group["name"]]
        for key in ("betas", "eps", "weight_decay"):
            if _comparable(group[key]) != _comparable(wanted[key]):
                changes.append(f"{group['name']}.{key} {group[key]} -> {wanted[key]}")
            group[key] = wanted[key]
        if scheduler.base_lrs[index] != wanted["lr"]:
            changes.append(f"{group['name']}.lr {scheduler.base_lrs[index]} -> {wanted['lr']}")
        scheduler.base_lrs[index] = group["initial_lr"] = wanted["lr"]
        group["lr"] = wanted["lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)
    return changes


def _comparable(value: Any) -> Any:
    """A list as a tuple, so that betas compare equal in either form."""
    return tuple(value) if isinstance(value, list) else value
