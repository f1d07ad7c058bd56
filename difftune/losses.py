"""Divergences between the next-token distributions of a teacher and a student, without the logits of all tokens.

The student is given as hidden states and head. The teacher is either the same (:class:`TeacherStates`) or what was
stored of it (:class:`TopK`). Tokens are taken a chunk at a time, over the whole vocabulary, as in
:mod:`difftune.ops.linear_cross_entropy`: both logits, the divergence, and at once the gradients with respect to the
student's hidden states and head. No gradient reaches the teacher.

With temperature ``T`` both logits are divided by ``T`` and the divergence is multiplied by ``T^2``: the gradient of the
softened divergence shrinks as ``1 / T^2``, so that without the factor the temperature would change the weight of the
divergence against the cross entropy (Hinton et al., arXiv:1503.02531, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from difftune.ops.linear_cross_entropy import CHUNK_ELEMENTS, accumulate_gradients, chunk_starts


class TeacherStates(NamedTuple):
    """A teacher that was run: its distribution is ``softmax(hidden @ weight.T)``."""

    hidden: torch.Tensor
    """Last hidden states, shape ``(..., D)``, one for each of the student's."""
    weight: torch.Tensor
    """Weight of its head, shape ``(V, D)``, over the student's vocabulary."""


class TopK(NamedTuple):
    """What was stored of a teacher: its ``k`` most likely tokens, and all others as one bucket.

    Rows belong to the label tokens alone, in their order, ``N`` in all. The divergence is that between the two
    distributions over ``k + 1`` buckets: the tokens one by one, and the sum of the rest. It is a lower bound of the
    full one, equal to it for ``k = V``, and does not say how the student should divide the tail.
    """

    indices: torch.Tensor
    """Distinct tokens, integer, shape ``(N, k)``."""
    log_probs: torch.Tensor
    """Their log-probabilities in nats, shape ``(N, k)``, at the temperature of the loss."""
    log_tail: torch.Tensor
    """Log of the probability of all other tokens, shape ``(N,)``; ``-inf`` for none."""


# From log-probabilities of teacher and student to the divergence and its gradient with respect to the latter.
_Formula = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """``KL(teacher, student) = sum p (log p - log q)``: the student has to cover all that the teacher does.

    Args:
        log_p: The teacher's log-probabilities, shape ``(..., V)``; ``-inf`` where the probability is 0.
        log_q: The student's.
        beta: Not used.

    Returns:
        The divergence in nats, shape ``(...)``, and its gradient with respect to ``log_q`` (the entries taken as
        independent), shape ``(..., V)``.

    Example:
        >>> value, _ = forward_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
        >>> round(value.item(), 4)
        0.1438
    """
    p = log_p.exp()
    return _weighted(p, log_p - log_q).sum(-1), p.neg_()


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """``KL(student, teacher) = sum q (log q - log p)``: the student may keep to what the teacher finds likely.

    Args:
        log_p: The teacher's log-probabilities, shape ``(..., V)``.
        log_q: The student's.
        beta: Not used.

    Returns:
        As :func:`forward_kl`; infinite where the teacher has probability 0 and the student has not.

    Source:
        Gu et al., "MiniLLM", arXiv:2306.08543, Eq. (2), taken token by token.
    """
    terms = _weighted(log_q.exp(), log_q - log_p)
    # The derivative has a summand q besides, which the softmax takes out again.
    return terms.sum(-1), terms


