"""Causal attention of the last T of S > T tokens, in memory that is linear in both.

torch aligns its own causal mask with the first key, not the last, so ``is_causal`` does not serve, and a dense mask of
T x S is what this is to spare. On the CPU the keys are cut in two: all queries see all of those before the first query,
and the rest is causal as torch means it. Each part comes with the logarithm of the sums of its exponentials, by which
the two are put together; the same sums of the whole row make the backward pass of each part that of its share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_aten = torch.ops.aten


def last_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """``softmax(q k^T * scale) v`` on the CPU, where query t sees keys ``s <= t + S - T``.

    Args:
        q: Queries, shape ``(B, T, N, D)``.
        k: Keys, shape ``(B, S, M, D)``, N a multiple of M, S above T.
        v: Values, shape ``(B, S, M, E)``.
        scale: Multiplies the logits.

    Returns:
        Shape ``(B, T, N, E)``, dtype of ``q``.

    Source:
        The sums of a part: Dao, "FlashAttention-2", arXiv:2307.08691, section 3.1.
    """
    # The kernel has no groups, and one width for all three.
    width, groups = max(q.shape[-1], v.shape[-1]), q.shape[2] // k.shape[2]
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    heads[1:] = [x.repeat_interleave(groups, 1) if groups > 1 else x for x in heads[1:]]
    padded = [torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in heads]
    return _LastQueries.apply(*padded, scale)[..., : v.shape[-1]].transpose(1, 2)


class _LastQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        T, before = q.shape[2], k.shape[2] - q.shape[2]
        outs, sums = [], []
        for part, causal in ((slice(before), False), (slice(before, None), True)):
            out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
                q, k[:, :, part], v[:, :, part], 0.0, causal, scale=scale
            )
            outs.append(out)
            sums.append(lse)
        lse = torch.logaddexp(*sums)
        shares = [(part - lse)[..., None].exp() for part in sums]
        out = (outs[0] * shares[0] + outs[1] * shares[1]).to(q.dtype)
        assert lse.shape[2] == T
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.before = scale, before
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        parts = [
            _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k[:, :, part], v[:, :, part], out, lse, 0.0, causal, scale=ctx.scale
            )
            for part, causal in ((slice(ctx.before), False), (slice(ctx.before, None), True))
        ]
        (dq, *first), (more_dq, *second) = parts
        dk, dv = (torch.cat(pair, dim=2) for pair in zip(first, second, strict=True))
        return dq + more_dq, dk, dv, None


def in_blocks(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """The same on any device: ``attend`` for some rows at a time, with the mask that it makes of them alone.

    A backward pass would keep the masks of all blocks; it makes them, and the block's output, anew.

    Args:
        attend: Causal attention of few queries at the end of their keys.
        q: As of :func:`last_queries`.
        k: As well.
        v: As well.
        rows: Queries of a block.
    """
    (T, S), outputs = (q.shape[1], k.shape[1]), []
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    for start in range(0, T, rows):
        end = S - T + min(start + rows, T)
        inputs = (q[:, start : start + rows], k[:, :end], v[:, :end])
        outputs.append(checkpoint(attend, *inputs, use_reentrant=False) if learns else attend(*inputs))
    return torch.cat(outputs, dim=1)
