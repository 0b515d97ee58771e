"""Groups of duplicates: each sample in order of preference joins the first kept sample that it is confirmed to show.

So a group is around its representative, each member near it: nothing hangs together by a chain of others. A sample that
is near a duplicate alone, and not near its representative, is kept.
"""

# N samples, R of them in order of preference, U buckets of samples with one hash, P pairs

from dataclasses import dataclass

import numpy as np

from curation.duplicates.banding import pack, unpack
from curation.duplicates.kernels import EXACT, NONE, group_samples

KINDS = (None, "exact", "perceptual", "mirrored", "embedding")


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Which samples may show one picture: those of one bucket, and pairs.

    Attributes:
        bucket: of each sample, uint32 [N].
        buckets: packed pairs of buckets, in both directions, sorted.
        views: packed pairs of a sample and a bucket that one of its cropped views is near, sorted.
        mirrored: as `views`, of views of the mirrored sample.
    """

    bucket: np.ndarray
    buckets: np.ndarray
    views: np.ndarray
    mirrored: np.ndarray

    def involved(self, ranked: np.ndarray) -> np.ndarray:
        """Return which samples some other of `ranked` may show, bool [N]."""
        is_near = np.bincount(self.bucket[ranked], minlength=int(self.bucket.max(initial=0)) + 1) > 1
        is_near[unpack(self.buckets)[0]] = True
        involved = np.zeros(len(self.bucket), bool)
        for pairs in (self.views, self.mirrored):
            samples, buckets = unpack(pairs)
            involved[samples] = True
            is_near[buckets] = True
        involved[ranked] |= is_near[self.bucket[ranked]]
        return involved


@dataclass(frozen=True, kw_only=True)
class Groups:
    """For each sample its representative, itself where it is kept, uint32 [N], and why, uint8 [N] (see `KINDS`)."""

    leader: np.ndarray
    kind: np.ndarray


def exact_copies(exact: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """Return for each sample the preferred of those with its exact hash, uint32 [N].

    Args:
        exact: uint64 [N, 2].
        preferred: all samples, the best first, uint32 [N].
    """
    order = preferred[np.lexsort((exact[preferred, 1], exact[preferred, 0]))]  # stable: the best stay first
    of_order = exact[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (of_order[1:] != of_order[:-1]).any(axis=1)
    found = np.empty(len(exact), np.uint32)
    found[order] = order[starts][np.cumsum(starts) - 1]
    return found


def group(ranked: np.ndarray, proposals: Proposals, *, thumbnails: np.ndarray, rows: np.ndarray, crops: bool) -> Groups:
    """Return the groups of some samples.

    Args:
        ranked: the samples, the best first, uint32 [R]; others stay alone.
        proposals: see there.
        thumbnails: of those that are involved, uint8 [I, 864].
        rows: of each sample among `thumbnails`, `NONE` where it is not involved, uint32 [N].
        crops: whether a small crop of a picture is the same.
    """
    num = len(proposals.bucket)
    leader, kind = np.arange(num, dtype=np.uint32), np.zeros(num, np.uint8)
    rank = np.full(num, NONE)
    rank[ranked] = np.arange(len(ranked), dtype=np.uint32)
    sizes = np.bincount(proposals.bucket)
    kept = (np.empty(num, np.uint32), np.cumsum(sizes) - sizes, np.zeros(len(sizes), np.uint32))
    views, mirrored = proposals.views, proposals.mirrored
    pairs = (proposals.buckets, views, _turned(views), mirrored, _turned(mirrored))
    state, state_mirrored = (
        (rank, np.full(size, -1, np.int64), thumbnails, rows, crops) for size in (num, num if len(mirrored) else 0)
    )
    group_samples(ranked, proposals.bucket, pairs, state, state_mirrored, kept, leader, kind)
    return Groups(leader=leader, kind=kind)


def with_copies(groups: Groups, originals: np.ndarray) -> Groups:
    """Return groups in which each exact copy is where the preferred of its kind, `originals`, is."""
    is_copy = originals != np.arange(len(originals))
    leader = np.where(is_copy, groups.leader[originals], groups.leader)
    is_of_kept = is_copy & (leader == originals)
    kind = np.where(is_copy, groups.kind[originals], groups.kind)
    return Groups(leader=leader, kind=np.where(is_of_kept, EXACT, kind).astype(np.uint8))


def _turned(pairs: np.ndarray) -> np.ndarray:
    first, second = unpack(pairs)
    return np.sort(pack(second, first))
