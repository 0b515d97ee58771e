"""Where each sample's payloads lie in the shards of a stage's datasets.

Families are joined by key, shard by shard and only when a shard is needed, so that a rank holds the tables of the few
shards around its position, not of the whole data set.
"""

# n samples of a shard, m rows of one of its families

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from errors import MissingFileError, UserError
from pipelines.store.families import FamilySchema
from pipelines.store.feature_store import load_index
from training.data.cache import ShardFile
from training.data.choices import NOT_THERE, ChosenSamples, Selection
from training.data.datasets import Dataset
from training.data.directories import FeatureDirectory
from training.data.epochs import PLACES
from training.mixture import DatasetRole

NUM_CACHED_TABLES = 64
SIZE_COLUMNS = ("original_height", "original_width")
CAPTION_COLUMNS = ("caption_index", "weight")


@dataclass(frozen=True, kw_only=True)
class FamilyRows:
    """Index rows of one family that belong to the samples of a shard, in the samples' order.

    Attributes:
        columns: of `numbers`, see `number_columns`.
        numbers: int64 [m, columns]; what the index lacks is -1.
        starts: rows of sample i are [starts[i], starts[i + 1]), [n + 1].
        shares: sample plus the cumulative share of its weight, [m]: so sample plus a uniform number picks a row.
    """

    columns: tuple[str, ...]
    numbers: np.ndarray
    starts: np.ndarray
    shares: np.ndarray

    def choose(self, samples: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return the rows of `samples` that the uniform numbers `draws` in [0, 1) pick, by weight."""
        if len(self.numbers) == len(self.starts) - 1:
            return samples
        chosen = np.searchsorted(self.shares, samples + draws, side="right")
        return np.clip(chosen, self.starts[samples], self.starts[samples + 1] - 1)

    def column(self, name: str) -> np.ndarray:
        """Return one column, [m]."""
        return self.numbers[:, self.columns.index(name)]


def number_columns(family: FamilySchema) -> tuple[str, ...]:
    """Return the columns of an index that a reader needs: offsets of the tensors first, sizes, and the checksum."""
    sizes = [size for tensor in family.tensors for size in tensor.shape if isinstance(size, str)]
    return (*(tensor.offset for tensor in family.tensors), *dict.fromkeys(sizes), "crc32")


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """The samples of a shard that can be trained on, sorted by bucket.

    Attributes:
        name: of the shard.
        keys: of the samples, Python strings, [n].
        bucket_names, bucket_starts: the buckets of this shard, and the sample where each starts; ends with n.
        labels: [n]; -1 without labels.
        original_sizes: height and width of each image in pixels, as it was before it was cut, [n, 2]; -1 where the
            index does not say it.
        families: rows of each family, by its name.
        weights: how often samples are drawn, relative to each other, [n]; None where all are drawn alike.
        selection: where the dataset chooses its samples, what it chose of this shard.
    """

    name: str
    keys: np.ndarray
    bucket_names: list[str]
    bucket_starts: np.ndarray
    labels: np.ndarray
    original_sizes: np.ndarray
    families: dict[str, FamilyRows]
    weights: np.ndarray | None = None
    selection: Selection | None = None

    @cached_property
    def first_rows(self) -> dict[str, int]:
        """The first sample of each bucket."""
        return dict(zip(self.bucket_names, self.bucket_starts.tolist(), strict=False))

    @cached_property
    def stretch_ends(self) -> list[np.ndarray]:
        """Of each bucket, where its samples' stretches end on the line of the cell, whose length is 1."""
        assert self.weights is not None
        ends = []
        for weights in np.split(self.weights, self.bucket_starts[1:-1]):
            cumulative = np.cumsum(weights / weights.max())
            ends.append(cumulative / cumulative[-1])
        return ends

    def find(self, bucket: str, ordinals: np.ndarray) -> np.ndarray:
        """Return the samples that the ordinals of a planned batch mean, [B]."""
        if self.weights is None:
            return self.first_rows[bucket] + ordinals
        ends = self.stretch_ends[self.bucket_names.index(bucket)]
        found = np.searchsorted(ends, ordinals / PLACES, side="right")
        return self.first_rows[bucket] + np.minimum(found, len(ends) - 1)

    def bucket_counts(self) -> dict[str, int]:
        """Return the number of samples of each bucket of this shard."""
        counts = np.diff(self.bucket_starts).tolist()
        return dict(zip(self.bucket_names, counts, strict=True))

    def bucket_weights(self) -> dict[str, float]:
        """Return the sum of the weights of each bucket of this shard."""
        assert self.weights is not None
        parts = np.split(self.weights, self.bucket_starts[1:-1])
        return {name: math.fsum(part.tolist()) for name, part in zip(self.bucket_names, parts, strict=False)}


@dataclass(frozen=True)
class OpenShard:
    """A shard's table, and its tars by family, mapped into memory as bytes; close it when no batch needs it more.

    `role` is that of its dataset.
    """

    table: ShardTable
    tars: dict[str, np.ndarray]
    files: dict[str, ShardFile]
    role: DatasetRole = "instance"

    def close(self) -> None:
        """Let a cache remove the files. Their mapping stays valid as long as somebody holds the arrays."""
        for file in self.files.values():
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
        for file in self._open_tars(shard).values():
            file.close()

    def open(self, shard: int) -> OpenShard:
        """Map a shard's tars; remote ones are downloaded into their cache first.

        Raises:
            CacheFullError: the cache has no room: all in it is open.
            MissingFileError, UserError, StorageError: a file is missing or cannot be used; names it.
        """
        table, files = self.table(shard), self._open_tars(shard)
        try:
            tars = {family: _map(file, table.name) for family, file in files.items()}
        except BaseException:
            for file in files.values():
                file.close()
            raise
        return OpenShard(table, tars, files, self.dataset(shard).role)

    def _open_tars(self, shard: int) -> dict[str, ShardFile]:
        """Open the tar of each family."""
        dataset, name = self._shards[shard]
        self.table(shard)
        files: dict[str, ShardFile] = {}
        try:
            for directory in dataset.directories:
                files[directory.family.name] = directory.open(name, ".tar", is_stopping=self._is_stopping)
        except BaseException:
            for file in files.values():
                file.close()
            raise
        return files

    def stop(self) -> None:
        """Give up this index's downloads that are under way, and those that would follow."""
        self._is_stopping.set()

    def load_table(self, shard: int) -> ShardTable:
        """Read a shard's indices.

        Raises:
            MissingFileError, UserError, StorageError: an index is missing or cannot be used; names the shard.
        """
        dataset, name = self._shards[shard]
        leading, *others = dataset.directories
        chosen = None if dataset.choice is None else dataset.choice.read(name, is_stopping=self._is_stopping)
        indices = [self._load(each, name, which_caption=chosen is not None) for each in dataset.directories]
        pairs = zip(dataset.directories, indices, strict=True)
        samples, *joined = [_kept(index, directory, name, chosen=chosen) for directory, index in pairs]
        for rows in joined:
            samples = samples.filter(_call("is_in", samples["key"], value_set=rows["key"].combine_chunks()))
        labels = _labels(samples, name) if dataset.has_labels else np.full(len(samples), NOT_THERE)
        selection = None
        if chosen is not None:
            joined, num_without = _weigh_captions(chosen, samples, joined)
            own = [pair for pair in zip(dataset.directories, indices, strict=True) if pair[0].called is None]
            missing = {str(directory): chosen.without_features(index) for directory, index in own}
            selection = chosen.selection(missing, num_without_caption_weight=num_without)
        families = [(directory.family, rows) for directory, rows in zip(others, joined, strict=True)]
        table = _sort_by_bucket(name, samples, labels, leading=leading.family, joined=families)
        return table if chosen is None else replace(table, weights=chosen.weights_of(table.keys), selection=selection)

    def _load(self, directory: FeatureDirectory, name: str, *, which_caption: bool) -> pa.Table:
        """Read an index, its rejects too, and `which_caption` a row is of."""
        family = directory.family
        wanted = {"key", *number_columns(family), "weight", "bucket", "label", "reject"}
        wanted |= set(SIZE_COLUMNS) if family.leads else set()
        wanted |= set(CAPTION_COLUMNS) if which_caption else set()
        columns = [column for column in family.columns.names if column in wanted]
        with directory.open(name, ".parquet", is_stopping=self._is_stopping) as file:
            return load_index(file.path.parent, [name], columns=columns)


def _kept(index: pa.Table, directory: FeatureDirectory, shard: str, *, chosen: ChosenSamples | None) -> pa.Table:
    """Return the rows of an index that have features, of the samples that are chosen."""
    table = index.filter(pc.field("reject").is_null())
    if chosen is not None:
        table = table.filter(_call("is_in", table["key"], value_set=chosen.keys))
    if not directory.family.is_ragged:
        _require_unique(table["key"], shard, directory)
    return table


def _weigh_captions(chosen: ChosenSamples, samples: pa.Table, joined: Sequence[pa.Table]) -> tuple[list[pa.Table], int]:
    """Put a choice's weights of captions into their index; returns of how many samples no caption has one, too."""
    weighed, num_without = [], 0
    for rows in joined:
        if chosen.caption_weights and set(CAPTION_COLUMNS).issubset(rows.column_names):
            rows = rows.filter(_call("is_in", rows["key"], value_set=samples["key"].combine_chunks()))
            rows, num_without = chosen.weigh_captions(rows)
        weighed.append(rows)
    return weighed, num_without


def _map(file: ShardFile, shard: str) -> np.ndarray:
    try:
        # A plain view: slices of np.memmap itself are several times slower to make.
        return np.asarray(np.memmap(file.path, np.uint8, mode="r"))
    except FileNotFoundError:
        raise MissingFileError(f"shard {shard}: {file.path} is missing; make its features again") from None
    except ValueError as error:
        raise UserError(f"shard {shard}: {file.path} cannot be read: {error}; make its features again") from None


def _require_unique(keys: pa.ChunkedArray, shard: str, directory: FeatureDirectory) -> None:
    counts = keys.value_counts()
    if len(counts) < len(keys):
        key = next(entry["values"] for entry in counts.to_pylist() if entry["counts"] > 1)
        raise UserError(f"shard {shard} of {directory}: key {key} is there twice, so what goes with it is not certain")


def bucket_size(name: str) -> tuple[int, int]:
    """Return height and width in pixels of a bucket called `HxW`."""
    height, width = name.split("x")
    return int(height), int(width)


def _call(function: str, *arguments: Any, value_set: pa.Array) -> Any:
    return pc.call_function(function, list(arguments), pc.SetLookupOptions(value_set=value_set))


def _labels(samples: pa.Table, shard: str) -> np.ndarray:
    labels = samples["label"]
    if labels.null_count:
        key = samples.filter(pc.field("label").is_null())["key"][0]
        raise UserError(f"shard {shard}: sample {key} has no class label; a DiT needs tars with `.cls` members")
    return labels.to_numpy().astype(np.int64)


def _sort_by_bucket(
    name: str,
    samples: pa.Table,
    labels: np.ndarray,
    *,
    leading: FamilySchema,
    joined: Sequence[tuple[FamilySchema, pa.Table]],
) -> ShardTable:
    encoded = samples["bucket"].combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = sorted(found, key=bucket_size)
    ranks = np.array([names.index(bucket) for bucket in found], dtype=np.int64)
    codes = ranks[encoded.indices.to_numpy()]
    order = np.argsort(codes, kind="stable")
    samples = samples.take(order)
    keys = samples["key"].combine_chunks()
    families = {leading.name: _group_rows(np.arange(len(keys)), samples, leading, num_samples=len(keys))}
    for family, table in joined:
        owners = _call("index_in", table["key"], value_set=keys).fill_null(NOT_THERE).to_numpy()
        families[family.name] = _group_rows(owners, table, family, num_samples=len(keys))
    return ShardTable(
        name=name,
        keys=np.array(keys.to_pylist(), dtype=object),
        bucket_names=names,
        bucket_starts=np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(names)))]),
        labels=labels[order],
        original_sizes=_numbers(samples, SIZE_COLUMNS),
        families=families,
    )


def _group_rows(owners: np.ndarray, table: pa.Table, family: FamilySchema, *, num_samples: int) -> FamilyRows:
    """Sort the rows of a family by the samples that own them; those of no sample (-1) are left out."""
    order = np.argsort(owners, kind="stable")
    order = order[np.searchsorted(owners[order], 0) :]
    owners = owners[order]
    starts = np.searchsorted(owners, np.arange(num_samples + 1))
    weights = np.ones(len(order))
    if "weight" in table.column_names:
        weights = table["weight"].to_numpy().astype(np.float64)[order]
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    before, total = cumulative[starts[owners]], cumulative[starts[owners + 1]] - cumulative[starts[owners]]
    columns = number_columns(family)
    return FamilyRows(
        columns=columns,
        numbers=_numbers(table, columns)[order],
        starts=starts,
        shares=owners + (cumulative[1:] - before) / total,
    )


def _numbers(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Return integer columns side by side, [rows, columns]; nulls, and all of a column that is not there, are -1."""
    absent = np.full(len(table), NOT_THERE)
    columns = [
        table[name].cast(pa.int64()).fill_null(NOT_THERE).to_numpy() if name in table.column_names else absent
        for name in names
    ]
    return np.stack(columns, axis=1)
