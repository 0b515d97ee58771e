"""Layers that can have adapters: by the names we give them, by diffusers', and by words for groups of them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from pixart.model import PixArtConfig

# Groups of layers by what a recipe calls them; those of PixArt's own script are all of them.
TARGET_WORDS = {
    "attention": r"blocks\.\d+\.attention\.(query|key|value|out)",
    "cross_attention": r"blocks\.\d+\.cross_attention\.(query|key|value|out)",
    "mlp": r"blocks\.\d+\.mlp\.(hidden|out)",
    "embeddings": r"(?!blocks\.).+",
}


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """What adapters are made like: layers of `targets` get a change of this rank.

    Attributes:
        alpha: divided by the rank, with `rslora` by its root, it multiplies each change.
        dora: whether the lengths of a weight's rows are trained by themselves.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dora: bool = False
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What changes are multiplied by."""
        return scale_of(self.alpha, self.rank, rslora=self.rslora)


def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return what a change is multiplied by: alpha / rank, and alpha / sqrt(rank) as rsLoRA has it."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def layer_names(config: "PixArtConfig") -> dict[str, str]:
    """Return the layers of a PixArt that can have adapters, all that are linear: diffusers' name to ours."""
    from pixart.layouts import pixart_diffusers_layout

    suffix = ".weight"
    return {
        theirs.removesuffix(suffix): ours[0].removesuffix(suffix)
        for theirs, ours in pixart_diffusers_layout(config).items()
        if theirs.endswith(suffix)
    }


def find_targets(network: "nn.Module", names: Mapping[str, str], targets: Sequence[str], *, key: str) -> list[str]:
    """Return those of the layers `names`, diffusers' to ours, that are meant, by our names in the network's order.

    A target is a word, a shell pattern of our names or of diffusers', or the end of diffusers' names, as peft has it.

    Raises:
        UserError: one means none of them; names the recipe `key`, and says what it means instead, or what there is.
    """
    chosen: set[str] = set()
    for target in targets:
        found = {ours for theirs, ours in names.items() if _means(target, theirs, ours)}
        if not found:
            raise UserError(f"{key}: {target!r} {_missed(network, list(names.values()), target)}")
        chosen |= found
    return [name for name in names.values() if name in chosen]


def _means(target: str, theirs: str, ours: str) -> bool:
    if (word := TARGET_WORDS.get(target)) is not None:
        return re.fullmatch(word, ours) is not None
    return fnmatchcase(ours, target) or fnmatchcase(theirs, target) or theirs.endswith(f".{target}")


def _missed(network: "nn.Module", names: Sequence[str], target: str) -> str:
    for name, module in network.named_modules():
        if name and fnmatchcase(name, target):
            return f"means {name}, a {type(module).__name__}: adapters go on linear layers alone, such as {names[-1]!r}"
    return f"fits none of the {len(names)} layers, such as {names[-1]!r}; words are {', '.join(TARGET_WORDS)}"
