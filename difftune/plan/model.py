"""The models of a plan: the architecture that would be trained, as modules on the meta device; no weights are read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DiffLlamaConfig, PreTrainedModel

from difftune.builder import build_tokenizer, fresh_architecture
from difftune.checkpoints.adapter_config import base_of_adapter
from difftune.checkpoints.diffllama import config_from_diffllama
from difftune.checkpoints.folders import read_config, read_json, resolve_folder
from difftune.config import Config
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.modeling.modeling import recompute_blocks
from difftune.modeling.quantized import projections


def architecture(config: Config) -> DiffTransformerConfig:
    """The architecture of the model of a recipe, from `config.json` of `model.path` or from the recipe's keys.

    Raises:
        ValueError: If `model.path` is not there, or is of a format that is not ours.
    """
    if config.model.path is None:
        if config.model.vocab_size is None:
            return fresh_architecture(config.model, build_tokenizer(config))
        return DiffTransformerConfig(**config.model.architecture())
    try:
        found = _architecture_of(config.model.path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"model.path: {error}; a plan needs no weights: model.path=null model.vocab_size=... model.hidden_size=... "
            "describes the model instead"
        ) from error
    for name in ("max_position_embeddings", "rope_parameters"):
        if getattr(config.model, name) is not None:
            setattr(found, name, getattr(config.model, name))
    return found


def _architecture_of(path: str) -> DiffTransformerConfig:
    folder = resolve_folder(base_of_adapter(path) or path)
    kind = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    if kind == "difftune":
        return read_config(folder, DiffTransformerConfig)
    if kind == "diffllama":
        return config_from_diffllama(read_config(folder, DiffLlamaConfig))
    raise ValueError(f"{folder} has no config.json of a difftune or DiffLlama model (model_type {kind!r})")


def build_skeleton(
    config: Config, shape: DiffTransformerConfig, num_layers: int | None = None
) -> DiffTransformerForCausalLM:
    """The model that a recipe trains, on the meta device: cast, in 4 bits and with its adapter, as the recipe says.

    Args:
        config: The recipe.
        shape: Of :func:`architecture`.
        num_layers: Blocks; None is all.
    """
    shape = copy.deepcopy(shape)
    if num_layers is not None:
        shape.num_hidden_layers = num_layers
    dtype = getattr(torch, config.model.dtype)
    with torch.device("meta"):
        model = DiffTransformerForCausalLM(shape)
        cast_weights(model, dtype)
        if config.model.quantization is not None:
            _put_in_4_bits(model, dtype)
            model.requires_grad_(False)
        if config.adapter is not None:
            add_adapter(model, AdapterSettings(**vars(config.adapter)))
    if config.model.gradient_checkpointing:
        recompute_blocks(model, every=config.model.gradient_checkpointing_every)
    return model


def build_teacher_skeleton(path: str, dtype: str | None) -> PreTrainedModel:
    """A teacher on the meta device.

    Raises:
        ValueError: If there is no config of it.
    """
    folder = Path(resolve_folder(path))
    kind = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    with torch.device("meta"):
        if kind in ("difftune", "diffllama"):
            model: PreTrainedModel = DiffTransformerForCausalLM(_architecture_of(path))
        else:
            try:
                model = AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"distill.teacher: {path}: {str(error).splitlines()[0]}") from error
        if dtype is not None:
            cast_weights(model, getattr(torch, dtype))
    return model


def tensor_bytes(module: nn.Module, *, trained: bool = False) -> int:
    """Memory of the parameters of a module, a shared one once, and of what stands beside weights in 4 bits.

    Args:
        module: On any device.
        trained: Only of parameters that are trained.
    """
    parameters = {id(p): p for p in module.parameters() if p.requires_grad or not trained}
    scales = [b for m in module.modules() if isinstance(m, _FourBitLinear) for b in m.buffers(recurse=False)]
    return sum(p.nbytes for p in parameters.values()) + (0 if trained else sum(b.nbytes for b in scales))


class _FourBitLinear(nn.Linear):
    """A projection whose memory is that of bitsandbytes' in NF4 with double quantisation; it computes nothing.

    Half a byte a weight; a byte of scale for 64 weights, and four for 256 such scales.
    """

    def __init__(self, plain: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        count = plain.in_features * plain.out_features
        self.weight = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
        blocks = -(-count // 64)
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-blocks // 256), dtype=torch.float32))
        self.compute_dtype = compute_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FourBitProduct.apply(x, self.weight, self.out_features, self.compute_dtype)


class _FourBitProduct(torch.autograd.Function):
    """Dequantises for the product, and again for the gradient of the input, which needs no activation."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, out_features: int, compute_dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.whole = (out_features, x.shape[-1])
        ctx.compute_dtype = compute_dtype
        whole = x.new_empty(ctx.whole, dtype=compute_dtype)
        return (x.to(compute_dtype) @ whole.T).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole = grad.new_empty(ctx.whole, dtype=ctx.compute_dtype)
        return (grad.to(ctx.compute_dtype) @ whole).to(ctx.dtype), None, None, None


def _put_in_4_bits(model: nn.Module, compute_dtype: torch.dtype) -> None:
    for parent, leaf, plain in projections(model):
        setattr(parent, leaf, _FourBitLinear(plain, compute_dtype))
