"""Layers of transformers' cache: one key/value cache per slot, and prompts seen from rows that continue them.

The only module that builds on the inside of transformers' cache. It is imported when it is first used; should another
version have changed there, the self-check finds out and models are read without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

#: Positions by which a cache grows at least.
_GROWTH = 32


class CachePositions:
    """What the layers of one cache share: which slots and columns the tokens of this pass belong to."""

    def __init__(self, num_slots: int, max_length: int) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.slots: Tensor
        self.columns: Tensor
        self.column: int | None = None  # where one token of every slot goes to the same
        self.width = 0
        self.all_slots = False


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, ``[N, heads, capacity, head_dim]``, written at any (slot, position).

    The capacity follows the longest sequence so far. What has not been written is zero, never garbage: masked
    positions weigh nothing, but nothing times NaN is NaN.
    """

    is_sliding = False

    def __init__(self, at: CachePositions) -> None:
        super().__init__()
        self.at = at

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            x.new_zeros(self.at.num_slots, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def take(self, other: SlotLayer, slots: Tensor, width: int) -> None:
        """Hold the first ``width`` positions of the given slots of another cache."""
        self.keys = _grown(other.keys[:, :, :width].index_select(0, slots), width + _GROWTH)
        self.values = _grown(other.values[:, :, :width].index_select(0, slots), width + _GROWTH)
        self.is_initialized = True

    def gather(self, others: list[SlotLayer], width: int) -> None:
        """Hold the slots of several other caches one after another, up to ``width`` positions of each."""
        self.keys, self.values = (
            torch.cat([_grown(getattr(other, name)[:, :, :width], width + _GROWTH) for other in others])
            for name in ("keys", "values")
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.at
        if at.width > self.keys.shape[2]:
            capacity = min(at.width + max(_GROWTH, at.width // 4), at.max_length)
            self.keys, self.values = _grown(self.keys, capacity), _grown(self.values, capacity)
        if at.column is not None:
            self.keys[:, :, at.column] = key_states[:, :, 0]
            self.values[:, :, at.column] = value_states[:, :, 0]
        else:
            index = (at.slots[:, None], slice(None), at.columns)
            self.keys[index] = key_states.transpose(1, 2)  # [k, q, heads, dim]
            self.values[index] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, : at.width], self.values[:, :, : at.width]
        return (keys, values) if at.all_slots else (keys[at.slots], values[at.slots])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.at.width, 0

    def get_seq_length(self) -> int:
        """How many columns stand before those of this pass, for models that make their masks of it."""
        return self.at.width - self.at.columns.shape[1]

    def get_max_length(self) -> int:
        return self.at.max_length


def slot_cache(at: CachePositions, num_layers: int) -> Cache:
    """A cache of :class:`SlotLayer`."""
    return Cache(layers=[SlotLayer(at) for _ in range(num_layers)])


class _PrefixLayer(CacheLayerMixin):
    """One layer's keys and values of the prompts, seen from rows that each continue one of them."""

    is_sliding = False

    def __init__(self, prompts: CacheLayerMixin, rows: Tensor) -> None:
        super().__init__()
        self.keys, self.values = prompts.keys, prompts.values
        self.rows = rows
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prompts are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        return (
            torch.cat([self.keys.index_select(0, self.rows), key_states], dim=2),
            torch.cat([self.values.index_select(0, self.rows), value_states], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1


def prompt_cache() -> DynamicCache:
    """An empty cache for the prompts."""
    return DynamicCache()


def prefix_cache(prompts: DynamicCache, rows: Tensor) -> Cache:
    """``prompts`` as rows see them that each continue one of them, int64 ``[R]``."""
    return Cache(layers=[_PrefixLayer(layer, rows) for layer in prompts.layers])


def _grown(states: Tensor, capacity: int) -> Tensor:
    """``[N, heads, length, dim]`` with zeros after ``length``, up to ``capacity``."""
    missing = capacity - states.shape[2]
    return torch.cat([states, states.new_zeros(*states.shape[:2], missing, states.shape[3])], dim=2)
