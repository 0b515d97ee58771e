"""What a stage trains on: the shards of its feature directories, and where each sample's payloads lie.

Latents and captions are joined by key, shard by shard and only when a shard is needed, so that a rank holds the
tables of the few shards around its position, not of the whole data set.
"""

# S shards, K buckets, n samples of a shard

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.feature_store import load_index
from pipelines.storage import atomic_write_json

LATENT_COLUMNS = (
    "key", "mean_offset", "std_offset", "channels", "height", "width", "bucket", "label", "reject",
)  # fmt: skip
TEXT_COLUMNS = ("key", "offset", "num_tokens", "weight", "reject")
NUM_COUNTING_THREADS = 8
NUM_CACHED_TABLES = 256


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """The samples of a shard that can be trained on, sorted by bucket: rows [n], and their captions.

    Captions of row i are [caption_starts[i], caption_starts[i + 1]) of the caption arrays; `caption_shares` is each
    caption's cumulative share of its sample's weight, so a uniform number picks one. Without text all are empty.
    """

    keys: pa.Array
    bucket_names: list[str]
    bucket_starts: np.ndarray
    mean_offsets: np.ndarray
    std_offsets: np.ndarray
    channels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    labels: np.ndarray
    caption_starts: np.ndarray
    caption_offsets: np.ndarray
    caption_tokens: np.ndarray
    caption_shares: np.ndarray

    def row(self, bucket_name: str, ordinal: int) -> int:
        """Return the row of the `ordinal`-th sample of a bucket."""
        return int(self.bucket_starts[self.bucket_names.index(bucket_name)]) + ordinal

    def choose_caption(self, row: int, draw: float) -> int:
        """Return the caption of a row that the uniform number `draw` in [0, 1) picks, by weight."""
        start, stop = int(self.caption_starts[row]), int(self.caption_starts[row + 1])
        chosen = start + int(np.searchsorted(self.caption_shares[start:stop], draw, side="right"))
        return min(chosen, stop - 1)

    def bucket_counts(self) -> dict[str, int]:
        """Return the number of samples of each bucket of this shard."""
        counts = np.diff(self.bucket_starts).tolist()
        return dict(zip(self.bucket_names, counts, strict=True))


class FeatureIndex:
    """The joined index of a stage's shards.

    Args:
        latents: directory of the latents, `features/latent-<resolution>`.
        text: directory of the embeddings, or None for stage 1, which is conditioned on labels.
        shards: names of the shards, in any order that is always the same.
    """

    def __init__(self, latents: Path, text: Path | None, shards: Sequence[str]) -> None:
        self.latents = latents
        self.text = text
        self.shards = list(shards)
        self.table: Callable[[int], ShardTable] = lru_cache(maxsize=NUM_CACHED_TABLES)(self._load)

    def survey(self) -> "Survey":
        """Count all samples; reads every shard's index once.

        Raises:
            FileNotFoundError, ValueError: a shard's index is missing or cannot be used; names the shard.
        """
        with ThreadPoolExecutor(NUM_COUNTING_THREADS) as pool:
            shards = list(pool.map(lambda shard: _describe(self._load(shard)), range(len(self.shards))))
        buckets = sorted({name for shard in shards for name in shard.counts}, key=bucket_size)
        if not buckets:
            raise ValueError(f"{self.latents}: no sample of {len(self.shards)} shards has all its features")
        channels = {size for shard in shards for size in shard.channels}
        downsample = {size for shard in shards for size in shard.downsample}
        if len(channels) > 1 or len(downsample) > 1:
            raise ValueError(f"{self.latents}: latents of several VAEs: channels {channels}, pixels each {downsample}")
        return Survey(
            shards=self.shards,
            buckets=buckets,
            counts=[[shard.counts.get(name, 0) for name in buckets] for shard in shards],
            channels=channels.pop(),
            downsample=downsample.pop(),
            max_label=max(shard.max_label for shard in shards),
        )

    def _load(self, shard: int) -> ShardTable:
        name = self.shards[shard]
        latents = load_index(self.latents, [name], columns=LATENT_COLUMNS)
        latents = latents.filter(pc.field("reject").is_null())
        if self.text is None:
            return _sort_by_bucket(latents, _labels(latents, name), captions=None)
        captions = load_index(self.text, [name], columns=TEXT_COLUMNS)
        captions = captions.filter(pc.field("reject").is_null())
        has_caption = _call("is_in", latents["key"], value_set=captions["key"].combine_chunks())
        latents = latents.filter(has_caption)
        return _sort_by_bucket(latents, np.full(len(latents), -1), captions=captions)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What all shards hold together.

    Attributes:
        shards, buckets: names, in the order of the rows and columns of `counts`.
        counts: number of samples by shard and bucket.
        channels: of the latents.
        downsample: pixels of one latent, each way.
        max_label: largest class label, -1 without labels.
    """

    shards: list[str]
    buckets: list[str]
    counts: list[list[int]]
    channels: int
    downsample: int
    max_label: int


class _ShardSurvey(NamedTuple):
    counts: dict[str, int]
    channels: set[int]
    downsample: set[int]
    max_label: int


def _describe(table: ShardTable) -> _ShardSurvey:
    # A shard's buckets are those it has samples of, so each has a first row.
    first_heights = table.heights[table.bucket_starts[:-1]].tolist()
    heights = [bucket_size(name)[0] for name in table.bucket_names]
    return _ShardSurvey(
        counts=table.bucket_counts(),
        channels={int(value) for value in table.channels},
        downsample={pixels // size for pixels, size in zip(heights, first_heights, strict=True)},
        max_label=int(table.labels.max(initial=-1)),
    )


def save_survey(survey: Survey, path: Path, *, identity: str) -> None:
    """Keep a survey, so that ranks and later runs need not read every shard's index again."""
    atomic_write_json(path, {"identity": identity, **asdict(survey)})


