"""Where weights lie in the masters of ranks, as ZeRO shares them out."""

# R ranks

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A rank's part of a weight laid flat: `length` elements from `start` on.

    They lie in the master number `master` of the layout, from `offset` on.
    """

    start: int
    length: int
    master: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A weight, its shape when it is whole, and what each of R ranks has of it, which may be nothing."""

    weight: nn.Parameter
    shape: torch.Size
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Masters that are stepped together, and the weights in them.

    Attributes:
        masters: of this rank, as its optimizer has them.
        rank: this rank's place in the stretches of each weight; 0 where all ranks have all of it.
    """

    masters: list[Tensor]
    weights: list[Placed]
    rank: int = 0


def whole_layout(weights: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> Layout:
    """Return that of weights of which each has a master of its own, on every rank."""
    placed = [
        Placed(
            weight=weight,
            shape=master.shape,
            stretches=(Stretch(start=0, length=master.numel(), master=number, offset=0),),
        )
        for number, (weight, master) in enumerate(zip(weights, masters, strict=True))
    ]
    return Layout(masters=list(masters), weights=placed)


def flat_layout(
    weights: Sequence[nn.Parameter],
    shapes: Sequence[torch.Size],
    *,
    begins: Sequence[int],
    master: Tensor,
    rank: int,
    num_ranks: int,
) -> Layout:
    """Return that of weights which `begins` lays one behind the other, cut into R stretches wherever the cuts fall."""
    size, placed = master.numel(), []
    for weight, shape, begin in zip(weights, shapes, begins, strict=True):
        end = begin + shape.numel()
        stretches = []
        for cut in range(0, size * num_ranks, size):
            first, last = (min(max(bound, begin), end) for bound in (cut, cut + size))
            stretches.append(Stretch(start=first - begin, length=last - first, master=0, offset=max(begin - cut, 0)))
        placed.append(Placed(weight=weight, shape=shape, stretches=tuple(stretches)))
    return Layout(masters=[master], weights=placed, rank=rank)


def shared_layout(
    weights: Sequence[nn.Parameter], shapes: Sequence[torch.Size], *, master: Tensor, rank: int, num_ranks: int
) -> Layout:
    """Return that of weights of which each is cut into as many shares as ranks; a rank's lie end to end."""
    placed, offset = [], 0
    for weight, shape in zip(weights, shapes, strict=True):
        share = -(-shape.numel() // num_ranks)
        stretches = []
        for each in range(num_ranks):
            start = min(each * share, shape.numel())
            length = min(share, shape.numel() - start)
            stretches.append(Stretch(start=start, length=length, master=0, offset=offset))
        placed.append(Placed(weight=weight, shape=shape, stretches=tuple(stretches)))
        offset += share
    return Layout(masters=[master], weights=placed, rank=rank)


def only_of(layout: Layout, weights: Collection[int]) -> Layout:
    """Return what of a layout is of weights with these `id`s: they alone, and the masters that they lie in."""
    chosen = [placed for placed in layout.weights if id(placed.weight) in weights]
    used = sorted({stretch.master for placed in chosen for stretch in placed.stretches})
    number_of = {former: number for number, former in enumerate(used)}
    placed = [
        replace(
            each,
            stretches=tuple(replace(stretch, master=number_of[stretch.master]) for stretch in each.stretches),
        )
        for each in chosen
    ]
    return Layout(masters=[layout.masters[number] for number in used], weights=placed, rank=layout.rank)


def clear_gaps(layout: Layout) -> None:
    """Set what is in masters and of no weight to zero: DeepSpeed leaves there what the memory held before."""
    held: dict[int, list[Stretch]] = {number: [] for number in range(len(layout.masters))}
    for placed in layout.weights:
        stretch = placed.stretches[layout.rank]
        held[stretch.master].append(stretch)
    for number, master in enumerate(layout.masters):
        end = 0
        for begin, length in [*((stretch.offset, stretch.length) for stretch in held[number]), (master.numel(), 0)]:
            master.detach().view(-1)[end:begin].zero_()
            end = begin + length
