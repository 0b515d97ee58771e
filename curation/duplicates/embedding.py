"""What looks a little different and means the same: near by embedding, in cells of k-means (SemDeDup, 2303.09540)."""

# K kept samples, C cells, D width of embeddings, B rows of a block

import math
from collections.abc import Iterator

import numpy as np

from curation.duplicates.gathering import Samples
from curation.duplicates.grouping import Groups
from curation.duplicates.kernels import EMBEDDING, KEPT

MIN_CELL = 4_096  # fewer samples than this are compared all with all
ROWS_PER_CENTRE = 32
MIN_TRAINING_ROWS = 1 << 14
NUM_ITERATIONS = 8
BLOCK_ROWS = 1_024
ASSIGNED_ROWS = 1 << 14
# The last digits of a product depend on what it is computed with.
NUM_DECIMALS = 4


def join_by_embedding(samples: Samples, groups: Groups, *, ranked: np.ndarray, threshold: float) -> Groups:
    """Let kept samples join better ones in whose cell they are, with a cosine of `threshold` or more.

    What had joined a sample that is now a duplicate itself joins what that one joined, if it is as near to it; else it
    is kept.

    Args:
        samples: all, with embeddings.
        groups: of `ranked`; all others stay as they are.
        ranked: samples, the best first.
        threshold: least cosine of two that are one.
    """
    is_ranked = np.zeros(len(groups.leader), bool)
    is_ranked[ranked] = True
    kept = np.flatnonzero(is_ranked & (groups.kind == KEPT))
    vectors = samples.embeddings(kept, "embeddings_of_kept")
    rank = np.empty(len(groups.leader), np.uint32)
    rank[ranked] = np.arange(len(ranked), dtype=np.uint32)
    leader, kind = groups.leader.copy(), groups.kind.copy()
    for rows in _cells(vectors, rank[kept]):
        joined = _join(_unit(vectors[rows]), threshold)
        moved = np.flatnonzero(joined >= 0)
        leader[kept[rows[moved]]] = kept[rows[joined[moved]]]
        kind[kept[rows[moved]]] = EMBEDDING
    followers = np.flatnonzero(is_ranked & (groups.kind != KEPT) & (kind[leader] == EMBEDDING))
    theirs = leader[leader[followers]]
    own = samples.embeddings(followers, "embeddings_of_followers")
    for start in range(0, len(followers), BLOCK_ROWS):
        some = slice(start, start + BLOCK_ROWS)
        others = _unit(vectors[np.searchsorted(kept, theirs[some])])
        is_near = _rounded((_unit(own[some]) * others).sum(axis=1)) >= threshold
        leader[followers[some]] = np.where(is_near, theirs[some], followers[some])
        kind[followers[some]] = np.where(is_near, EMBEDDING, KEPT)
    return Groups(leader=leader, kind=kind)


def _cells(vectors: np.ndarray, rank: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of each cell, the best first."""
    num = len(vectors)
    num_cells = math.ceil(num / max(MIN_CELL, math.isqrt(2 * num)))
    if num_cells <= 1:
        yield np.argsort(rank)
        return
    centres = _centres(vectors, num_cells)
    cell = np.concatenate(
        [_nearest(_unit(vectors[start : start + ASSIGNED_ROWS]), centres) for start in range(0, num, ASSIGNED_ROWS)]
    )
    order = np.lexsort((rank, cell))
    yield from np.split(order, np.flatnonzero(np.diff(cell[order])) + 1)


def _centres(vectors: np.ndarray, num_cells: int) -> np.ndarray:
    """Return centres of spherical k-means over evenly spaced rows, float32 [C, D]."""
    wanted = max(MIN_TRAINING_ROWS, ROWS_PER_CENTRE * num_cells)
    rows = _unit(vectors[:: max(1, len(vectors) // wanted)])
    centres = rows[np.random.default_rng(0).choice(len(rows), num_cells, replace=False)]
    for _ in range(NUM_ITERATIONS):
        cell = _nearest(rows, centres)
        order = np.argsort(cell, kind="stable")
        there, starts = np.unique(cell[order], return_index=True)
        # A cell that has lost all its rows keeps its centre.
        centres[there] = _unit(np.add.reduceat(rows[order], starts, axis=0))
    return centres


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    parts = [
        _rounded(vectors[start : start + BLOCK_ROWS] @ centres.T).argmax(axis=1)
        for start in range(0, len(vectors), BLOCK_ROWS)
    ]
    return np.concatenate(parts)


def _join(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """Return for each row, the best first, the first kept one that it is near, or -1 where it is kept, int64 [B]."""
    joined = np.full(len(vectors), -1, np.int64)
    kept = np.empty(0, np.int64)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors[start : start + BLOCK_ROWS]
        if len(kept):
            is_near = _rounded(block @ vectors[kept].T) >= threshold
            has_near = is_near.any(axis=1)
            joined[start : start + len(block)] = np.where(has_near, kept[is_near.argmax(axis=1)], -1)
        within = _rounded(block @ block.T) >= threshold
        is_kept = np.zeros(len(block), bool)
        for row in np.flatnonzero(joined[start : start + len(block)] < 0):
            better = np.flatnonzero(within[row, :row] & is_kept[:row])
            if len(better):
                joined[start + row] = start + better[0]
            else:
                is_kept[row] = True
        kept = np.concatenate([kept, start + np.flatnonzero(is_kept)])
    return joined


def _unit(vectors: np.ndarray) -> np.ndarray:
    found = vectors.astype(np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _rounded(cosines: np.ndarray) -> np.ndarray:
    return np.round(cosines, NUM_DECIMALS)
