"""What the benchmarks compare with, as transformers composes it."""

from types import SimpleNamespace

import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from difftune.checkpoints.diffllama import config_from_diffllama, weights_from_diffllama
from difftune.modeling import DiffTransformerForCausalLM


def diffllama_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The attention of transformers' DiffLlama on its sdpa backend, from rotated projections to the norm.

    Args:
        q: ``(B, T, 2H, D)``, head ``i`` paired with ``i + H``.
        k: ``(B, T, 2G, D)``, likewise.
        v: ``(B, T, 2G, D)``, the first halves of the values, then the second halves.
        lam: Weight of the negative map, shape ``()``.
        mask: Bool, ``(B, 1, T, T)``; default causal.

    Returns:
        ``(B, T, H, 2D)``.
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], is_causal=True, training=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    halves = [half.repeat(1, 2, 1, 1) for half in v.chunk(2, dim=1)]
    # One call for each half of the values over all 2H maps, then the difference of the two halves of the heads.
    maps = torch.cat([attend(module, q, k, half, mask, scaling=q.shape[-1] ** -0.5)[0] for half in halves], dim=-1)
    positive, negative = maps.chunk(2, dim=2)
    return positive - lam * negative


def to_diffllama_layout(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Our ``q (B, T, H, 2, D)``, ``k (B, T, G, 2, D)``, ``v (B, T, G, 2D)`` for :func:`diffllama_attention`."""
    D = q.shape[-1]
    return (
        q.transpose(2, 3).flatten(2, 3).contiguous(),
        k.transpose(2, 3).flatten(2, 3).contiguous(),
        v.unflatten(-1, (2, D)).transpose(2, 3).flatten(2, 3).contiguous(),
    )


def document_mask(lengths: list[int]) -> torch.Tensor:
    """Dense boolean mask of one packed row, ``(1, 1, T, T)``: causal, and only within a document."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (document[:, None] == document[None, :]).tril()[None, None]


def build_diffllama(**size: int) -> DiffLlamaForCausalLM:
    """A random DiffLlama on its sdpa backend, the same for the same size."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return DiffLlamaForCausalLM(DiffLlamaConfig(**size, **tokens, attn_implementation="sdpa"))


def build_difftune(**size: int) -> DiffTransformerForCausalLM:
    """Our model with the very weights of :func:`build_diffllama`, so that the two must give one loss."""
    foreign = build_diffllama(**size)
    weights = weights_from_diffllama(foreign.state_dict(), foreign.config.num_key_value_heads // 2)
    config = config_from_diffllama(foreign.config)
    model = DiffTransformerForCausalLM.from_pretrained(None, config=config, state_dict=weights)
    return model.train()
