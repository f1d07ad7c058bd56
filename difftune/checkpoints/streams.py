"""Streams of tensors in one order: embedding, layers by number, norm, head. What every conversion is made of."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

import torch

TensorStream = Iterator[tuple[str, torch.Tensor]]
"""Name and tensor, one after another; each is used and let go."""

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LAYER = re.compile(r"(model\.layers\.(\d+)\.)")


def unit_of(name: str) -> str:
    """The part of the model that a tensor belongs to: ``model.layers.3.``, or the tensor's own name outside.

    Example:
        >>> unit_of("model.layers.3.mlp.up_proj.weight"), unit_of("model.norm.weight")
        ('model.layers.3.', 'model.norm.weight')
    """
    match = _LAYER.match(name)
    return match[1] if match else name


def in_order(tensors: Mapping[str, torch.Tensor]) -> TensorStream:
    """Stream a mapping in the order of a forward pass, reading each tensor when it is its turn.

    Args:
        tensors: Tensor by name; may read lazily.

    Yields:
        Name and tensor.
    """
    for name in sorted(tensors, key=_place):
        yield name, tensors[name]


def by_unit(stream: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Gather the tensors of each layer, so that one layer is in memory at a time.

    Args:
        stream: In the order of :func:`in_order`.

    Yields:
        Name of the unit, as :func:`unit_of`, and its tensors by full name.
    """
    for unit, items in itertools.groupby(stream, key=lambda item: unit_of(item[0])):
        yield unit, dict(items)


def _place(name: str) -> tuple[int, int, str]:
    match = _LAYER.match(name)
    if match:
        return 1, int(match[2]), name
    return {EMBEDDING: 0, NORM: 2}.get(name, 3), 0, name
