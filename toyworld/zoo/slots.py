"""Slots: what stands at each anchor, asked of a vision tower or a text encoder while it is warmed up.

Five learned queries (one for each anchor, for texts a sixth for "somewhere") and one for the background read a sequence
of hidden states by attention and classify shape, colour, size, and background colour and pattern. This is where ground
truth enters the zoo: it stands in for CLIP's and T5's pre-training. The read-out is thrown away afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from toyworld.scenes import BACKGROUNDS, COLOURS, PATTERNS, POSITIONS, SHAPES, SIZES, Scene, SceneObject
from toyworld.wording import ObjectMention

# B batch, N tokens, D width, S slots

EncoderT = TypeVar("EncoderT", bound=nn.Module)

SOMEWHERE = len(POSITIONS)  # slot of an object whose place is not said
_EMPTY = len(SHAPES)
_UNSAID = -100  # ignored by the loss
_OBJECT_SIZES = (len(SHAPES) + 1, len(COLOURS), len(SIZES))
_GROUND_SIZES = (len(BACKGROUNDS), len(PATTERNS))


@dataclass(frozen=True)
class SlotTargets:
    """Class indices: objects [B, S, 3] as shape, colour, size; ground [B, 2] as colour, pattern; -100 where unsaid."""

    objects: Tensor
    ground: Tensor


def slot_targets(
    objects: Sequence[Sequence[SceneObject | ObjectMention]],
    grounds: Sequence[tuple[str | None, str | None]],
    *,
    num_slots: int,
) -> SlotTargets:
    """Targets of a batch; an object without a place goes to the slot SOMEWHERE."""
    rows = torch.full((len(objects), num_slots, 3), _UNSAID)
    rows[:, :, 0] = _EMPTY
    for row, items in zip(rows, objects, strict=True):
        for item in items:
            slot = POSITIONS.index(item.position) if item.position else SOMEWHERE
            row[slot, 0] = _index(item.shape, SHAPES)
            row[slot, 1] = _index(item.colour, COLOURS)
            row[slot, 2] = _index(item.size, SIZES)
    ground = [[_index(colour, BACKGROUNDS), _index(pattern, PATTERNS)] for colour, pattern in grounds]
    return SlotTargets(rows, torch.tensor(ground))


def scene_targets(scenes: Sequence[Scene], *, num_slots: int = len(POSITIONS)) -> SlotTargets:
    """Targets of pictures: everything is known, nothing is somewhere."""
    grounds = [(scene.background, scene.pattern) for scene in scenes]
    return slot_targets([scene.objects for scene in scenes], grounds, num_slots=num_slots)


def _index(word: str | None, words: Sequence[str]) -> int:
    return _UNSAID if word is None else words.index(word)


class SlotReadout(nn.Module):
    """One attention layer with a query for each slot and one for the background."""

    def __init__(self, width: int, *, num_slots: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(num_slots + 1, width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.object_head = nn.Linear(width, sum(_OBJECT_SIZES))
        self.ground_head = nn.Linear(width, sum(_GROUND_SIZES))

    def forward(self, states: Tensor, *, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """From states [B, N, D] (mask [B, N], 1 = real): three object logits [B, S, .] and two ground logits [B, .]."""
        keys = self.norm(states)
        queries = self.queries.expand(len(states), -1, -1)
        ignored = None if mask is None else mask == 0
        found, _ = self.attention(queries, keys, keys, key_padding_mask=ignored, need_weights=False)
        found = found + queries  # [B, S + 1, D]
        object_logits = self.object_head(found[:, :-1]).split(_OBJECT_SIZES, dim=-1)
        ground_logits = self.ground_head(found[:, -1]).split(_GROUND_SIZES, dim=-1)
        return list(object_logits), list(ground_logits)


class PooledReadout(nn.Module):
    """One linear layer over one embedding of unit length, which has to hold what is in every slot."""

    def __init__(self, width: int, *, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.heads = nn.Linear(width, num_slots * sum(_OBJECT_SIZES) + sum(_GROUND_SIZES))

    def forward(self, embeddings: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """From embeddings [B, D]: three object logits [B, S, .] and two ground logits [B, .]."""
        # Parts of a unit vector are small.
        logits = self.heads(embeddings * embeddings.shape[-1] ** 0.5)
        objects, ground = logits.split([self.num_slots * sum(_OBJECT_SIZES), sum(_GROUND_SIZES)], dim=-1)
        by_slot = objects.unflatten(-1, (self.num_slots, sum(_OBJECT_SIZES)))
        return list(by_slot.split(_OBJECT_SIZES, dim=-1)), list(ground.split(_GROUND_SIZES, dim=-1))


class Probed(nn.Module, Generic[EncoderT]):
    """An encoder and the read-out that it is warmed up with."""

    def __init__(self, encoder: EncoderT, readout: SlotReadout) -> None:
        super().__init__()
        self.encoder = encoder
        self.readout = readout


def slot_loss(logits: tuple[list[Tensor], list[Tensor]], targets: SlotTargets) -> Tensor:
    """Sum of the cross entropies of shape, colour, size, background colour and pattern, over what is said."""
    object_logits, ground_logits = logits
    losses = [
        functional.cross_entropy(part.flatten(0, 1), targets.objects[..., i].flatten())
        for i, part in enumerate(object_logits)
    ]
    losses += [_said_loss(part, targets.ground[:, i]) for i, part in enumerate(ground_logits)]
    return torch.stack(losses).sum()


def _said_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy that is zero, not NaN, when a batch says nothing."""
    total = functional.cross_entropy(logits, target, reduction="sum")
    return total / (target != _UNSAID).sum().clamp(min=1)


def slot_accuracy(logits: tuple[list[Tensor], list[Tensor]], targets: SlotTargets) -> dict[str, float]:
    """Fraction right of shape (occupied slots), emptiness, colour, size, background and pattern."""
    object_logits, ground_logits = logits
    shape, colour, size = (part.argmax(dim=-1) for part in object_logits)
    want_shape, want_colour, want_size = targets.objects.unbind(dim=-1)
    is_object = want_shape != _EMPTY
    return {
        "position": ((shape != _EMPTY) == is_object).float().mean().item(),
        "shape": (shape == want_shape)[is_object].float().mean().item(),
        "colour": (colour == want_colour)[want_colour != _UNSAID].float().mean().item(),
        "size": (size == want_size)[want_size != _UNSAID].float().mean().item(),
        "background": _said_accuracy(ground_logits[0], targets.ground[:, 0]),
        "pattern": _said_accuracy(ground_logits[1], targets.ground[:, 1]),
    }


def _said_accuracy(logits: Tensor, target: Tensor) -> float:
    is_said = target != _UNSAID
    return (logits.argmax(dim=-1) == target)[is_said].float().mean().item()
