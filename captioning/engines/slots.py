"""A preallocated key-value cache in which every row of the batch has its own length."""

# B rows in use, S slots, L prompt tokens, C capacity, H key heads, D head width

import torch
from torch import Tensor

CAPACITY_MULTIPLE = 64


class SlotCache:
    """Keys and values of all layers for `num_slots` captions; those in use are the first slots.

    Attributes:
        keys, values: one tensor [S, H, C, D] per layer.
        capacity: C, the tokens a slot holds; 0 until `reserve` is called.
    """

    def __init__(self, *, num_layers: int, num_slots: int, like: Tensor) -> None:
        """Make an empty cache of `like`'s device and type; `like` is [1, H, 0, D]."""
        self.num_slots = num_slots
        self.capacity = 0
        self.keys = [like.expand(num_slots, -1, -1, -1) for _ in range(num_layers)]
        self.values = list(self.keys)

    def reserve(self, capacity: int) -> None:
        """Make sure that each slot holds `capacity` tokens."""
        if capacity <= self.capacity:
            return
        self.capacity = -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        self.keys = [self._grow(keys) for keys in self.keys]
        self.values = [self._grow(values) for values in self.values]

    def _grow(self, tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, self.capacity - tensor.shape[2]))

    def store(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put a prompt's keys and values [H, L, D] into a slot."""
        self.keys[layer][slot, :, : keys.shape[1]] = keys
        self.values[layer][slot, :, : values.shape[1]] = values

    def append(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write one token [B, H, D] to each row in use, at `places`."""
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cached.view(-1, new.shape[-1]).index_copy_(0, places, new.reshape(-1, new.shape[-1]))

    def places(self, lengths: Tensor) -> Tensor:
        """Return where the next token of each row goes, as int64 [B * H] rows of a layer's [S * H * C, D]."""
        num_heads = self.keys[0].shape[1]
        first = torch.arange(len(lengths) * num_heads, device=lengths.device) * self.capacity
        return first + lengths.repeat_interleave(num_heads)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]