def load_survey(path: Path, *, identity: str) -> Survey | None:
    """Return the survey kept at `path` if it is of the data that `identity` stands for."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    return Survey(**content) if content.pop("identity") == identity else None


def bucket_size(name: str) -> tuple[int, int]:
    """Return height and width in pixels of a bucket called `HxW`."""
    height, width = name.split("x")
    return int(height), int(width)


def _call(function: str, *arguments: Any, value_set: pa.Array) -> Any:
    return pc.call_function(function, list(arguments), pc.SetLookupOptions(value_set=value_set))


def _labels(latents: pa.Table, shard: str) -> np.ndarray:
    labels = latents["label"]
    if labels.null_count:
        key = latents.filter(pc.field("label").is_null())["key"][0]
        raise ValueError(f"shard {shard}: sample {key} has no class label; stage 1 needs tars with `.cls` members")
    return labels.to_numpy().astype(np.int64)


def _sort_by_bucket(latents: pa.Table, labels: np.ndarray, *, captions: pa.Table | None) -> ShardTable:
    buckets = latents["bucket"].to_pylist()
    names = sorted(set(buckets), key=bucket_size)
    codes = np.array([names.index(bucket) for bucket in buckets], dtype=np.int64)
    order = np.argsort(codes, kind="stable")
    latents = latents.take(order)
    keys = latents["key"].combine_chunks()

    def column(name: str) -> np.ndarray:
        return latents[name].to_numpy().astype(np.int64)

    starts, offsets, tokens, shares = _group_captions(keys, captions)
    return ShardTable(
        keys=keys,
        bucket_names=names,
        bucket_starts=np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(names)))]),
        mean_offsets=column("mean_offset"),
        std_offsets=column("std_offset"),
        channels=column("channels"),
        heights=column("height"),
        widths=column("width"),
        labels=labels[order],
        caption_starts=starts,
        caption_offsets=offsets,
        caption_tokens=tokens,
        caption_shares=shares,
    )


def _group_captions(keys: pa.Array, captions: pa.Table | None) -> tuple[np.ndarray, ...]:
    """Sort captions by the row of their sample; captions of samples without latents are left out."""
    if captions is None:
        empty = np.zeros(0, dtype=np.int64)
        return np.zeros(len(keys) + 1, dtype=np.int64), empty, empty, np.zeros(0)
    rows = _call("index_in", captions["key"], value_set=keys).fill_null(-1).to_numpy()
    order = np.argsort(rows, kind="stable")
    order = order[np.searchsorted(rows[order], 0) :]
    rows = rows[order]
    weights = captions["weight"].to_numpy().astype(np.float64)[order]
    starts = np.searchsorted(rows, np.arange(len(keys) + 1))
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    before, total = cumulative[starts[rows]], cumulative[starts[rows + 1]] - cumulative[starts[rows]]
    shares = (cumulative[1:] - before) / total
    offsets = captions["offset"].to_numpy().astype(np.int64)[order]
    tokens = captions["num_tokens"].to_numpy().astype(np.int64)[order]
    return starts, offsets, tokens, shares
