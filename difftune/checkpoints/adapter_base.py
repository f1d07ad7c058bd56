"""The base of an adapter, with the numbers that it had in the training."""

from pathlib import Path
from typing import Any

import torch

from difftune.checkpoints.load import load_model
from difftune.modeling import DiffTransformerForCausalLM, cast_weights
from difftune.modeling.quantized import dequantize_base, quantize_base

BASES = ("dequantized", "quantized", "original")
"""What the base of an adapter can be loaded as, if it was in 4 bits during the training."""


def load_base(
    named: str | Path,
    quantization: dict[str, Any] | None,
    base_as: str,
    dtype: torch.dtype | None,
    attention_backend: str | None,
) -> DiffTransformerForCausalLM:
    """Load a base as an adapter knows it.

    Args:
        named: Folder or hub id.
        quantization: How it was quantised in the training, as ``quantization_of`` says it; None: not at all.
        base_as: One of :data:`BASES`; means nothing without a quantisation.
        dtype: Of the weights that are not in 4 bits. Default: as stored, or that of the training.
        attention_backend: Default: as stored.

    Raises:
        ImportError: If the base was in 4 bits, and bitsandbytes is not installed.
        ValueError: If ``base_as`` is unknown, or as ``load_model``.
    """
    if base_as not in BASES:
        raise ValueError(f"base_as={base_as!r} is unknown: choose one of {', '.join(BASES)}")
    if quantization is None or base_as == "original":
        return load_model(named, dtype=dtype, attention_backend=attention_backend)
    compute_dtype = getattr(torch, quantization["compute_dtype"])
    model = load_model(named, dtype=dtype or compute_dtype, attention_backend=attention_backend)
    quantize_base(model, quantization["type"], compute_dtype=compute_dtype, double_quant=quantization["double_quant"])
    if base_as == "dequantized":
        dequantize_base(model)
        cast_weights(model, dtype or compute_dtype)
    return model


def describe_quantization(quantization: dict[str, Any] | None) -> str:
    """A quantisation in words."""
    if quantization is None:
        return "plain weights"
    scales = " with double quantisation" if quantization["double_quant"] else ""
    return f"{quantization['type']} weights in {quantization['compute_dtype']}{scales}"
