"""From hashes to groups: exact copies, proposals by bands, confirmed in colour."""

# N samples

from dataclasses import dataclass

import numpy as np

from curation.duplicates.banding import NearHashes, pack, unpack
from curation.duplicates.embedding import join_by_embedding
from curation.duplicates.gathering import Samples
from curation.duplicates.grouping import Groups, Proposals, exact_copies, group, with_copies
from curation.duplicates.kernels import NONE


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What counts as a duplicate.

    Attributes:
        radius: bits that two hashes may differ in.
        crops: whether a small crop does.
        mirror: whether what a mirror shows does.
        embedding: least cosine of two embeddings; None: they are not looked at.
    """

    radius: int
    crops: bool
    mirror: bool
    embedding: float | None = None


def find_duplicates(samples: Samples, looking: Looking, *, num_threads: int) -> Groups:
    """Return the groups of all samples, which depend on nothing but them and on how they are looked at."""
    originals = exact_copies(samples.exact, samples.preferred)
    ranked = samples.preferred[originals[samples.preferred] == samples.preferred]
    proposals = _propose(samples, looking, num_threads=num_threads)
    involved = proposals.involved(ranked)
    rows = np.full(len(involved), NONE)
    rows[involved] = np.arange(involved.sum(), dtype=np.uint32)
    thumbnails = samples.thumbnails(involved)
    groups = group(ranked, proposals, thumbnails=thumbnails, rows=rows, crops=looking.crops)
    if looking.embedding is not None:
        groups = join_by_embedding(samples, groups, ranked=ranked, threshold=looking.embedding)
    return with_copies(groups, originals)


def _propose(samples: Samples, looking: Looking, *, num_threads: int) -> Proposals:
    hashes, bucket = np.unique(samples.hashes, return_inverse=True)
    num = max(1, len(samples.hashes))
    each_view, each_mirrored = len(samples.views) // num, len(samples.mirrored) // num
    bucket = bucket.astype(np.uint32)
    per_hash = 1 + (len(samples.views) + len(samples.mirrored)) / max(1, len(hashes))
    near = NearHashes(hashes, looking.radius, queries_per_hash=per_hash, num_threads=num_threads)
    first, second = unpack(near.pairs())
    return Proposals(
        bucket=bucket,
        buckets=np.sort(np.concatenate([pack(first, second), pack(second, first)])),
        views=near.near(samples.views, each=max(1, each_view), skipped=bucket),
        mirrored=near.near(samples.mirrored, each=max(1, each_mirrored)),
    )
