"""The public attentions: checks the arguments, picks a backend, composes the two maps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

from difftune.ops import flash, reference
from difftune.ops.documents import Documents
from difftune.ops.rms_norm import rms_norm
from difftune.ops.sdpa import few_queries, forms_difference_first, sdpa_attention
from difftune.ops.shapes import check_diff_shapes, check_norm_weight, check_softmax_shapes, check_visibility

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "sdpa", "flash", "triton")


class SoftmaxAttention(Protocol):
    """What a composed backend offers: one softmax attention over all heads."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        key_padding_mask: torch.Tensor | None,
        documents: Documents | None,
        scale: float,
    ) -> torch.Tensor:
        """``softmax(q k^T * scale) v``, shape ``(B, T, N, E)``."""


def diff_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    *,
    causal: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Documents | None = None,
    scale: float | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    backend: str = "auto",
) -> torch.Tensor:
    """Differential attention: the difference of two softmax maps, applied to the values, and normalised if asked.

    ``out = (softmax(q_1 k_1^T * scale) - lam * softmax(q_2 k_2^T * scale)) v``, per differential head. A query
    that sees no key returns 0. With ``norm_weight`` the result is ``rms_norm(out, norm_weight, norm_eps)``: V1's
    sublayer norm, which one backend fuses.

    Args:
        q: Queries, shape ``(B, T, H, 2, D)``; the axis of size 2 is the pair (positive, negative).
        k: Keys, shape ``(B, S, G, 2, D)`` with H a multiple of G; ``(B, S, G, 1, D)`` when the pair shares its
            keys (V2).
        v: Values, shape ``(B, S, G, E)``; V1 has ``E = 2 * D``, V2 ``E = D``.
        lam: Weight of the negative map, dimensionless: shape ``()`` a layer, ``(H,)`` a head, ``(B, T, H)`` a token
            and head. Cast to the dtype of ``q`` after the maps; ``triton`` takes it in float32.
        causal: Query t sees keys ``s <= t + S - T`` (aligned bottom right).
        key_padding_mask: Bool, shape ``(B, S)``, True where a key is real. Default: all real.
        cu_seqlens: Cumulative lengths of packed documents over the flattened ``B * T`` tokens, int, shape
            ``(n + 1,)``, or `Documents` prepared from it once a batch. Needs ``T == S``.
        scale: Multiplies the logits. Default: ``D ** -0.5``.
        norm_weight: Weight of the norm over each head's output, shape ``(E,)``; a constant such as
            ``1 - lambda_init`` belongs into it. Default None: no norm.
        norm_eps: Added to the mean square of that norm.
        backend: ``reference`` (any dtype, quadratic memory), ``sdpa`` (torch's fused attention), ``flash``
            (flash-attn, CUDA), ``triton`` (one kernel, CUDA), or ``auto``. A named backend is never replaced by
            another.

    Returns:
        Shape ``(B, T, H, E)``, dtype of ``q``.

    Raises:
        ValueError: If shapes, dtypes or masks do not fit together, the backend is unknown, or it is ``triton`` and
            its kernels do not cover device, dtype or shape.
        ImportError: If ``backend="flash"`` and flash-attn is not installed, or ``backend="triton"`` and Triton is not.

    Source:
        V1: Ye et al., "Differential Transformer", arXiv:2410.05258, Eq. (1) and (3). V2: "Differential Transformer V2",
        Microsoft, January 2026.

    Example:
        >>> q, k, v = torch.randn(1, 5, 4, 2, 8), torch.randn(1, 5, 2, 2, 8), torch.randn(1, 5, 2, 16)
        >>> diff_attention(q, k, v, torch.tensor(0.2)).shape
        torch.Size([1, 5, 4, 16])
    """
    check_diff_shapes(q, k, v, lam)
    check_norm_weight(norm_weight, v)
    options = _options(q, k, causal, key_padding_mask, cu_seqlens, scale)
    backend = choose_backend(backend, q, lambda: _outside_triton(q, k, v, options["scale"], backend == "auto"))
    if backend == "triton":
        from difftune.ops.triton.attention import triton_diff_attention

        return triton_diff_attention(q, k, v, lam, norm_weight=norm_weight, norm_eps=norm_eps, **options)
    if backend == "reference":
        out = reference.reference_diff_attention(q, k, v, lam, **options)
    elif backend == "sdpa" and forms_difference_first(q, k, v, lam, options["documents"]):
        out = few_queries(q, k, v, lam, **options)
    else:
        out = _composed(_attention_of(backend), q, k, v, lam, **options)
    return out if norm_weight is None else rms_norm(out, norm_weight.to(out.dtype), norm_eps)


