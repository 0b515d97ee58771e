"""A preallocated key-value cache in which every row of the batch has its own length."""

# N tokens, S slots, C capacity, K key heads, D head width

import torch
from torch import Tensor

CAPACITY_MULTIPLE = 64


def round_capacity(num_tokens: int) -> int:
    """Return the tokens that a slot for `num_tokens` holds."""
    return -(-num_tokens // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


class SlotCache:
    """Keys and values of all layers for `num_slots` captions; those in use are the first slots.

    Attributes:
        keys, values: one tensor [S, K, C, D] per layer.
        capacity: C, the tokens a slot holds; 0 until `reserve` is called.
    """

    def __init__(self, *, num_layers: int, num_slots: int, like: Tensor) -> None:
        """Make an empty cache of `like`'s device and type; `like` is [1, K, 0, D]."""
        self.num_slots = num_slots
        self.capacity = 0
        self.keys = [like.expand(num_slots, -1, -1, -1) for _ in range(num_layers)]
        self.values = list(self.keys)

    def reserve(self, capacity: int) -> bool:
        """Make sure that each slot holds `capacity` tokens; returns whether the tensors are other ones now."""
        if capacity <= self.capacity:
            return False
        self.capacity = round_capacity(capacity)
        for tensors in (self.keys, self.values):
            # One after the other: only one layer is there twice at a time.
            for layer, tensor in enumerate(tensors):
                tensors[layer] = torch.nn.functional.pad(tensor, (0, 0, 0, self.capacity - tensor.shape[2]))
        return True

    def append(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values [N, K, D] of tokens to their `places`."""
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cached.view(-1, new.shape[-1]).index_copy_(0, places, new.reshape(-1, new.shape[-1]))

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Return where tokens at `positions` [N] of `slots` [N] stand: rows [N * K] of a layer's [S * K * C, D]."""
        num_heads = self.keys[0].shape[1]
        heads = slots[:, None] * num_heads + torch.arange(num_heads, device=slots.device)  # [N, K]
        return (heads * self.capacity + positions[:, None]).flatten()

    def move(self, sources: Tensor, targets: Tensor, *, longest: int) -> None:
        """Copy the first `longest` tokens of some slots to others; `sources` and `targets` are disjoint."""
        for tensor in (*self.keys, *self.values):
            held = tensor[:, :, :longest]
            held.index_copy_(0, targets, held.index_select(0, sources))
