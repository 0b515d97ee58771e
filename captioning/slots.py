"""A preallocated key-value cache in which every row of the batch has its own length."""

# B rows in use, S slots, R prompts admitted, L prompt tokens, T cached tokens, H heads, D head width

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CAPACITY_MULTIPLE = 64


class SlotLayer(CacheLayerMixin):
    """Keys and values [S, H, T, D] of one layer; a row's own length says where its next token is written."""

    is_sliding = False

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for all slots what `key_states` and `value_states` [R, H, L, D] show for some."""
        num_slots, capacity = self._cache.num_slots, self._cache.capacity
        self.keys = key_states.new_zeros(num_slots, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(num_slots, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one token to each row in use and return the rows' keys and values [B, H, T, D]."""
        assert self.keys is not None and self.values is not None, "rows are admitted before they decode"
        rows, lengths, longest = self._cache.rows, self._cache.lengths, self._cache.longest
        self.keys[rows, :, lengths] = key_states[:, :, 0]  # [B, H, D]
        self.values[rows, :, lengths] = value_states[:, :, 0]
        num_rows = len(key_states)
        return self.keys[:num_rows, :, : longest + 1], self.values[:num_rows, :, : longest + 1]

    def store(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put a prompt's keys and values [H, L, D] into a slot."""
        if not self.is_initialized:
            self.lazy_initialization(keys[None], values[None])
        assert self.keys is not None and self.values is not None
        self.keys[slot, :, : keys.shape[1]] = keys
        self.values[slot, :, : values.shape[1]] = values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        assert self.keys is not None and self.values is not None
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens in each slot."""
        assert self.keys is not None and self.values is not None
        extra = capacity - self.keys.shape[2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return cached length and offset; transformers asks only where it builds the mask itself."""
        return self._cache.longest + query_length, 0

    def get_seq_length(self) -> int:
        """Return the length of the longest row."""
        return self._cache.longest

    def get_max_length(self) -> int:
        """Return the capacity of a slot."""
        return self._cache.capacity


class SlotCache(Cache):
    """The cache of all layers. The first `len(lengths)` slots are in use; the model appends one token to each.

    Attributes:
        rows: int64 [B], 0 to B - 1.
        lengths: int64 [B], tokens cached for each row.
        longest: the largest of them.
    """

    def __init__(self, num_layers: int, *, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.capacity = 0
        self.longest = 0
        self.rows = torch.arange(0, device=device)
        self.lengths = torch.arange(0, device=device)
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def reserve(self, capacity: int) -> None:
        """Make sure that each slot holds `capacity` tokens."""
        if capacity <= self.capacity:
            return
        self.capacity = -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        for layer in self._slot_layers():
            if layer.is_initialized:
                layer.grow(self.capacity)

    def store(self, prefilled: Cache, lengths: Sequence[int], *, first_slot: int) -> None:
        """Copy left-padded prompts [R, H, max L, D] into the slots from `first_slot` on, without their padding."""
        for layer, source in zip(self._slot_layers(), prefilled.layers, strict=True):
            assert isinstance(source, CacheLayerMixin) and source.keys is not None and source.values is not None
            for row, length in enumerate(lengths):
                layer.store(first_slot + row, source.keys[row, :, -length:], source.values[row, :, -length:])

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for layer in self._slot_layers():
            layer.move(source, target, length)

    def use(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each of the first slots holds."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self.rows = torch.arange(len(lengths), device=self.lengths.device)
        self.longest = max(lengths)

    def _slot_layers(self) -> Iterator[SlotLayer]:
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            yield layer
