"""transformers' cache of fixed size, with one position for all layers: what a decode step is recorded with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer


class FixedLayer(StaticLayer):
    """Keys and values [B, heads, length, head_dim] of one layer, at a position that all layers share.

    The last layer moves it on. transformers' own layers count each for itself, one small kernel more a layer and step.
    Attention sees the first `visible` places alone, a number that the host knows.
    """

    def __init__(self, length: int, position: Tensor, last: bool) -> None:
        super().__init__(max_cache_len=length)
        self.cumulative_length = position
        self.last = last
        self.visible = length

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """(places that attention sees, the first of them)."""
        return self.visible, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put T new keys and values [B, heads, T, head_dim] at the position; returns what is visible."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        places = torch.arange(count, device=self.device) + self.cumulative_length
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        if self.last:
            self.cumulative_length.add_(count)
        return self.keys[:, :, : self.visible], self.values[:, :, : self.visible]


def fixed_cache(config: Any, length: int, device: torch.device) -> StaticCache:
    """A StaticCache for `length` tokens on `device`.

    A window that `length` does not exceed never slides: such layers are plain ones here, which keep their position on
    the device and can be recorded. Where all are plain they share it.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer and layer.max_cache_len >= length:
            cache.layers[index] = StaticLayer(max_cache_len=length)
    if all(type(layer) is StaticLayer for layer in cache.layers):
        position = torch.tensor(0, dtype=torch.int64, device=device)
        last = len(cache.layers) - 1
        cache.layers = [FixedLayer(length, position, index == last) for index in range(last + 1)]
    return cache


def keys_alone(cache: StaticCache) -> bool:
    """Whether all layers hold keys and values and nothing else, such as states of linear attention."""
    return all(isinstance(layer, FixedLayer) or type(layer) is StaticLayer for layer in cache.layers)


def can_hide(cache: StaticCache) -> bool:
    """Whether `show` does anything."""
    return all(type(layer) is FixedLayer for layer in cache.layers)


def show(cache: StaticCache, count: int) -> None:
    """Let attention see the first `count` places alone, among them all that are filled or will be in this forward.

    What is not filled yet is masked anyway; not to read it takes less time.
    """
    for layer in cache.layers:
        if type(layer) is FixedLayer:
            layer.visible = count
