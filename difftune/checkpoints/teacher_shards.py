"""A teacher on the meta device, and what fills it shard by shard when it has been sharded."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from difftune.checkpoints.folders import check_names, check_tied_head, resolve_folder
from difftune.checkpoints.load import is_ours, load_teacher
from difftune.checkpoints.sharded import fill_model, load_skeleton, own_part
from difftune.checkpoints.shards import LazyTensors

log = logging.getLogger(__name__)

Fill = Callable[..., None]
"""Called with the sharded model and ``device``."""


class TransformersWeights:
    """The safetensors of a causal language model of transformers, of which each rank reads its own part.

    Args:
        stored: Those of its folder.
        model: Its architecture on the meta device; its parameters, tied ones once, are what the folder must have.

    Raises:
        ValueError: If they have other names or shapes.
    """

    def __init__(self, stored: LazyTensors, model: PreTrainedModel) -> None:
        self._stored, folder = stored, stored.source
        expected = {name: parameter.shape for name, parameter in model.named_parameters()}
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - expected.keys()
        check_names(set(self._stored) - tied, expected, source=str(folder), expected_by=type(model).__name__)
        if tied & set(self._stored):
            check_tied_head(self._stored, source=str(folder))
        shapes = self._stored.shapes()
        if wrong := [name for name, shape in expected.items() if shapes[name] != shape]:
            raise ValueError(f"{len(wrong)} tensors in {folder} do not have their shape, such as {wrong[0]}")

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy weights into tensors, by name; of a sharded one this rank's part."""
        for name, target in targets.items():
            local, index = own_part(target)
            local.copy_(self._stored.part(name, index))


def load_sharded_teacher(path_or_hub_id: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Fill | None]:
    """A teacher as :func:`~difftune.checkpoints.load.load_teacher` loads it, of which a rank holds its shards alone.

    Where it cannot be read in parts it is loaded whole, and a message says why: weights that are not safetensors,
    or that transformers renames, adds up or unpacks while it loads them; an adapter.

    Args:
        path_or_hub_id: As there.
        dtype: As there.

    Returns:
        A model on the meta device, and what fills it when it has been sharded; or the whole model, and None.

    Raises:
        ValueError: As there.
    """
    try:
        if is_ours(resolve_folder(path_or_hub_id)):
            ours, stored = load_skeleton(path_or_hub_id, dtype=dtype)
            return ours, partial(fill_model, weights=stored)
        model, weights = _foreign_skeleton(resolve_folder(path_or_hub_id), dtype)
        return model, partial(fill_model, weights=weights)
    except (OSError, ValueError, SafetensorError) as error:
        # What is wrong with the model itself, the whole load says.
        whole = load_teacher(path_or_hub_id, dtype)
        log.info("every process loads the whole teacher before it is sharded: %s", str(error).splitlines()[0])
        return whole, None


def _foreign_skeleton(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, TransformersWeights]:
    """A model of transformers' on the meta device, and its weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantised")
    stored = LazyTensors(folder)
    dtype = dtype or config.dtype or stored[next(iter(stored))].dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    weights = TransformersWeights(stored, model)
    name = type(model).__name__
    if model._get_dtype_plan(dtype):
        raise ValueError(f"{name} keeps some weights in another dtype")
    for module in model.modules():
        buffers = set(module._buffers)
        if buffers and (buffers - module._non_persistent_buffers_set or buffers != _computed_buffers(module)):
            raise ValueError(f"{name} has buffers that its config alone does not make: {', '.join(sorted(buffers))}")
    return model.eval(), weights


def _computed_buffers(module: nn.Module) -> set[str]:
    """Names of the buffers that a module built from its config alone has."""
    if not hasattr(module, "config"):
        return set()
    try:
        return set(type(module)(config=module.config)._buffers)
    except TypeError:
        return set()
