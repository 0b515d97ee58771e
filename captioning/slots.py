"""A preallocated key-value cache in which every row of the batch has its own length."""

# B rows in use, S slots, R prompts admitted, L prompt tokens, T cached tokens, C capacity, H heads, D head width

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CAPACITY_MULTIPLE = 64


class SlotCache:
    """Keys and values of all layers for `num_slots` captions; those in use are the first slots.

    Attributes:
        keys, values: one tensor [S, H, C, D] per layer, made when the first prompts are stored.
        capacity: C, the tokens a slot holds.
    """

    def __init__(self, *, num_slots: int) -> None:
        self.num_slots = num_slots
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, capacity: int) -> None:
        """Make sure that each slot holds `capacity` tokens."""
        if capacity <= self.capacity:
            return
        self.capacity = -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        self.keys = [self._grow(keys) for keys in self.keys]
        self.values = [self._grow(values) for values in self.values]

    def _grow(self, tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, self.capacity - tensor.shape[2]))

    def store(self, prefilled: Cache, lengths: Sequence[int], *, first_slot: int) -> None:
        """Copy left-padded prompts [R, H, max L, D] into the slots from `first_slot` on, without their padding."""
        for number, layer in enumerate(prefilled.layers):
            assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
            if number == len(self.keys):
                _, num_heads, _, width = layer.keys.shape
                shape = (self.num_slots, num_heads, self.capacity, width)
                self.keys.append(layer.keys.new_zeros(shape))
                self.values.append(layer.values.new_zeros(shape))
            for row, length in enumerate(lengths):
                self.keys[number][first_slot + row, :, :length] = layer.keys[row, :, -length:]
                self.values[number][first_slot + row, :, :length] = layer.values[row, :, -length:]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def places(self, lengths: Tensor) -> Tensor:
        """Return where the next token of each row goes, as int64 [B * H] rows of a layer's [S * H * C, D]."""
        num_heads = self.keys[0].shape[1]
        first = torch.arange(len(lengths) * num_heads, device=lengths.device) * self.capacity
        return first + lengths.repeat_interleave(num_heads)
