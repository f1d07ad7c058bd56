"""A frozen base in 4 bits under an adapter (QLoRA), through bitsandbytes, on GPUs and on the CPU.

The projections of the layers are stored as NormalFloat4 and dequantised for each product; embedding, head, norms and
lambda stay as they are. Quantisation cannot be trained through: an adapter learns beside it.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

QUANTIZATIONS = ("nf4",)
"""Kinds of 4-bit weights."""

INSTALL = "pip install 'difftune[qlora]'"


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_base` did to the memory of the weights."""

    layers: int
    """Projections that are in 4 bits now."""
    bytes_before: int
    """Of all weights of the model."""
    bytes_after: int
    """The same, with the scales of the 4-bit weights."""

    def __str__(self) -> str:
        """One line for the terminal."""
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        return f"{self.layers} projections in 4 bits: weights {before:,.1f} MiB before, {after:,.1f} MiB after"


def quantize_base(
    model: nn.Module, quantization: str, *, compute_dtype: torch.dtype, double_quant: bool = True
) -> QuantizationReport:
    """Put the projections of the layers into 4 bits, in place, and freeze the model.

    Args:
        model: The base, before an adapter is added, on the device where it is to be quantised.
        quantization: ``nf4``: NormalFloat4 in blocks of 64 weights with one scale each.
        compute_dtype: Of the dequantised weights and the products: float32, bfloat16 or float16. The weights are
            rounded to it before they are quantised.
        double_quant: Quantise the scales too, which saves 0.37 bits a weight.

    Returns:
        How many projections, and the memory of the weights before and after.

    Raises:
        ImportError: If bitsandbytes is not installed, with the install line, or is broken.
        ValueError: If the kind or the dtype is unknown, or the model is quantised, or has no weights.

    Source:
        Dettmers et al., "QLoRA", arXiv:2305.14314, sections 3 (NF4, double quantisation).

    Example:
        >>> print(quantize_base(model, "nf4", compute_dtype=torch.bfloat16))  # doctest: +SKIP
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization {quantization!r} is unknown: choose one of {', '.join(QUANTIZATIONS)}")
    if compute_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}")
    if quantization_of(model) is not None:
        raise ValueError("the model is quantised already: load it anew to quantise it otherwise")
    found = projections(model)
    if not found or found[0][2].weight.is_meta:
        raise ValueError("the model has no weights to quantise: load it first, and quantise before adapters are added")
    linear = _bitsandbytes().nn.Linear4bit
    before = weight_bytes(model)
    for parent, leaf, plain in found:
        rows, columns = plain.weight.shape
        device = plain.weight.device
        with torch.device("meta"):
            layer = linear(
                columns,
                rows,
                bias=plain.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=double_quant,
                quant_type=quantization,
            )
        # Built anew: a parameter on the meta device cannot be moved. `to` is what quantises it.
        layer.weight = type(layer.weight)(
            plain.weight.detach().to(compute_dtype),
            requires_grad=False,
            compress_statistics=double_quant,
            quant_type=quantization,
            module=layer,
        ).to(device)
        layer.bias = plain.bias
        setattr(parent, leaf, layer)
    keep_layout(model)
    model.requires_grad_(False)
    # PEFT reads this to choose its layer.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return QuantizationReport(len(found), before, weight_bytes(model))


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The same quantisation for a model that transformers loads, all linear layers of its blocks.

    Args:
        quantization: ``nf4``.
        compute_dtype: Of the dequantised weights and the products.

    Raises:
        ImportError: If bitsandbytes is not installed, with the install line.
    """
    _bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_layout(model: nn.Module) -> None:
    """Keep the 4-bit weights of a model as they are stored.

    bitsandbytes 0.50 repacks them for AVX512-BF16 in an evaluation forward on the CPU, after which no gradient passes
    through the layer; and a model that is tried on the CPU may still move to another device.
    """
    for _, _, layer in _quantised(model):
        layer.support_avx512bf16_for_cpu = False


def dequantize_base(model: nn.Module) -> int:
    """Put plain linear layers in the place of those in 4 bits, with the weights that these compute with; in place.

    Args:
        model: The base, without adapters.

    Returns:
        How many layers there were.
    """
    found, quantization = _quantised(model), quantization_of(model)
    for parent, leaf, layer in found:
        weight = dequantized_weight(layer)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, leaf, plain)
    if found:
        del model.is_loaded_in_4bit
        # An adapter that is put on these weights records how they came about.
        model.dequantized_from = quantization  # type: ignore[assignment]
    return len(found)


def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a linear layer computes with, shape ``(out, in)``; of a plain one it is no copy."""
    weight: Any = layer.weight
    if not hasattr(weight, "quant_state"):
        return weight.detach()
    return _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state).detach()


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """How the projections of a model are quantised, in plain values, or None if they are not.

    Returns:
        ``type``, ``double_quant`` and ``compute_dtype``: what :func:`quantize_base` needs to do the same again.
    """
    layers = _quantised(model)
    if not layers:
        return None
    layer: Any = layers[0][2]
    return {
        "type": layer.weight.quant_type,
        "double_quant": layer.weight.compress_statistics,
        "compute_dtype": str(layer.compute_dtype).removeprefix("torch."),
    }


def num_weights(parameter: nn.Parameter) -> int:
    """Weights in a parameter: two in each byte of one in 4 bits."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def weight_bytes(model: nn.Module) -> int:
    """Memory of the parameters of a model in bytes, a tied one once, with the scales of 4-bit weights."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(t.nbytes for t in state.as_dict(packed=True).values() if isinstance(t, torch.Tensor))
    return total


def projections(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of the blocks, each with its parent and its name there; lambda's projection is not one."""
    return [
        (parent, leaf, child)
        for name, parent in model.named_modules()
        for leaf, child in parent.named_children()
        if type(child) is nn.Linear and leaf.endswith("_proj") and "lambda_full" not in name
    ]


def _quantised(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    return [
        (parent, leaf, child)
        for parent in model.modules()
        for leaf, child in parent.named_children()
        if hasattr(getattr(child, "weight", None), "quant_state") and hasattr(child, "compute_dtype")
    ]


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise ImportError(f"4-bit weights need bitsandbytes, which is not installed: {INSTALL}") from error