def generalized_jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """``beta KL(p, m) + (1 - beta) KL(q, m)`` with ``m = beta p + (1 - beta) q``: bounded, and between the two.

    Over ``beta`` it tends to the forward KL for ``beta -> 0``, over ``1 - beta`` to the reverse KL for ``beta -> 1``.

    Args:
        log_p: The teacher's log-probabilities, shape ``(..., V)``.
        log_q: The student's.
        beta: Weight of the teacher in the mixture, above 0 and below 1.

    Returns:
        As :func:`forward_kl`.

    Source:
        Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649, Eq. (1).
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    value = beta * _weighted(log_p.exp(), log_p - log_m).sum(-1)
    terms = _weighted(log_q.exp(), log_q - log_m).mul_(1 - beta)
    # The derivatives of m cancel, up to summands that the softmax takes out again.
    return value + terms.sum(-1), terms


DIVERGENCES: dict[str, _Formula] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
}
"""The divergences by the name that a recipe gives them."""


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    teacher: TeacherStates | TopK,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    ignore_index: int = -100,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the label tokens of ``T^2 D(teacher, student)``, and how many label tokens there are.

    Equals, with ``log_p`` and ``log_q`` the log-softmax of ``logits / T``,
    ``T**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")`` for ``forward_kl``. Softmax and divergence are
    computed in float32 at least.

    Args:
        hidden: The student's last hidden states, shape ``(..., C)``.
        weight: Weight of its head, shape ``(V, C)``.
        labels: What each hidden state predicts (already shifted), shape ``(...)``; only whether it is ``ignore_index``
            is looked at.
        teacher: Its hidden states and head, or its stored top ``k``.
        divergence: A name of :data:`DIVERGENCES`.
        temperature: ``T``, above 0. That of stored probabilities is fixed when they are made and has to be given here.
        beta: Of ``generalized_jsd``, above 0 and below 1.
        ignore_index: Label of tokens that do not count.
        chunk_elements: Logits held at once, of teacher and student each.

    Returns:
        The summed divergence in nats (float32, or float64 for float64 inputs), shape ``()``, and the number of label
        tokens (int64), shape ``()``.

    Raises:
        ValueError: If shapes do not fit together, or a setting is out of range.

    Example:
        >>> teacher = TeacherStates(torch.ones(2, 3), torch.eye(3))
        >>> loss_sum, count = linear_divergence(torch.zeros(2, 3), torch.eye(3), torch.tensor([1, -100]), teacher)
        >>> round(loss_sum.item(), 4), count.item()
        (0.0, 1)
    """
    _check_settings(divergence, temperature, beta)
    _check_shapes(hidden, weight, labels, teacher)
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    keep = labels != ignore_index
    count = keep.sum()
    kept = keep.nonzero().squeeze(1)
    states = isinstance(teacher, TeacherStates)
    if len(kept) < labels.numel():
        hidden = hidden.index_select(0, kept)
    if isinstance(teacher, TeacherStates):
        targets = [teacher.hidden.detach().flatten(0, -2).index_select(0, kept), teacher.weight.detach()]
    else:
        if len(teacher.indices) != len(kept):
            raise ValueError(
                f"the stored teacher has {len(teacher.indices)} rows for {len(kept)} label tokens: it must have one a "
                "label token, in their order"
            )
        targets = [part.detach() for part in teacher]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        targets = [part.to(dtype) for part in targets] if states else targets
    rows = max(1, chunk_elements // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        loss_sum = _LinearDivergence.apply(
            hidden, weight, DIVERGENCES[divergence], temperature, beta, rows, states, *targets
        )
    return loss_sum, count