def _composed(
    attend: SoftmaxAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor, **options: Any
) -> torch.Tensor:
    if k.shape[3] == 1:
        # Both maps share keys and values: one call in which they are two more query heads of the same group.
        both = attend(q.flatten(2, 3), k.squeeze(3), v, **options).unflatten(2, (-1, 2))
        positive, negative = both.unbind(3)
    else:
        positive, negative = (attend(q[..., p, :], k[..., p, :], v, **options) for p in (0, 1))
    return torch.addcmul(positive, negative, -lam.to(positive.dtype)[..., None])


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Documents | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Plain attention, the baseline: ``out = softmax(q k^T * scale) v``.

    Args:
        q: Queries, shape ``(B, T, N, D)``.
        k: Keys, shape ``(B, S, M, D)`` with N a multiple of M.
        v: Values, shape ``(B, S, M, E)``.
        causal: As in :func:`diff_attention`, and so the other options.
        key_padding_mask: Bool, shape ``(B, S)``, True where a key is real.
        cu_seqlens: Boundaries of packed documents.
        scale: Multiplies the logits. Default: ``D ** -0.5``.
        backend: ``auto``, ``reference``, ``sdpa`` or ``flash``.

    Returns:
        Shape ``(B, T, N, E)``, dtype of ``q``.

    Raises:
        ValueError: If shapes, dtypes or masks do not fit together, or the backend is unknown.
        ImportError: If ``backend="flash"`` and flash-attn is not installed.

    Source:
        Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, Eq. (1).

    Example:
        >>> q, kv = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
        >>> softmax_attention(q, kv, kv).shape
        torch.Size([1, 5, 4, 8])
    """
    check_softmax_shapes(q, k, v)
    options = _options(q, k, causal, key_padding_mask, cu_seqlens, scale)
    backend = choose_backend(backend, q, lambda: "softmax attention: its kernels compute differential attention")
    if backend == "reference":
        return reference.reference_softmax_attention(q, k, v, **options)
    return _attention_of(backend)(q, k, v, **options)


def choose_backend(backend: str, q: torch.Tensor, outside_triton: Callable[[], str | None]) -> str:
    """The backend that ``backend`` stands for with queries like ``q``; the choice of ``auto`` is logged once.

    ``outside_triton`` says what the Triton kernels do not cover, or None; it is asked only where they may be chosen.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}, choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        reason = outside_triton()
        if reason is not None:
            raise ValueError(f"backend='triton' does not cover {reason}; choose backend='sdpa'")
    if backend != "auto":
        return backend
    # Not on the CPU, where Triton's interpreter may be on: it is for tests.
    reason = outside_triton() if q.is_cuda else ""
    chosen = "triton" if reason is None else _best_composed(q)
    _log_choice(chosen, q.device.type, str(q.dtype).removeprefix("torch."), f"; not triton: {reason}" if reason else "")
    return chosen


def _best_composed(q: torch.Tensor) -> str:
    return "flash" if flash.supports(q) and flash.is_available() else "sdpa"


def _outside_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, auto: bool) -> str | None:
    # Imported here, so that the package neither needs Triton nor waits for it.
    try:
        from difftune.ops.triton import coverage
    except ImportError as error:  # the copy of this file that travels with a model has no kernels
        if auto:
            return str(error)
        raise
    if not coverage.INSTALLED:
        if auto:
            return "Triton is not installed"
        raise ImportError(f"backend='triton' needs Triton, which is not installed: {coverage.INSTALL}")
    return coverage.why_not(q, k, v, scale, auto=auto)


@cache
def _log_choice(chosen: str, device: str, dtype: str, remark: str) -> None:
    logger.info("attention backend: %s (auto, %s, %s%s)", chosen, device, dtype, remark)


def _attention_of(backend: str) -> SoftmaxAttention:
    return flash.flash_attention if backend == "flash" else sdpa_attention


def _options(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | Documents | None,
    scale: float | None,
) -> dict[str, Any]:
    documents = Documents(cu_seqlens) if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    check_visibility(q.shape[0], q.shape[1], k.shape[1], causal, key_padding_mask, documents)
    return {
        "causal": causal,
        "key_padding_mask": key_padding_mask,
        "documents": documents,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
    }
