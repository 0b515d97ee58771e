"""Which weights of a network train, as what they are saved, and how they come back.

Everything after `freeze_others` goes by `requires_grad`: optimizer, average, state, memory and operations.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from torch import Tensor

from errors import UserError
from pixart.convert import load_diffusers, save_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from training.stages.networks import blank_network


def freeze_others(network: DiT | PixArt, trains: Literal["all"] | Sequence[str], *, key: str) -> None:
    """Let only those weights train whose names fit one of the shell patterns `trains`.

    Raises:
        UserError: a pattern fits none; names the recipe `key` and a weight there is.
    """
    if trains == "all":
        return
    names = [name for name, _ in network.named_parameters()]
    for pattern in trains:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{key}: pattern {pattern!r} fits none of the {len(names)} weights, such as {names[-1]!r}")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trains))


def save_weights(config: DiTConfig | PixArtConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a whole network, the average of what trains and the rest as it is, as a folder that diffusers opens."""
    network = blank_network(config)
    network.load_state_dict(weights, assign=True)
    save_diffusers(network, folder)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights that `save_weights` wrote, by name."""
    return load_diffusers(folder).state_dict()
