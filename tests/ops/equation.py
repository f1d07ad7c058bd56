"""A backend of differential attention against the equation in float64: output and every gradient, within the budget.

Budgets scale with the largest sum of absolute values, wherever terms cancel: in the difference of the maps, in dS, and
through the norm of a head whose two maps nearly cancel.
"""

from typing import Any

import torch

from difftune.ops import Documents, diff_attention
from difftune.ops.reference import reference_maps
from tests.tolerances import assert_within_budget, outputs_and_gradients


def make_inputs(
    shape: tuple[int, ...], kind: str, lam: str, dtype: torch.dtype, norm: bool = False
) -> list[torch.Tensor]:
    """q, k, v, lam, and the norm's weight if asked, for ``(B, T, S, H, G, D)``."""
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
    documents = {"documents": Documents(masks["cu_seqlens"])} if "cu_seqlens" in masks else {}
    maps = reference_maps(q, k, **{n: m for n, m in masks.items() if n != "cu_seqlens"}, **documents)
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


def assert_equals_the_equation(inputs: list[torch.Tensor], backend: str, device: str = "cpu", **masks: Any) -> None:
    """Output and every gradient of a backend against the equation in float64, under a random cotangent.

    ``device`` is where the backend runs; truth and plain are computed on the CPU.
    """

    def run(tensors: list[torch.Tensor], name: str, device: str) -> list[torch.Tensor]:
        there = {n: m.to(device) if isinstance(m, torch.Tensor) else m for n, m in masks.items()}

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor, *norm: torch.Tensor) -> Any:
            return diff_attention(q, k, v, lam, norm_weight=norm[0] if norm else None, backend=name, **there)

        results = outputs_and_gradients(attend, [x.to(device) for x in tensors], cotangent.to(device))
        return [x.cpu() for x in results]

    exact = [x.double() for x in inputs]
    cotangent = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1]).to(inputs[0].dtype)
    truth, plain = run(exact, "reference", "cpu"), run(inputs, "reference", "cpu")
    actual = run(inputs, backend, device)
    scales = scales_of(exact, cotangent.double(), masks)
    names = ["out", "dq", "dk", "dv", "dlam", "dweight"]
    for name, a, p, t in zip(names[: len(inputs) + 1], actual, plain, truth, strict=True):
        assert_within_budget(name, a, p, t, scales[name])
