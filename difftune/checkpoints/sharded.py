"""Load a model shard by shard: built on the meta device, sharded, and then filled by every rank with its own part.

No process holds the whole model. Of a difftune folder a rank reads the slices that it keeps; of a DiffLlama, whose rows
lie in another order, one layer at a time; a fresh model is drawn tensor by tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, GenerationConfig

from difftune.checkpoints.diffllama import config_from_diffllama, weights_from_diffllama
from difftune.checkpoints.folders import (
    TRAINING_WEIGHTS,
    check_shapes,
    check_tied_head,
    map_training_weights,
    read_config,
    read_generation_config,
)
from difftune.checkpoints.llama import config_from_llama, read_llama_config
from difftune.checkpoints.load import find_model
from difftune.checkpoints.shards import LazyTensors
from difftune.checkpoints.streams import EMBEDDING, HEAD, unit_of
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.adapters import base_name
from difftune.modeling.fresh import initial_values

Index = tuple[slice, ...]


class Weights(Protocol):
    """What a model can be filled with."""

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy weights into tensors, by name; of a sharded one this rank's part."""


class StoredWeights(Mapping[str, torch.Tensor]):
    """The weights of a model on disk by our names, read when asked for, whole or in part.

    A tied head reads the embedding.

    Args:
        path_or_hub_id: A difftune, DiffLlama or Llama folder or hub id, or a training checkpoint of a whole model.

    Raises:
        ValueError: If nothing is there, it cannot be read in parts, or its tensors are not those of its config.
    """

    def __init__(self, path_or_hub_id: str | Path) -> None:
        self.folder, kind = find_model(path_or_hub_id)
        if kind == "adapter":
            raise ValueError(
                f"{self.folder} is an adapter: summing it with its base takes the whole model, and this one is loaded "
                f"shard by shard; make one model of them first (difftune merge {path_or_hub_id} --out DIR)"
            )
        self._unit: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._stored: Mapping[str, torch.Tensor]
        self.config: DiffTransformerConfig
        """Ours."""
        if (self.folder / TRAINING_WEIGHTS).is_file():
            self._stored = map_training_weights(self.folder)
        else:
            self._stored = LazyTensors(self.folder)
        foreign: Any = None
        if kind == "diffllama":
            foreign = read_config(self.folder, DiffLlamaConfig)
            self.config = config_from_diffllama(foreign)
        elif kind == "llama":
            self.config = config_from_llama(read_llama_config(self.folder))
        else:
            self.config = read_config(self.folder, DiffTransformerConfig)
        self._is_translated = foreign is not None
        if self.config.tie_word_embeddings:
            check_tied_head(self._stored, source=str(self.folder))
        with torch.device("meta"):
            model = DiffTransformerForCausalLM(copy.deepcopy(self.config))
        shapes = self._stored.shapes() if hasattr(self._stored, "shapes") else _shapes(self._stored)
        # Old checkpoints of the Llama family store the rotary frequencies, which the config determines.
        found = {name: shape for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq")}
        if self.config.tie_word_embeddings:
            found.pop(HEAD, None)
        owner: Any = DiffTransformerForCausalLM if foreign is None else DiffLlamaForCausalLM
        check_shapes(found, owner, foreign or self.config, source=str(self.folder))
        self._names = [name for name in model.state_dict() if name != HEAD or not self.config.tie_word_embeddings]
        self.dtype = self.part(EMBEDDING, (slice(0, 1),)).dtype
        """Of the weights, as stored."""

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The defaults of ``generate``, if the folder has them."""
        return read_generation_config(self.folder)

    def part(self, name: str, index: Index) -> torch.Tensor:
        """``self[name][index]``, of which as little else as possible is read."""
        name = EMBEDDING if name == HEAD and self.config.tie_word_embeddings else name
        if self._is_translated and unit_of(name) != name:
            tensor = self._layer(unit_of(name))[name][index]
        elif isinstance(self._stored, LazyTensors):
            tensor = self._stored.part(name, index)
        else:
            tensor = self._stored[name][index]
        if not tensor.is_floating_point():
            raise ValueError(
                f"{self.folder} stores {name} as integers: quantised weights are not read, save it in bfloat16"
            )
        return tensor

    def is_zero(self, name: str) -> bool:
        """Whether a tensor is zero throughout; of one that is not, little is read."""
        return not self.part(name, (slice(0, 1),)).any() and not self[name].any()

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy weights into tensors, by our names; of a sharded one this rank's part."""
        for name, target in targets.items():
            local, index = own_part(target)
            local.copy_(self.part(name, index))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.part(name, ())

    def __contains__(self, name: object) -> bool:
        return name in self._names or name == HEAD

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _layer(self, unit: str) -> dict[str, torch.Tensor]:
        """Our tensors of one layer; the last one asked for is kept, since its tensors come one after another."""
        if self._unit[0] != unit:
            self._unit = ("", {})
            items = {name: self._stored[name] for name in self._stored if name.startswith(unit)}
            self._unit = (unit, weights_from_diffllama(items, num_groups=self.config.num_kv_groups))
        return self._unit[1]


class FreshWeights:
    """What a fresh model begins with, drawn again from its seed.

    Args:
        build: Builds the model on the CPU.
        seed: From which torch draws.
    """

    def __init__(self, build: Callable[[], nn.Module], seed: int) -> None:
        self.build, self.seed = build, seed

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy initial values into tensors, by our names; of a sharded one this rank's part."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name, value in initial_values(self.build):
                if name in targets:
                    local, index = own_part(targets[name])
                    local.copy_(value[index])


def load_skeleton(
    path_or_hub_id: str | Path, *, dtype: torch.dtype | None = None, attention_backend: str | None = None
) -> tuple[DiffTransformerForCausalLM, StoredWeights]:
    """A model on the meta device, and its weights, for :func:`fill_model` when it has been sharded.

    Args:
        path_or_hub_id: As of :class:`StoredWeights`.
        dtype: Of the weights; lambda stays float32. Default: as stored.
        attention_backend: Of ``difftune.ops.diff_attention``. Default: as stored, ``auto`` for a DiffLlama.

    Raises:
        ValueError: As :class:`StoredWeights`.
    """
    weights = StoredWeights(path_or_hub_id)
    config = copy.deepcopy(weights.config)
    if attention_backend is not None:
        config.attention_backend = attention_backend
    config.dtype = dtype or weights.dtype
    with torch.device("meta"):
        model = DiffTransformerForCausalLM(config)
    cast_weights(model, dtype or weights.dtype)
    # Counters of a warm-up are read at once: whoever puts an adapter on the model looks at them.
    for module_name, module in model.named_modules():
        for leaf in _persistent_buffers(module):
            module._buffers[leaf] = weights[f"{module_name}.{leaf}"]
    model.generation_config = weights.generation_config or model.generation_config
    model.config._name_or_path = str(path_or_hub_id)
    return model.eval(), weights


@torch.no_grad()
def fill_model(model: nn.Module, weights: Weights, device: torch.device | str) -> None:
    """Give every parameter and buffer that is on the meta device its place and its value, in place.

    Args:
        model: Sharded or not, with adapters inside or not. Parameters that share memory go on sharing it.
        weights: Of the model without adapters; what an adapter trains whole begins as its base.
        device: Where the parameters go. Buffers go to the CPU.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    targets: dict[str, torch.Tensor] = {}
    copies: list[tuple[str, torch.Tensor]] = []
    for module_name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not parameter.is_meta:
                continue
            if parameter not in replaced:
                empty = torch.empty_like(parameter, device=device)
                replaced[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                name = base_name(f"{module_name}.{leaf}".lstrip("."))
                assert name is not None, f"{module_name}.{leaf} has a value of its own and lost it"
                if name in targets:
                    copies.append((name, replaced[parameter]))
                else:
                    targets[name] = replaced[parameter]
            setattr(module, leaf, replaced[parameter])
    weights.read_into(targets)
    for name, copy_of in copies:
        weights.read_into({name: copy_of}) if isinstance(weights, StoredWeights) else copy_of.copy_(targets[name])
    _fill_buffers(model)


@contextmanager
def weightless_projections(model: nn.Module, weights: StoredWeights) -> Iterator[None]:
    """Let PEFT put an adapter on a model that is on the meta device, with the values that the adapter begins with.

    PEFT makes LoRA on the device of the projection. Within this context a projection has a weight on the CPU that takes
    no memory: one number, seen everywhere; 0 where the stored weight is zero throughout, else 1.

    Args:
        model: On the meta device.
        weights: Of the model.
    """
    kept = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not name.endswith("_proj") or "lambda_full" in name:
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            kept.append((module, leaf, parameter))
            number = 0.0 if leaf == "weight" and weights.is_zero(base_name(f"{name}.weight") or name) else 1.0
            hollow = torch.full((), number, dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, leaf, nn.Parameter(hollow, requires_grad=parameter.requires_grad))
    yield
    for module, leaf, parameter in kept:
        parameter.requires_grad_(getattr(module, leaf).requires_grad)
        setattr(module, leaf, parameter)


def own_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Index]:
    """The memory of this rank, and which part of the whole it is.

    Args:
        tensor: A DTensor; or a plain tensor, of which a rank has all.
    """
    if not isinstance(tensor, DTensor):
        return tensor, ()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    assert tuple(local.shape) == tuple(shape), "a shard is not where it should be"
    return local, tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _fill_buffers(model: nn.Module) -> None:
    """Frequencies of rotary embeddings, which are computed, and the counters of a warm-up that begins: zero."""
    for module in model.modules():
        lost = [leaf for leaf, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not lost:
            continue
        counters = _persistent_buffers(module)
        for leaf in set(lost) & set(counters):
            module._buffers[leaf] = torch.zeros_like(module._buffers[leaf], device="cpu")  # type: ignore[arg-type]
        if set(lost) - set(counters):
            fresh = type(module)(config=module.config)
            for leaf in set(lost) - set(counters):
                module._buffers[leaf] = fresh._buffers[leaf]


def _persistent_buffers(module: nn.Module) -> list[str]:
    return [leaf for leaf in module._buffers if leaf not in module._non_persistent_buffers_set]


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
