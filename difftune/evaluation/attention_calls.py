"""Looking into, or replacing, every attention of a model for a while: what the probes of this room stand on.

The modules keep no state of a forward. Within `attention_calls` each layer hands what it gives to
`difftune.ops.diff_attention` or `softmax_attention` to an observer first; afterwards nothing is left of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from difftune.modeling import attention as attention_module
from difftune.modeling.attention import Attention
from difftune.ops import Documents
from difftune.ops.reference import ChangeLogits, reference_diff_attention, reference_logits, reference_softmax_attention
from difftune.ops.rms_norm import rms_norm
from difftune.ops.shapes import visible

_OPERATORS = ("diff_attention", "softmax_attention")
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one layer's attention, rotated and normed as the operator gets them."""

    layer: int
    """Counted from 0."""
    q: torch.Tensor
    """``(B, T, H, 2, D)``, or ``(B, T, N, D)`` of softmax attention."""
    k: torch.Tensor
    """``(B, S, G, 2 or 1, D)``, or ``(B, S, M, D)``."""
    v: torch.Tensor
    """``(B, S, G, E)``."""
    lam: torch.Tensor | None
    """Lambda; None of softmax attention."""
    key_padding_mask: torch.Tensor | None
    """Bool ``(B, S)``, True where a key is real."""
    documents: Documents | None
    """Packed documents."""
    norm_weight: torch.Tensor | None = None
    """Weight of the sublayer norm ``(E,)``; None without one."""
    norm_eps: float = 0.0
    """Epsilon of that norm."""

    @property
    def maps(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Queries ``(B, T, N, D)`` and keys ``(B, S, M, D)`` of each softmax map: two of differential heads, or one."""
        if self.lam is None:
            return [(self.q, self.k)]
        pair = self.k.expand(-1, -1, -1, 2, -1)
        return [(self.q[..., p, :], pair[..., p, :]) for p in (0, 1)]

    def logits(self) -> Iterator[torch.Tensor]:
        """The logits of all maps that a query may see, flat, some query rows at a time."""
        for q, k in self.maps:
            T, S = q.shape[1], k.shape[1]
            mask = visible(T, S, q.device, True, self.key_padding_mask, self.documents)
            for start in range(0, T, _CHUNK_ROWS):
                rows = slice(start, start + _CHUNK_ROWS)
                logits_BNTS = reference_logits(q[:, rows], k)
                yield logits_BNTS.flatten() if mask is None else logits_BNTS.masked_select(mask[:, None, rows])

    def reference(self, change_logits: ChangeLogits | None = None) -> torch.Tensor:
        """What the reference makes of it, in the place of the operator's output."""
        options: dict[str, Any] = {
            "key_padding_mask": self.key_padding_mask,
            "documents": self.documents,
            "change_logits": change_logits,
        }
        if self.lam is None:
            return reference_softmax_attention(self.q, self.k, self.v, **options)
        out = reference_diff_attention(self.q, self.k, self.v, self.lam, **options)
        if self.norm_weight is None:
            return out
        return rms_norm(out, self.norm_weight.to(out.dtype), self.norm_eps)


Observer = Callable[[AttentionCall], torch.Tensor | None]
"""Sees a call. What it returns takes the place of the attention's output; None: the attention is computed as ever."""


@contextmanager
def attention_calls(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Show every attention of a model to an observer, as long as the context lasts.

    For one thread: other models that run at the same time in this thread are not seen, but in another thread they
    would be.

    Args:
        model: Of ours, or with ours inside (adapters).
        observer: Called once a layer and forward.

    Raises:
        ValueError: If the model has no attention of ours.
        RuntimeError: If a layer computed its attention without showing it.
    """
    modules = [module for module in model.modules() if isinstance(module, Attention)]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no attention of difftune's to look into; convert the model first: "
            "difftune convert MODEL --to diff_v2 (or diff_v1)"
        )
    originals = {name: getattr(attention_module, name) for name in _OPERATORS}
    current: list[int] = []

    def shown(name: str) -> Callable[..., torch.Tensor]:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if not current:
                return originals[name](q, k, v, *args, **options)
            layer = current.pop()
            documents = options.get("cu_seqlens")
            call = AttentionCall(
                layer=layer,
                q=q,
                k=k,
                v=v,
                lam=args[0] if args else None,
                key_padding_mask=options.get("key_padding_mask"),
                documents=Documents(documents) if isinstance(documents, torch.Tensor) else documents,
                norm_weight=options.get("norm_weight"),
                norm_eps=options.get("norm_eps", 0.0),
            )
            replaced = observer(call)
            return originals[name](q, k, v, *args, **options) if replaced is None else replaced

        return attend

    def enter(module: Attention, *unused: Any) -> None:
        current[:] = [module.layer_idx]

    def leave(module: Attention, *unused: Any) -> None:
        if current:
            raise RuntimeError(f"layer {module.layer_idx} computed its attention past the probe: nothing was measured")

    hooks = [module.register_forward_pre_hook(enter) for module in modules]
    hooks += [module.register_forward_hook(leave) for module in modules]
    for name in _OPERATORS:
        setattr(attention_module, name, shown(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(attention_module, name, original)
        for hook in hooks:
            hook.remove()
