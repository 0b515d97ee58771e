"""Who orthogonalises which of the matrices that ranks have stretches of, and how stretches get there and back.

A matrix is orthogonalised by one rank: of those that have as much of it as any, or nearly, the one with the least to
do. Where ranks have one stretch of all weights each (ZeRO 1 and 2) few matrices travel, those that are cut; where each
has a share of each weight (ZeRO 3) all do. They travel in bf16, in which GPUs compute products anyway, and what stays
is rounded alike: nothing is that would not be on one rank.

Ranks take turns, so that memory is bounded: in one, each takes matrices of one shape, as many as are taken at once.
"""

# R ranks, m x n a matrix, K matrices of one shape

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from training.loop.layout import Layout, Placed, Stretch
from training.loop.optimizers.newton_schulz import matching_scale, num_multiplications, orthogonalized
from training.loop.sizes import TAKEN_AT_ONCE


def owners(matrices: Sequence[Placed], *, num_ranks: int) -> list[int]:
    """Return who orthogonalises each matrix; the same on all ranks."""
    near = [_near(matrix) for matrix in matrices]
    costs = [num_multiplications(matrix.shape) for matrix in matrices]
    # First what only one rank may take, then the costly.
    order = sorted(range(len(matrices)), key=lambda number: (len(near[number]) > 1, -costs[number]))
    work, found = [0] * num_ranks, [0] * len(matrices)
    for number in order:
        owner = min(near[number], key=work.__getitem__)
        work[owner] += costs[number]
        found[number] = owner
    return found


def _near(matrix: Placed) -> list[int]:
    """Return the ranks that have at least half as much of a matrix as any."""
    lengths = [stretch.length for stretch in matrix.stretches]
    return [rank for rank, length in enumerate(lengths) if 2 * length >= max(lengths)]


def turns_of(layout: Layout) -> list["Turn"]:
    """Return the turns in which the matrices of a layout are orthogonalised; all ranks take all of them."""
    if not layout.weights:
        return []
    num_ranks = len(layout.weights[0].stretches)
    of_ranks: list[list[Placed]] = [[] for _ in range(num_ranks)]
    for matrix, owner in zip(layout.weights, owners(layout.weights, num_ranks=num_ranks), strict=True):
        of_ranks[owner].append(matrix)
    taken = zip_longest(*(_pieces(matrices) for matrices in of_ranks), fillvalue=())
    return [Turn(of_owners, rank=layout.rank) for of_owners in taken]


def _pieces(matrices: Sequence[Placed]) -> list[Sequence[Placed]]:
    """Return matrices of one shape together, as many as are taken at once."""
    by_shape: dict[torch.Size, list[Placed]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    pieces: list[Sequence[Placed]] = []
    for shape, alike in by_shape.items():
        size = max(1, TAKEN_AT_ONCE // shape.numel())
        pieces += [alike[start : start + size] for start in range(0, len(alike), size)]
    return pieces


class Turn:
    """Matrices that ranks orthogonalise at a time, each of one shape: as one of the ranks sees it."""

    def __init__(self, of_owners: Sequence[Sequence[Placed]], *, rank: int) -> None:
        """Take the matrices of each rank, and which of the ranks this is."""
        ranks = range(len(of_owners))
        self._own, self._rank = of_owners[rank], rank
        # What goes to each rank, and comes from it, in the order of its matrices.
        self._sent = [
            [matrix.stretches[rank] for matrix in of_owners[other] if matrix.stretches[rank].length]
            if other != rank
            else []
            for other in ranks
        ]
        self._scales = [
            matching_scale(matrix.shape)
            for other in ranks
            for matrix in of_owners[other]
            if other != rank and matrix.stretches[rank].length
        ]
        self._num_sent = [sum(stretch.length for stretch in stretches) for stretches in self._sent]
        self._num_received = [
            sum(matrix.stretches[other].length for matrix in self._own) if other != rank else 0 for other in ranks
        ]
        self._is_exchanged = any(
            stretch.length and other != owner
            for owner in ranks
            for matrix in of_owners[owner]
            for other, stretch in enumerate(matrix.stretches)
        )

    def orthogonalize(self, updates: Sequence[Tensor], *, device: torch.device) -> None:
        """Put in the place of matrices the nearest orthogonal ones, as large as AdamW's updates; all ranks must call.

        `updates` are the layout's masters' own, laid flat, in fp32; products are computed on `device`.
        """
        place = updates[0].device
        sent = torch.empty(sum(self._num_sent), dtype=torch.bfloat16, device=place)
        received = torch.empty(sum(self._num_received), dtype=torch.bfloat16, device=place)
        mine = _parts_in(updates, chain.from_iterable(self._sent))
        carried = list(sent.split([part.numel() for part in mine]))
        _copy(carried, mine)
        self._exchange(received, sent, self._num_received, self._num_sent)
        if self._own:
            self._take(updates, received, device=device)
        self._exchange(sent, received, self._num_sent, self._num_received)
        _copy(mine, carried)
        _scale(mine, self._scales)

    def _take(self, updates: Sequence[Tensor], received: Tensor, *, device: torch.device) -> None:
        """Orthogonalise this rank's own matrices, of what it has of them and has received, and put them there again."""
        num_matrices, shape = len(self._own), self._own[0].shape
        matrices = torch.empty(num_matrices, shape.numel(), dtype=torch.bfloat16, device=received.device)
        held = [matrix.stretches[self._rank] for matrix in self._own]
        own = _parts_in(updates, held)
        inside = [matrices[number].narrow(0, part.start, part.length) for number, part in enumerate(held)]
        others = [
            (number, matrix.stretches[other])
            for other, from_other in enumerate(self._num_received)
            if from_other
            for number, matrix in enumerate(self._own)
        ]
        come = list(received.split([part.length for _, part in others]))
        around = [matrices[number].narrow(0, part.start, part.length) for number, part in others]
        _copy([*inside, *around], [*own, *come])
        found = orthogonalized(matrices.view(num_matrices, *shape).to(device)).reshape(num_matrices, -1)
        matrices.copy_(found)
        _copy([*own, *come], [*inside, *around])
        _scale(own, [matching_scale(shape)] * num_matrices)

    def _exchange(self, output: Tensor, source: Tensor, num_output: list[int], num_source: list[int]) -> None:
        if self._is_exchanged:
            dist.all_to_all_single(output, source, num_output, num_source)


def _parts_in(tensors: Sequence[Tensor], stretches: Iterable[Stretch]) -> list[Tensor]:
    return [tensors[each.master].narrow(0, each.offset, each.length) for each in stretches]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch.ops.aten._foreach_copy_.default(targets, sources)


def _scale(tensors: list[Tensor], factors: list[float]) -> None:
    if tensors:
        torch.ops.aten._foreach_mul_.ScalarList(tensors, factors)
