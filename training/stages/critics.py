"""The critic that trains beside a network, by a loss of its own, and is no part of what a stage exports."""

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from pixart.dit import DiT
from pixart.model import PixArt

CRITIC = "critic"
PREFIX = f"{CRITIC}."

Value = TypeVar("Value")


def add_critic(network: DiT | PixArt, begins_as: DiT | PixArt) -> None:
    """Put a critic beside a network, in place: a copy of another, fp32, all of whose weights train."""
    network.add_module(CRITIC, copy.deepcopy(begins_as).float().requires_grad_(True))


def critic_of(network: nn.Module) -> nn.Module | None:
    """Return the critic beside a network, None where there is none."""
    critic = getattr(network, CRITIC, None)
    assert critic is None or isinstance(critic, nn.Module)
    return critic


def without_critic(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Return what is said of weights by name, less those of a critic."""
    return {name: value for name, value in weights.items() if not name.startswith(PREFIX)}
