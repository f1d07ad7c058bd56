"""Every attention backend against the equation, with the heads of a model: outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from difftune.modeling import DiffTransformerConfig
from difftune.ops import flash
from difftune.ops.diff_attention import BACKENDS
from difftune.verification.budget import Deviation
from difftune.verification.claim import Claim, judged, not_tried
from difftune.verification.equation import diff_deviations, make_inputs, softmax_deviations

_DOCUMENTS = (1, 62, 67)
"""Lengths of the packed documents; none is a multiple of a tile."""


def verify_backends(config: DiffTransformerConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Claim]:
    """Compare each backend with the equation in float64: a causal row, packed documents, one query after many keys.

    Args:
        config: Whose kind of attention, head dim and ratio of queries to keys are taken.
        device: Where the backends run.
        dtype: Of queries, keys and values.

    Yields:
        A claim for each backend but the reference, which is what they are compared with.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        for backend in BACKENDS:
            if backend in ("auto", "reference"):
                continue
            name = f"{backend} = the equation"
            heads = f"{config.attention}, D={config.head_dim}, {str(dtype).removeprefix('torch.')}"
            on = f"attention with {heads}: output and gradients"
            try:
                yield judged(name, on, _deviations(config, backend, device, dtype))
            except (ImportError, ValueError) as error:
                # What a backend does not cover it says by itself; a backend that is named is never replaced.
                yield not_tried(name, on, str(error))
            except Exception as error:
                # A kernel that does not compile or crashes is what is looked for, and the others are still of interest.
                yield Claim(name, on, "fails", f"{type(error).__name__}: {error}")
    finally:
        torch.set_rng_state(generator_state)


def _deviations(
    config: DiffTransformerConfig, backend: str, device: torch.device, dtype: torch.dtype
) -> list[Deviation]:
    if backend == "flash":
        flash.load_flash()  # what is missing is told before what does not fit
        if device.type != "cuda":
            raise ValueError(f"flash-attn needs a CUDA device, not {device.type}")
    length = sum(_DOCUMENTS)
    ends = torch.tensor([0, *_DOCUMENTS]).cumsum(0)
    found: list[Deviation] = []
    for queries, masks in ((length, {}), (length, {"cu_seqlens": ends}), (1, {})):
        for deviation in _run(config, queries, length, backend, device, dtype, masks):
            case = "packed" if masks else "causal" if queries > 1 else "one query"
            found.append(
                Deviation(f"{deviation.name} ({case})", deviation.error, deviation.budget, deviation.plain_error)
            )
    return found


def _run(
    config: DiffTransformerConfig,
    queries: int,
    keys: int,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    masks: dict[str, torch.Tensor],
) -> list[Deviation]:
    assert config.head_dim is not None and config.num_key_value_heads is not None
    D = config.head_dim
    if config.attention == "softmax":
        ratio = config.num_attention_heads // config.num_key_value_heads
        q = torch.randn(1, queries, 2 * ratio, D)
        k, v = torch.randn(1, keys, 2, D), torch.randn(1, keys, 2, D)
        return softmax_deviations([x.to(dtype) for x in (q, k, v)], backend, device, **masks)
    ratio = config.num_diff_heads // config.num_kv_groups
    first = config.attention == "diff_v1"
    shape = (1, queries, keys, 2 * ratio, 2, D)
    inputs = make_inputs(
        shape, "v1" if first else "v2", "layer" if first else "token", dtype, norm=first and config.subln != "none"
    )
    return diff_deviations(inputs, backend, device, **masks)
