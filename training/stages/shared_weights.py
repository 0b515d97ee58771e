"""Weights that the networks of an objective have in common and that never change: each is held once for all.

So a teacher of adapters that is the weights they stand beside takes no memory, and their average takes that of the
adapters. Under ZeRO 3 the network that trains is cut into shares, of which DeepSpeed alone makes whole weights: there
the networks beside it hold one whole copy among themselves.
"""

import copy

import torch
from torch import nn

from pixart.dit import DiT
from pixart.model import PixArt

# Where peft puts a layer beside which there are adapters.
BESIDE_ADAPTERS = ".base_layer."


class SharedWeights:
    """What a network that trains has frozen, by name, as it is held once for other networks, too."""

    def __init__(self, trained: DiT | PixArt, *, is_partitioned: bool) -> None:
        """Take the weights of `trained` that are frozen; `is_partitioned` says that ranks have shares of them alone."""
        frozen = {name: weight for name, weight in trained.named_parameters() if not weight.requires_grad}
        self._names = {_plain(name) for name in frozen}
        self._held: dict[str, nn.Parameter] = {}
        if not is_partitioned:
            self._held = {_plain(name): weight for name, weight in frozen.items()}

    def within(self, network: DiT | PixArt) -> DiT | PixArt:
        """Return a network that runs forward alone, in which weights are those that are held, if they are the same.

        They are compared in the precision they are held in, in which the network will compute, too.
        """
        same = {}
        for name, weight in network.named_parameters():
            plain = _plain(name)
            held = self._held.setdefault(plain, weight) if plain in self._names else weight
            if held is not weight and held.shape == weight.shape and torch.equal(weight.to(held.dtype), held):
                same[name] = held
        network.load_state_dict(same, strict=False, assign=True)
        return network

    def average_of(self, trained: DiT | PixArt) -> DiT | PixArt:
        """Return a copy of the network that trains, for its average; what is held is not copied."""
        held = {id(weight): weight for weight in self._held.values()}
        return self.within(copy.deepcopy(trained, held).requires_grad_(False))


def _plain(name: str) -> str:
    return name.replace(BESIDE_ADAPTERS, ".")
