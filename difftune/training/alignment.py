"""A warm-up for converted students: what each attention writes to the residual stream, as in the model it came from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def attention_outputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the output of every module called `self_attn` in the forwards inside, in their order.

    Example:
        >>> with attention_outputs(nn.Identity()) as outputs:
        ...     pass
        >>> outputs
        []
    """
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "self_attn"]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def alignment_loss(student: list[torch.Tensor], teacher: list[torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    """Squared distance of attention outputs over the mean squared size of the teacher's: a mean over layers.

    ``mean over layers of sum over kept tokens of |s - t|^2 / mean |t|^2``: 0 for equal outputs, 1 a token for a student
    that writes nothing.

    Args:
        student: Outputs of each layer, shape ``(B, T, C)``.
        teacher: The same of the teacher.
        keep: Tokens that count, bool, shape ``(B, T)``.

    Returns:
        The sum over the kept tokens, float32 at least, shape ``()``.

    Raises:
        ValueError: If the layers do not correspond, or the student's carry no gradient.
    """
    shapes = [[tuple(part.shape) for part in parts] for parts in (student, teacher)]
    if not student or shapes[0] != shapes[1]:
        raise ValueError(
            f"attention outputs can be matched to those of the model that the student was converted from: it has "
            f"{len(student)} layers of {shapes[0][:1]}, the teacher {len(teacher)} of {shapes[1][:1]}; set "
            "distill.align_weight=0"
        )
    if torch.is_grad_enabled() and not all(part.requires_grad for part in student):
        raise ValueError(
            "attention outputs carry no gradient: distill.align_weight needs model.gradient_checkpointing=false"
        )
    total = torch.zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32), device=keep.device)
    if not bool(keep.any()):
        # Still a function of the student, so that every rank and every backward finds a graph.
        return total + 0.0 * sum(part.sum() for part in student)
    for mine, theirs in zip(student, teacher, strict=True):
        s, t = mine[keep].to(total.dtype), theirs[keep].to(total.dtype)
        total = total + (s - t).square().sum() / t.square().sum(-1).mean()
    return total / len(student)
