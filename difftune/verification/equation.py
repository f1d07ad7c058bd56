"""A backend of attention against the equation in float64: output and every gradient, within the budget.

Budgets scale with the largest sum of absolute values, wherever terms cancel: in the difference of the maps, in dS, and
through the norm of a head whose two maps nearly cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from difftune.ops import Documents, diff_attention, softmax_attention
from difftune.ops.reference import reference_maps
from difftune.verification.budget import Deviation, deviation

_NAMES = ("out", "dq", "dk", "dv", "dlam", "dweight")


def make_inputs(
    shape: tuple[int, ...], kind: str, lam: str, dtype: torch.dtype, norm: bool = False
) -> list[torch.Tensor]:
    """Random q, k, v, lam, and the norm's weight if asked, on the CPU.

    Args:
        shape: ``(B, T, S, H, G, D)``.
        kind: ``v1`` (two keys a pair, values of ``2D``) or ``v2`` (one key, values of ``D``).
        lam: One a ``layer``, ``head`` or ``token`` (and head).
        dtype: Of all.
        norm: Whether V1's sublayer norm comes with it.
    """
    B, T, S, H, G, D = shape
    pair, E = (2, 2 * D) if kind == "v1" else (1, D)
    q, k, v = torch.randn(B, T, H, 2, D), torch.randn(B, S, G, pair, D), torch.randn(B, S, G, E)
    lam_shape = {"layer": (), "head": (H,), "token": (B, T, H)}[lam]
    inputs = [x.to(dtype) for x in (q, k, v)] + [torch.rand(lam_shape).to(dtype)]
    return [*inputs, torch.randn(E).to(dtype)] if norm else inputs


def sums_of_absolute_terms(
    maps: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: Any,
    cotangent: torch.Tensor,
) -> dict[str, float]:
    """Scales of the gradients whose terms cancel, for heads ``q (B, T, H, D)``: dq, dk, and of the map's weight.

    ``dS = P * (dP - sum(P * dP))``: a row that sees one key has dS = 0 as a difference of two equal numbers.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    dP = torch.einsum("bthe,bshe->bhts", cotangent, v).abs()
    terms = weights * maps * (dP + (maps * dP).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq = torch.einsum("bhts,bshd->bthd", terms, k.abs())
    dk = torch.einsum("bhts,bthd->bshd", terms, q.abs()).unflatten(2, (-1, groups)).sum(3)
    return {"dq": dq.max().item(), "dk": dk.max().item(), "dlam": (maps * dP).sum().item()}


def scales_of(inputs: list[torch.Tensor], cotangent: torch.Tensor, masks: dict[str, Any]) -> dict[str, float]:
    """The largest sum of absolute terms in the output and in each gradient; ``inputs`` in float64."""
    q, k, v, lam = inputs[:4]
    maps = reference_maps(q, k, **_of_maps(masks))
    groups = q.shape[2] // v.shape[2]
    both = maps[0] + lam.max() * maps[1]
    out = torch.einsum("bhts,bshe->bthe", both, v.abs().repeat_interleave(groups, 2))
    scales = {}
    if len(inputs) == 5:
        weight, eps = inputs[4], 1e-5
        raw = diff_attention(q, k, v, lam, backend="reference", **masks)
        rstd = (raw.square().mean(-1, keepdim=True) + eps).rsqrt()
        # By how much the norm magnifies a relative error of the terms of its input.
        magnified = 1 + rstd * out.amax(-1, keepdim=True)
        unit, grad = (raw * rstd).abs(), (cotangent * weight).abs()
        scales["dweight"] = (cotangent.abs() * unit * magnified).sum((0, 1, 2)).max().item()
        cotangent = rstd * (grad + unit * (grad * unit).mean(-1, keepdim=True)) * magnified
        out, v = out * rstd * weight.abs(), v.abs()
    of_pair = [
        sums_of_absolute_terms(maps[p], q[..., p, :], k[..., p % k.shape[3], :], v, weight, cotangent)
        for p, weight in ((0, 1.0), (1, lam.max()))
    ]
    dv = torch.einsum("bhts,bthe->bshe", both, cotangent.abs()).unflatten(2, (-1, groups)).sum(3)
    return {
        **scales,
        **{name: max(of_map[name] for of_map in of_pair) for name in ("dq", "dk")},
        "dlam": of_pair[1]["dlam"],
        "out": out.max().item(),
        "dv": dv.max().item(),
    }


def outputs_and_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], cotangent: torch.Tensor
) -> list[torch.Tensor]:
    """``[function(*inputs), gradient of each input]`` under ``cotangent``, on fresh leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    return [out.detach(), *gradients]


def diff_deviations(
    inputs: list[torch.Tensor], backend: str, device: str | torch.device = "cpu", **masks: Any
) -> list[Deviation]:
    """Output and every gradient of differential attention against the equation, under a random cotangent.

    Args:
        inputs: As :func:`make_inputs` makes them; truth and plain are computed on the CPU, where they are.
        backend: What is compared.
        device: Where it runs.
        masks: ``causal``, ``key_padding_mask``, ``cu_seqlens`` as of `difftune.ops.diff_attention`.

    Returns:
        Of ``out``, ``dq``, ``dk``, ``dv``, ``dlam``, and ``dweight`` where there is a norm.
    """

    def attend(name: str, there: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, lam, *norm = tensors
        return diff_attention(q, k, v, lam, norm_weight=norm[0] if norm else None, backend=name, **there)

    cotangent = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1]).to(inputs[0].dtype)
    scales = scales_of([x.double() for x in inputs], cotangent.double(), masks)
    return _deviations(attend, inputs, cotangent, scales, backend, device, masks)


def softmax_deviations(
    inputs: list[torch.Tensor], backend: str, device: str | torch.device = "cpu", **masks: Any
) -> list[Deviation]:
    """As :func:`diff_deviations`, of plain attention.

    Args:
        inputs: Queries ``(B, T, N, D)``, keys ``(B, S, M, D)`` and values ``(B, S, M, E)``.
        backend: What is compared.
        device: Where it runs.
        masks: As there.

    Returns:
        Of ``out``, ``dq``, ``dk``, ``dv``.
    """

    def attend(name: str, there: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
        return softmax_attention(*tensors, backend=name, **there)

    cotangent = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1]).to(inputs[0].dtype)
    q, k, v = (x.double() for x in inputs)
    maps, _ = reference_maps(q[..., None, :].expand(-1, -1, -1, 2, -1), k[..., None, :], **_of_maps(masks))
    scales = sums_of_absolute_terms(maps, q, k, v, 1.0, cotangent.double())
    return _deviations(attend, inputs, cotangent, scales, backend, device, masks)


def _deviations(
    attend: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    cotangent: torch.Tensor,
    scales: dict[str, float],
    backend: str,
    device: str | torch.device,
    masks: dict[str, Any],
) -> list[Deviation]:
    def run(tensors: list[torch.Tensor], name: str, where: str | torch.device) -> list[torch.Tensor]:
        there = {n: m.to(where) if isinstance(m, torch.Tensor) else m for n, m in masks.items()}
        moved = [x.to(where) for x in tensors]
        return [x.cpu() for x in outputs_and_gradients(partial(attend, name, there), moved, cotangent.to(where))]

    truth = run([x.double() for x in inputs], "reference", "cpu")
    plain, actual = run(inputs, "reference", "cpu"), run(inputs, backend, device)
    results = zip(_NAMES[: len(inputs) + 1], actual, plain, truth, strict=True)
    return [deviation(name, a, p, t, scales.get(name)) for name, a, p, t in results]


def _of_maps(masks: dict[str, Any]) -> dict[str, Any]:
    """The masks as the function that returns the maps takes them."""
    others = {name: mask for name, mask in masks.items() if name != "cu_seqlens"}
    return {**others, "documents": Documents(masks["cu_seqlens"])} if "cu_seqlens" in masks else others
