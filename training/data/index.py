"""Where each sample's payloads lie in the shards of a stage's datasets.

Latents and captions are joined by key, shard by shard and only when a shard is needed, so that a rank holds the
tables of the few shards around its position, not of the whole data set.
"""

# n samples of a shard

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.store.feature_store import load_index
from training.data.cache import ShardFile
from training.data.directories import FeatureDirectory
from training.data.features import Dataset

LATENT_NUMBERS = ("mean_offset", "std_offset", "crc32", "channels", "height", "width")
CAPTION_NUMBERS = ("offset", "scale_offset", "crc32", "num_tokens")
LATENT_COLUMNS = ("key", *LATENT_NUMBERS, "bucket", "label", "reject")
TEXT_COLUMNS = ("key", *CAPTION_NUMBERS, "weight", "reject")
NUM_CACHED_TABLES = 64
NOT_THERE = -1


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """The samples of a shard that can be trained on, sorted by bucket: rows [n], and their captions [m].

    Attributes:
        name: of the shard.
        keys: of the samples, Python strings, [n].
        bucket_names, bucket_starts: the buckets of this shard, and the row where each starts; ends with n.
        latents: columns `LATENT_NUMBERS`, [n, 6].
        labels: [n]; -1 without labels.
        captions: columns `CAPTION_NUMBERS`, [m, 4].
        caption_starts: captions of row i are [caption_starts[i], caption_starts[i + 1]), [n + 1].
        caption_shares: row plus the cumulative share of the sample's weight, [m]: so row plus a uniform number picks
            a caption. Checksums and offsets of scales that the index lacks are -1.
    """

    name: str
    keys: np.ndarray
    bucket_names: list[str]
    bucket_starts: np.ndarray
    latents: np.ndarray
    labels: np.ndarray
    captions: np.ndarray
    caption_starts: np.ndarray
    caption_shares: np.ndarray

    @cached_property
    def first_rows(self) -> dict[str, int]:
        """The first row of each bucket."""
        return dict(zip(self.bucket_names, self.bucket_starts.tolist(), strict=False))

    def choose_captions(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return the captions of `rows` that the uniform numbers `draws` in [0, 1) pick, by weight."""
        if len(self.captions) == len(self.keys):
            return rows
        chosen = np.searchsorted(self.caption_shares, rows + draws, side="right")
        return np.clip(chosen, self.caption_starts[rows], self.caption_starts[rows + 1] - 1)

    def bucket_counts(self) -> dict[str, int]:
        """Return the number of samples of each bucket of this shard."""
        counts = np.diff(self.bucket_starts).tolist()
        return dict(zip(self.bucket_names, counts, strict=True))


@dataclass(frozen=True)
class OpenShard:
    """A shard's table, and its tars mapped into memory as bytes; close it when no batch needs it any more."""

    table: ShardTable
    latents: np.ndarray
    text: np.ndarray | None
    files: list[ShardFile]

    def close(self) -> None:
        """Let a cache remove the files. Their mapping stays valid as long as somebody holds the arrays."""
        for file in self.files:
            file.close()


class FeatureIndex:
    """The joined index of a stage's shards, numbered through its datasets: all of the first, then of the second."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = list(datasets)
        self._shards = [(dataset, name) for dataset in datasets for name in dataset.shards]
        self._is_stopping = threading.Event()
        self.table: Callable[[int], ShardTable] = lru_cache(maxsize=NUM_CACHED_TABLES)(self.load_table)

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, shard: int) -> str:
        """Return a shard's name."""
        return self._shards[shard][1]

    def dataset(self, shard: int) -> Dataset:
        """Return the dataset a shard belongs to."""
        return self._shards[shard][0]

    def fetch(self, shard: int) -> None:
        """Read a shard's table and bring its remote tars into their cache; raises as `open` does."""
        for file in self._open_tars(shard):
            file.close()

    def open(self, shard: int) -> OpenShard:
        """Map a shard's tars; remote ones are downloaded into their cache first.

        Raises:
            CacheFullError: the cache has no room: all in it is open.
            FileNotFoundError, ValueError, OSError: a file is missing or cannot be used; names it.
        """
        table, files = self.table(shard), self._open_tars(shard)
        try:
            tars = [_map(file, table.name) for file in files]
        except BaseException:
            for file in files:
                file.close()
            raise
        return OpenShard(table, tars[0], tars[1] if len(tars) > 1 else None, files)

    def _open_tars(self, shard: int) -> list[ShardFile]:
        """Open the tars of latents and, if there is text, of captions."""
        dataset, name = self._shards[shard]
        self.table(shard)
        files = [dataset.latents.open(name, ".tar", is_stopping=self._is_stopping)]
        if dataset.text is not None:
            try:
                files.append(dataset.text.open(name, ".tar", is_stopping=self._is_stopping))
            except BaseException:
                files[0].close()
                raise
        return files

    def stop(self) -> None:
        """Give up this index's downloads that are under way, and those that would follow."""
        self._is_stopping.set()

    def load_table(self, shard: int) -> ShardTable:
        """Read a shard's indices.

        Raises:
            FileNotFoundError, ValueError, OSError: an index is missing or cannot be used; names the shard.
        """
        dataset, name = self._shards[shard]
        latents = self._load(dataset.latents, name, LATENT_COLUMNS)
        _require_unique(latents["key"], name, dataset.latents)
        if dataset.text is None:
            return _sort_by_bucket(name, latents, _labels(latents, name), captions=None)
        captions = self._load(dataset.text, name, TEXT_COLUMNS)
        has_caption = _call("is_in", latents["key"], value_set=captions["key"].combine_chunks())
        latents = latents.filter(has_caption)
        return _sort_by_bucket(name, latents, np.full(len(latents), NOT_THERE), captions=captions)

    def _load(self, directory: FeatureDirectory, name: str, columns: Sequence[str]) -> pa.Table:
        with directory.open(name, ".parquet", is_stopping=self._is_stopping) as file:
            return load_index(file.path.parent, [name], columns=columns).filter(pc.field("reject").is_null())


def _map(file: ShardFile, shard: str) -> np.ndarray:
    try:
        # A plain view: slices of np.memmap itself are several times slower to make.
        return np.asarray(np.memmap(file.path, np.uint8, mode="r"))
    except FileNotFoundError:
        raise FileNotFoundError(f"shard {shard}: {file.path} is missing; make its features again") from None
    except ValueError as error:
        raise ValueError(f"shard {shard}: {file.path} cannot be read: {error}; make its features again") from None


def _require_unique(keys: pa.ChunkedArray, shard: str, directory: FeatureDirectory) -> None:
    counts = keys.value_counts()
    if len(counts) < len(keys):
        key = next(entry["values"] for entry in counts.to_pylist() if entry["counts"] > 1)
        raise ValueError(f"shard {shard} of {directory}: key {key} is there twice, so its caption is not certain")


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


def _sort_by_bucket(name: str, latents: pa.Table, labels: np.ndarray, *, captions: pa.Table | None) -> ShardTable:
    encoded = latents["bucket"].combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = sorted(found, key=bucket_size)
    ranks = np.array([names.index(bucket) for bucket in found], dtype=np.int64)
    codes = ranks[encoded.indices.to_numpy()]
    order = np.argsort(codes, kind="stable")
    latents = latents.take(order)
    keys = latents["key"].combine_chunks()
    return ShardTable(
        name=name,
        keys=np.array(keys.to_pylist(), dtype=object),
        bucket_names=names,
        bucket_starts=np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(names)))]),
        latents=_numbers(latents, LATENT_NUMBERS),
        labels=labels[order],
        **_group_captions(keys, captions),
    )


