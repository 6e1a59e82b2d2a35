"""Keys and values of a text that is written token by token, in memory that is there before they are.

transformers' ``DynamicLayer`` puts all of them into a new tensor at every token: T (T + 1) / 2 of them are copied for a
text of T, which is most of what a step moves. Here they are written behind those that are there. There is room for as
many as there will be, or, where nobody knows how many, half as many again when it is full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

LEAST = 64  # tokens that there is room for from the start


def make_room(cache: Any, most: int | None = None) -> None:
    """Layers of ``cache`` that keep all they see go on as :class:`GrowingLayer`; those with a window stay.

    Args:
        most: tokens that there will be; None: not known.
    """
    layers = getattr(cache, "layers", [])
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[place] = GrowingLayer(layer, most)


class GrowingLayer(DynamicLayer):
    """A ``DynamicLayer`` that was begun elsewhere. For decoding without gradients: it writes in place."""

    _layer_type = None  # this is no layer that transformers should make for a network
    keys: Tensor
    values: Tensor

    def __init__(self, begun: DynamicLayer, most: int | None = None):
        super().__init__()
        self.__dict__.update(begun.__dict__)
        self.most = most
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [N, heads, T, head size] with the new ones behind them: parts of what there is room for."""
        self.keys = self._behind("keys", self.keys, key_states)
        self.values = self._behind("values", self.values, value_states)
        return self.keys, self.values

    def _behind(self, name: str, seen: Tensor, new: Tensor) -> Tensor:
        before, length = seen.shape[-2], seen.shape[-2] + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or room.shape[-2] < length or not _begins(seen, room):  # other rows were chosen, say
            size = self.most if self.most is not None and length <= self.most else length + max(LEAST, length // 2)
            shape = [*seen.shape[:-2], size, seen.shape[-1]]
            room = self._rooms[name] = torch.empty(shape, dtype=seen.dtype, device=seen.device)
            room[..., :before, :] = seen
        room[..., before:length, :] = new
        return room[..., :length, :]


def _begins(seen: Tensor, room: Tensor) -> bool:
    """``seen`` is the first tokens of what ``room`` holds."""
    return (
        seen.data_ptr() == room.data_ptr()
        and seen.stride() == room.stride()
        and seen.shape[:-2] == room.shape[:-2]
        and seen.shape[-1] == room.shape[-1]
    )
