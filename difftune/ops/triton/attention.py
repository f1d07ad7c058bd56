"""The kernels as operators of torch, whole to torch.compile, FSDP and activation checkpointing; and their entry.

``difftune::diff_attention_forward`` and ``difftune::diff_attention_backward`` are what a policy of selective activation
checkpointing names.
"""

from __future__ import annotations

from typing import Any

import torch

from difftune.ops.documents import Documents
from difftune.ops.triton.cached_attention import diff_attention_decode, is_decoding
from difftune.ops.triton.coverage import compute_dtype
from difftune.ops.triton.launch import Problem

_ARGUMENTS = """
    Tensor q, Tensor k, Tensor v, Tensor lam, Tensor? norm_weight, Tensor? cu_seqlens, Tensor? key_padding_mask,
    int max_length, bool causal, float scale, float norm_eps
"""


@torch.library.custom_op(
    "difftune::diff_attention_forward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor out, Tensor raw, Tensor negative, Tensor lse)",
)
def diff_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    max_length: int,
    causal: bool,
    scale: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward kernel. Arguments as `difftune.ops.diff_attention`, checked by :func:`triton_diff_attention`.

    Returns:
        Output ``(B, T, H, E)``; and what the backward needs: output before the norm, likewise, empty without a norm;
        output of the negative map, likewise; log2-sum-exp2 of both maps, ``(2, B, H, T)``, float32.
    """
    from difftune.ops.triton.forward import forward

    problem = Problem(q, k, v, lam, norm_weight, cu_seqlens, key_padding_mask, max_length, causal, scale, norm_eps)
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(q):
        return forward(problem)


@diff_attention_forward.register_fake
def _forward_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: Any, norm_weight: Any, *_: Any) -> Any:
    B, T, H = q.shape[:3]
    out = q.new_empty(B, T, H, v.shape[3])
    raw = q.new_empty(0) if norm_weight is None else torch.empty_like(out)
    return out, raw, torch.empty_like(out), q.new_empty(2, B, H, T, dtype=torch.float32)


@torch.library.custom_op(
    "difftune::diff_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor raw, Tensor negative, Tensor lse, {_ARGUMENTS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dlam, Tensor dweight)",
)
def diff_attention_backward(
    grad: torch.Tensor,
    raw: torch.Tensor,
    negative: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    max_length: int,
    causal: bool,
    scale: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward kernels: gradients of q, k, v, lam and the norm's weight (empty without a norm); deterministic."""
    from difftune.ops.triton.backward import backward

    problem = Problem(q, k, v, lam, norm_weight, cu_seqlens, key_padding_mask, max_length, causal, scale, norm_eps)
    with torch.cuda.device_of(q):
        return backward(grad, raw, negative, lse, problem)


@diff_attention_backward.register_fake
def _backward_shapes(
    grad: Any, raw: Any, negative: Any, lse: Any, q: Any, k: Any, v: Any, lam: Any, norm_weight: Any, *_: Any
) -> Any:
    tensors = (q, k, v, lam, q.new_empty(0) if norm_weight is None else norm_weight)
    return tuple(x.new_empty(x.shape) for x in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    out, raw, negative, lse = output
    ctx.options = inputs[7:]
    # Without a norm the output is what the norm would have received, and lives on anyway: the projection saves it.
    ctx.save_for_backward(out if inputs[4] is None else raw, negative, lse, *inputs[:7])


def _differentiate(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    norm_weight = saved[7]
    dq, dk, dv, dlam, dweight = torch.ops.difftune.diff_attention_backward(grad, *saved, *ctx.options)
    return dq, dk, dv, dlam, None if norm_weight is None else dweight, None, None, None, None, None, None


diff_attention_forward.register_autograd(_differentiate, setup_context=_save)


def triton_diff_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    *,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
    documents: Documents | None,
    scale: float,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    """Differential attention in one kernel; arguments and result as :func:`difftune.ops.diff_attention`.

    The caller has asked `difftune.ops.triton.coverage.why_not`.
    """
    q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
    if is_decoding(q, k, v, lam, norm_weight, documents):
        return diff_attention_decode(
            q,
            k,
            v,
            lam,
            causal=causal,
            key_padding_mask=key_padding_mask,
            scale=scale,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
        )
    cu_seqlens, max_length = (None, 0) if documents is None else (documents.cu_seqlens, documents.max_length)
    out, *_ = torch.ops.difftune.diff_attention_forward(
        q, k, v, lam, norm_weight, cu_seqlens, key_padding_mask, max_length, causal, scale, norm_eps
    )
    return out
