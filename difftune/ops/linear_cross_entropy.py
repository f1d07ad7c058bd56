"""Cross entropy of a linear head, without ever holding the logits of all tokens.

Tokens are taken a chunk at a time: logits, loss, and at once the gradients with respect to hidden states and weight,
since the gradient of a sum of losses does not depend on what follows. The backward pass only multiplies them by the
incoming scalar, so nothing is computed twice and memory is that of one chunk of logits. Tokens without a label are
left out before the matrix product.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits of a chunk: 2^24 float32 values are 64 MiB.
CHUNK_ELEMENTS = 2**24


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross entropies of ``hidden @ weight.T`` against ``labels``, and how many labels there are.

    Equals ``F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")``, plus
    ``z_loss * logsumexp(logits) ** 2`` a label. Softmax and loss are computed in float32 at least.

    Args:
        hidden: Last hidden states, shape ``(..., C)``.
        weight: Weight of the head, shape ``(V, C)``.
        labels: Token to predict from each hidden state (already shifted), int64, shape ``(...)``, in ``[0, V)``
            or ``ignore_index``.
        ignore_index: Label of tokens that do not count.
        z_loss: Weight of the squared log-partition, in nats; 0 is off. Source: PaLM, arXiv:2204.02311, section 5.
        chunk_elements: Logits held at once.

    Returns:
        The summed loss in nats (float32, or float64 for float64 inputs), shape ``()``, and the number of labels
        (int64), shape ``()``.

    Raises:
        ValueError: If the shapes do not fit together, or a label is outside ``[0, V)``.

    Source:
        The chunked form: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.

    Example:
        >>> loss_sum, count = linear_cross_entropy(torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor([0, 1, -100]))
        >>> round(loss_sum.item() / count.item(), 4)
        0.6931
    """
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (..., C) and weight (V, C) must agree, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    keep = labels != ignore_index
    count = keep.sum()
    if int(count) < labels.numel():
        kept = keep.nonzero().squeeze(1)
        hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= weight.shape[0]):
        raise ValueError(
            f"labels must be in [0, {weight.shape[0]}) or {ignore_index}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = max(1, chunk_elements // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        loss_sum = _LinearCrossEntropy.apply(hidden, weight, labels, z_loss, rows)
    return loss_sum, count


def chunk_starts(count: int, rows: int) -> range:
    """Where chunks of so many tokens begin.

    Example:
        >>> list(chunk_starts(5, 2))
        [0, 2, 4]
    """
    return range(0, count, rows)


def accumulate_gradients(
    grad_logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Write what the logits of a chunk leave to its hidden states, and add what they leave to the head, in place.

    Equals ``grad_hidden[:] = grad_logits @ weight`` and ``grad_weight += grad_logits.T @ hidden``.

    Args:
        grad_logits: Gradient of the chunk's logits, shape ``(N, V)``, in the dtype of the product.
        hidden: Its hidden states, shape ``(N, C)``.
        weight: Weight of the head, shape ``(V, C)``.
        grad_hidden: Gradient of these hidden states, shape ``(N, C)``; None where nobody wants it.
        grad_weight: Gradient of the head so far, shape ``(V, C)``, in float32 at least; None where nobody wants it.
    """
    if grad_hidden is not None:
        torch.mm(grad_logits, weight, out=grad_hidden)
    if grad_weight is not None:
        if hidden.dtype == grad_weight.dtype:
            grad_weight.addmm_(grad_logits.T, hidden)
        else:
            grad_weight += grad_logits.T @ hidden


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float, rows: int
    ) -> torch.Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants_weight else None
        loss_sum = hidden.new_zeros((), dtype=accumulate)
        for start in chunk_starts(labels.numel(), rows):
            h, label = hidden[start : start + rows], labels[start : start + rows, None]
            logits = (h @ weight.T).to(accumulate)
            picked = logits.gather(1, label)
            # One pass over the exponentials serves the loss and the gradient; logits become the softmax.
            top = logits.amax(dim=1, keepdim=True)
            total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
            lse = total.log() + top
            loss_sum += (lse - picked).sum() + z_loss * lse.square().sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax * (1 + 2 z lse) - onehot.
            grad_logits = logits.mul_((1 + 2 * z_loss * lse) / total)
            grad_logits.scatter_add_(1, label, grad_logits.new_full((1, 1), -1.0).expand_as(label))
            grad_logits = grad_logits.to(hidden.dtype)
            out = None if grad_hidden is None else grad_hidden[start : start + rows]
            accumulate_gradients(grad_logits, h, weight, out, grad_weight)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        grad_hidden, grad_weight = (
            None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None