def _numbers(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Return integer columns side by side, int64 [rows, names]; nulls are -1."""
    columns = [table[name].cast(pa.int64()).fill_null(NOT_THERE).to_numpy() for name in names]
    return np.stack(columns, axis=1)


def _group_captions(keys: pa.Array, captions: pa.Table | None) -> dict[str, np.ndarray]:
    """Sort captions by the row of their sample; captions of samples without latents are left out."""
    if captions is None:
        return {
            "captions": np.zeros((0, len(CAPTION_NUMBERS)), dtype=np.int64),
            "caption_starts": np.zeros(len(keys) + 1, dtype=np.int64),
            "caption_shares": np.zeros(0),
        }
    rows = _call("index_in", captions["key"], value_set=keys).fill_null(-1).to_numpy()
    order = np.argsort(rows, kind="stable")
    order = order[np.searchsorted(rows[order], 0) :]
    rows = rows[order]
    weights = captions["weight"].to_numpy().astype(np.float64)[order]
    starts = np.searchsorted(rows, np.arange(len(keys) + 1))
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    before, total = cumulative[starts[rows]], cumulative[starts[rows + 1]] - cumulative[starts[rows]]
    return {
        "captions": _numbers(captions, CAPTION_NUMBERS)[order],
        "caption_starts": starts,
        "caption_shares": rows + (cumulative[1:] - before) / total,
    }
