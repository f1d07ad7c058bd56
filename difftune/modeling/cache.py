"""A key/value cache for generation that writes in place."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer

_LEAST_ROOM = 64


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, at the start of a buffer with room for more tokens.

    Transformers' own layer copies all of its keys and values for every new token. This one copies them when the room
    is used up, and then makes room for a quarter more, at least 64 tokens. Everything else is as there; whatever
    replaces the tensors (a reordering, say) costs one copy at the next token, and so does a copy of the layer. What
    `update` gave is written over by what comes after a `crop`. For inference: a backward pass through tensors that were
    written over would fail.
    """

    def __init__(self, **unused: object) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``(B, G, T, width)``; all so far, ``(B, G, S, width)``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen, new = self.get_seq_length(), key_states.shape[-2]
        assert self.keys is not None and self.values is not None
        dtypes = [
            torch.promote_types(a.dtype, b.dtype) for a, b in ((self.keys, key_states), (self.values, value_states))
        ]
        if not self._has_room(seen + new, dtypes):
            room = seen + new + max(_LEAST_ROOM, (seen + new) // 4)
            buffers = (_wider(key_states, room, dtypes[0]), _wider(value_states, room, dtypes[1]))
            if seen:
                buffers[0][:, :, :seen] = self.keys
                buffers[1][:, :, :seen] = self.values
            self._buffers = buffers
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, seen : seen + new] = states
        self.keys, self.values = (buffer[:, :, : seen + new] for buffer in self._buffers)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        self._buffers = None
        super().reset()

    def __copy__(self) -> RoomyLayer:
        """A layer of the same tensors that writes elsewhere: both may go on."""
        copy = type(self)()
        vars(copy).update(vars(self), _buffers=None)
        return copy

    def _has_room(self, length: int, dtypes: list[torch.dtype]) -> bool:
        """Whether keys and values still lie in the buffers, and more, of these types, can be written behind them."""
        if self._buffers is None or self.keys is None or self.values is None:
            return False
        return all(
            held.data_ptr() == buffer.data_ptr()
            and held.stride() == buffer.stride()
            and held.shape[:2] == buffer.shape[:2]
            and length <= buffer.shape[2]
            and dtype == buffer.dtype
            for held, buffer, dtype in zip((self.keys, self.values), self._buffers, dtypes, strict=True)
        )


def build_cache() -> Cache:
    """A cache for one generation of a model of ours, on any device; its layers come as they are needed."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def _wider(states: torch.Tensor, room: int, dtype: torch.dtype) -> torch.Tensor:
    return states.new_empty((*states.shape[:2], room, states.shape[3]), dtype=dtype)
