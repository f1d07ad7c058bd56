"""transformers' own DiffLlama on our attention: one line before or after a model is built, undone at any time.

Projections, weights, rotation, cache and masks stay as they are; only the two calls of attention for each half of the
values, their difference and the norm become one call of `difftune.ops.diff_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from transformers import Cache, DiffLlamaForCausalLM
from transformers.models.diffllama import modeling_diffllama

from difftune.modeling.compat import CACHE, one_cache
from difftune.modeling.inputs import documents_of_positions
from difftune.modeling.lambdas import lambda_v1
from difftune.ops import Documents, diff_attention, rotate
from difftune.ops.diff_attention import BACKENDS

_active: DiffLlamaPatch | None = None


def patch_diffllama(backend: str = "auto") -> DiffLlamaPatch:
    """Let every DiffLlama of transformers, built or not, compute its attention with `difftune.ops.diff_attention`.

    Logits, gradients, caches and checkpoints stay the same up to rounding; padding, GQA, packed ``position_ids``,
    gradient checkpointing and every ``attn_implementation`` are served. Where our operator cannot stand in, which is
    for masks of four axes and for ``output_attentions=True``, the model goes on as transformers wrote it. With
    accelerate's ``device_map``, patch before the model is loaded: its hooks keep the forward that they found.

    Args:
        backend: As of `difftune.ops.diff_attention`. A second call changes it.

    Returns:
        The patch, to be undone by its ``unpatch()`` or at the end of a ``with`` block.

    Raises:
        ValueError: If the backend is unknown.

    Example:
        >>> with patch_diffllama():
        ...     pass  # train, generate, ...
    """
    global _active
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}, choose one of {', '.join(BACKENDS)}")
    if _active is None:
        _active = DiffLlamaPatch()
    _active.backend = backend
    return _active


class DiffLlamaPatch:
    """What :func:`patch_diffllama` has put in place; made by it alone."""

    def __init__(self) -> None:
        # As Any: to put a function in place of another is what types forbid.
        foreign: Any = modeling_diffllama
        model: Any = DiffLlamaForCausalLM
        self.backend = "auto"
        self._forward = foreign.DiffLlamaAttention.forward
        self._create_causal_mask = foreign.create_causal_mask
        patch = self

        def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            return patch.attend(self, *args, **kwargs)

        def create_causal_mask(**kwargs: Any) -> Any:
            return patch.visibility(**kwargs)

        # Without this, transformers makes a mask of four axes for caches of fixed size.
        model.create_masks_for_generate = staticmethod(_keep_mask)
        foreign.create_causal_mask = create_causal_mask
        foreign.DiffLlamaAttention.forward = forward

    def unpatch(self) -> None:
        """Put transformers' own attention back. Does nothing the second time."""
        global _active
        if _active is self:
            _active = None
            foreign: Any = modeling_diffllama
            foreign.DiffLlamaAttention.forward = self._forward
            foreign.create_causal_mask = self._create_causal_mask
            del foreign.DiffLlamaForCausalLM.create_masks_for_generate

    def __enter__(self) -> DiffLlamaPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def visibility(self, **arguments: Any) -> Any:
        """In place of a causal mask: which keys are real, where documents begin; or the mask, if it is not that."""

        def dense() -> Any:
            return self._create_causal_mask(**arguments)

        # Called with these names by the model; a mask function comes from other code.
        config, x = arguments["config"], arguments["inputs_embeds"]
        mask, cache = arguments["attention_mask"], arguments[CACHE]
        position_ids = arguments.get("position_ids")
        others = [value for name, value in arguments.items() if name.endswith("mask_function")]
        past = 0 if cache is None else int(cache.get_seq_length())
        unknown = mask is not None and tuple(mask.shape) != (x.shape[0], past + x.shape[1])
        if unknown or any(others) or not getattr(config, "is_causal", True):
            return dense()
        documents = None
        if mask is None and cache is None and position_ids is not None:
            documents = documents_of_positions(position_ids.expand(x.shape[0], -1))
        if mask is not None:
            mask = mask.to(x.device, torch.bool)
            # A mask without holes costs the kernels time. While compiling, its values are not known.
            if not torch.compiler.is_compiling() and bool(mask.all()):
                mask = None
        return _Visibility(mask, documents, dense)

    def attend(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``DiffLlamaAttention.forward``: hidden states ``(B, T, C)`` to ``(B, T, C)``, and no attention weights."""
        config, cache = module.config, one_cache(cache, past_key_values)
        weights_wanted = config._attn_implementation == "eager" and kwargs.get(
            "output_attentions", config.output_attentions
        )
        if not isinstance(attention_mask, _Visibility) or weights_wanted:
            mask = attention_mask.dense if isinstance(attention_mask, _Visibility) else attention_mask
            return self._forward(module, hidden_states, position_embeddings, mask, **{CACHE: cache}, **kwargs)
        shape = (*hidden_states.shape[:2], 2, -1, module.head_dim)
        q, k, v = (project(hidden_states).view(shape) for project in (module.q_proj, module.k_proj, module.v_proj))
        q, k = (rotate(x, *position_embeddings) for x in (q, k))
        if cache is not None:
            seen = int(cache.get_seq_length(module.layer_idx)) + q.shape[1]
            k, v = (x.flatten(2, 3).transpose(1, 2) for x in (k, v))
            k, v = cache.update(k, v, module.layer_idx)
            # A static cache returns all of its slots, also those not yet written.
            k, v = (x[:, :, :seen].transpose(1, 2).unflatten(2, (2, -1)) for x in (k, v))
        documents = attention_mask.documents
        if documents is None and kwargs.get("cu_seq_lens_q") is not None:
            documents = Documents(kwargs["cu_seq_lens_q"])
        mask = attention_mask.key_padding_mask
        out = diff_attention(
            # The two halves of the heads are the pair, the two halves of the value heads one value.
            q.transpose(2, 3),
            k.transpose(2, 3),
            v.transpose(2, 3).flatten(3),
            lambda_v1(module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2, module.lambda_init),
            key_padding_mask=None if mask is None else mask.to(q.device),
            cu_seqlens=documents,
            scale=module.scaling,
            norm_weight=torch.full(
                (2 * module.head_dim,), 1 - module.lambda_init, dtype=torch.float32, device=q.device
            ),
            norm_eps=module.groupnorm.eps,
            backend=self.backend,
        )
        return module.o_proj(out.flatten(2)), None


class _Visibility:
    """What travels in place of the causal mask: who may see whom, for our operator and, if it must be, for theirs."""

    def __init__(
        self, key_padding_mask: torch.Tensor | None, documents: Documents | None, make: Callable[[], Any]
    ) -> None:
        self.key_padding_mask, self.documents, self._make = key_padding_mask, documents, make

    @cached_property
    def dense(self) -> Any:
        """The mask that transformers would have made; asked for by the first layer, before it writes to the cache."""
        return self._make()


def _keep_mask(attention_mask: torch.Tensor | None = None, **unused: Any) -> torch.Tensor | None:
    return attention_mask