def top_k(hidden: torch.Tensor, weight: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The ``k`` most likely tokens of ``softmax(hidden @ weight.T / T)``, and the mass of the others.

    Args:
        hidden: Hidden states, shape ``(N, C)``.
        weight: Weight of the head, shape ``(V, C)``.
        k: How many, 1 to ``V``.
        temperature: ``T``, above 0.

    Returns:
        Most likely first; float32 (float64 for float64 inputs). The tail is summed from its own terms, not as what is
        left of 1, so that a small one is exact.

    Raises:
        ValueError: If ``k`` is out of range.
    """
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be 1 to the {weight.shape[0]} tokens of the vocabulary, got {k}")
    logits = hidden @ weight.T
    log_probs = _log_softmax(logits, temperature)
    top = log_probs.topk(k, dim=-1)
    tail = log_probs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return TopK(top.indices, top.values, tail)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        formula: _Formula,
        temperature: float,
        beta: float,
        rows: int,
        states: bool,
        *targets: torch.Tensor,
    ) -> torch.Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants_weight else None
        loss_sum = hidden.new_zeros((), dtype=accumulate)
        for start in chunk_starts(len(hidden), rows):
            chunk = slice(start, start + rows)
            h = hidden[chunk]
            log_q = _log_softmax(h @ weight.T, temperature)
            if states:
                log_p = _log_softmax(targets[0][chunk] @ targets[1].T, temperature).to(accumulate)
                value, grad = formula(log_p, log_q, beta)
            else:
                value, grad = _bucketed(formula, beta, log_q, *(part[chunk] for part in targets))
            loss_sum += temperature**2 * value.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # Through log-softmax: d/dz = g - softmax(z) sum(g). T^2 of the loss over T of the logits leaves T.
            total = grad.sum(-1, keepdim=True)
            grad_logits = grad.sub_(log_q.exp_().mul_(total)).mul_(temperature).to(hidden.dtype)
            out = None if grad_hidden is None else grad_hidden[chunk]
            accumulate_gradients(grad_logits, h, weight, out, grad_weight)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = (None if part is None else part * grad.to(part.dtype) for part in ctx.saved_tensors)
        return (*saved, *[None] * (len(ctx.needs_input_grad) - 2))


def _bucketed(
    formula: _Formula,
    beta: float,
    log_q: torch.Tensor,
    indices: torch.Tensor,
    log_probs: torch.Tensor,
    log_tail: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A divergence over the stored tokens and one bucket for the rest; its gradient for every token."""
    indices = indices.long()
    rest = log_q.scatter(-1, indices, -torch.inf)
    rest_log_q = rest.logsumexp(-1, keepdim=True)
    log_p = torch.cat([log_probs.to(log_q), log_tail[:, None].to(log_q)], dim=-1)
    value, grad = formula(log_p, torch.cat([log_q.gather(-1, indices), rest_log_q], dim=-1), beta)
    # The tail's gradient falls on its tokens as the student divides it; an empty tail has none to divide.
    inside = torch.where(rest_log_q.isfinite(), rest - rest_log_q, -torch.inf).exp_()
    return value, inside.mul_(grad[:, -1:]).scatter(-1, indices, grad[:, :-1])


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide if temperature == 1 else wide / temperature, dim=-1)


def _weighted(p: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """``p * difference``, 0 where ``p`` is 0, whatever the other is."""
    return difference.mul_(p).masked_fill_(p == 0, 0)


def _check_settings(divergence: str, temperature: float, beta: float) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}: choose one of {', '.join(DIVERGENCES)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a number above 0, got {temperature}")
    if not 0 < beta < 1:
        raise ValueError(f"beta must be above 0 and below 1, got {beta}; the limits are forward_kl and reverse_kl")


def _check_shapes(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, teacher: TeacherStates | TopK
) -> None:
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (..., C) and weight (V, C) must agree, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    if isinstance(teacher, TopK):
        k = teacher.indices.shape[-1]
        if teacher.log_probs.shape != teacher.indices.shape or teacher.log_tail.shape != teacher.indices.shape[:1]:
            raise ValueError("indices and log_probs of a stored teacher must be (N, k), log_tail (N,)")
        if not 1 <= k <= weight.shape[0]:
            raise ValueError(f"a stored teacher of {k} tokens does not fit the vocabulary of {weight.shape[0]}")
        return
    if teacher.hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"teacher and student must see the same tokens: hidden states {tuple(teacher.hidden.shape)} and "
            f"{tuple(hidden.shape)}"
        )
    if teacher.weight.shape != (weight.shape[0], teacher.hidden.shape[-1]):
        raise ValueError(
            f"the teacher's head must have shape {(weight.shape[0], teacher.hidden.shape[-1])}, the student's "
            f"vocabulary by the teacher's width, got {tuple(teacher.weight.shape)}"
        )
