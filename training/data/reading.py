"""How the rows of one family become tensors of a batch: payload bytes, copied from mapped tars into its buffers."""

# B samples of a micro-batch, T rows of the first dimension (tokens) of all its samples, D width

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from errors import UserError
from pipelines.store.families import FamilySchema, mend_null_caption
from pipelines.store.feature_store import payload_crc32
from training.data.batch import Buffers, PackedRows
from training.data.directories import FeatureDirectory
from training.data.index import NOT_THERE, OpenShard, number_columns

# What numpy's names of stored dtypes are to torch.
TORCH_DTYPES = {
    "uint16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "uint8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# No embedding is stacked: there bytes are levels of pixels.
STACKED_DTYPES = TORCH_DTYPES | {"uint8": torch.uint8}


@dataclass(frozen=True, kw_only=True)
class LocatedSamples:
    """Samples of a micro-batch and where their payloads are.

    Attributes:
        keys: [B].
        shards: each sample's, open, [B].
        rows: by family, the row chosen for each sample: columns `number_columns`, [B, columns].
        labels: [B].
        original_sizes: height and width of their images, [B, 2]; -1 where that is not known.
    """

    keys: list[str]
    shards: list[OpenShard]
    rows: dict[str, np.ndarray]
    labels: np.ndarray
    original_sizes: np.ndarray


class StackedReading:
    """Reads a family whose tensors have one shape in a bucket, such as latents."""

    def __init__(self, family: FamilySchema, *, checks_payloads: bool) -> None:
        self._family = family
        self._checks_payloads = checks_payloads
        columns = number_columns(family)
        self._sizes = range(len(family.tensors), columns.index("crc32"))
        self._columns = columns

    def shape(self, row: np.ndarray) -> tuple[int, ...]:
        """Return the shape of the first tensor by one index row."""
        return self._family.tensors[0].shape_in(dict(zip(self._columns, row.tolist(), strict=True)))

    def read(self, buffers: Buffers, samples: LocatedSamples) -> dict[str, Tensor]:
        """Copy the tensors of `samples` into `buffers`; returns them by name, each [B, ...].

        Raises:
            UserError: shapes differ, a tar is shorter than its index says, or bytes have changed; names shard and key.
        """
        family, rows = self._family, samples.rows[self._family.name]
        self._require_one_shape(samples)
        first = dict(zip(self._columns, rows[0].tolist(), strict=True))
        tensors = {
            tensor.name: buffers.take(
                f"{family.name}.{tensor.name}",
                (len(rows), *tensor.shape_in(first)),
                dtype=STACKED_DTYPES[tensor.dtype],
            )
            for tensor in family.tensors
        }
        targets = [tensor.view(torch.uint8).numpy().reshape(len(rows), -1) for tensor in tensors.values()]
        tars = [shard.tars[family.name] for shard in samples.shards]
        for target, offsets in zip(targets, rows.T, strict=False):
            starts = np.arange(len(target) + 1) * target.shape[1]
            copy_payloads(tars, offsets, target.reshape(-1), starts, samples)
        if self._checks_payloads:
            found = [payload_crc32(*payloads) for payloads in zip(*targets, strict=True)]
            check_crcs(samples, family.name, found, rows[:, -1])
        return tensors

    def _require_one_shape(self, samples: LocatedSamples) -> None:
        rows = samples.rows[self._family.name]
        sizes = rows[:, self._sizes.start : self._sizes.stop]
        if (odd := np.flatnonzero((sizes != sizes[0]).any(axis=1))).size:
            i = int(odd[0])
            raise UserError(
                f"shard {samples.shards[i].table.name}: {self._family.name} of {samples.keys[i]} are "
                f"{self.shape(rows[i])}, but {self.shape(rows[0])} in other samples of the same bucket"
            )


class RaggedReading:
    """Reads a family whose rows differ in length, such as captions: end to end, those left out that are dropped.

    Raises:
        MissingFileError: the directory has no null file.
    """

    def __init__(self, directory: FeatureDirectory, *, checks_payloads: bool) -> None:
        self._family = directory.family
        self._checks_payloads = checks_payloads
        assert self._family.null_file is not None
        self._null = read_null(directory, self._family.null_file)
        (length,) = dict.fromkeys(tensor.shape[0] for tensor in self._family.tensors)
        assert isinstance(length, str), "rows of one length are stacked"
        self._length = number_columns(self._family).index(length)

    def read(self, buffers: Buffers, samples: LocatedSamples, *, is_dropped: np.ndarray) -> PackedRows:
        """Copy the rows of `samples` into `buffers` end to end, as they are stored, but for those that are dropped.

        Raises:
            UserError: a tar is shorter than its index says, or bytes have changed; names shard and key.
        """
        family, rows = self._family, samples.rows[self._family.name]
        lengths = np.where(is_dropped, 0, rows[:, self._length])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        tensors, targets = [], []
        for tensor in family.tensors:
            dtype, sizes = TORCH_DTYPES[tensor.dtype], tensor.shape[1:]
            shape = (int(ends[-1]), *(size for size in sizes if isinstance(size, int)))
            tensors.append(buffers.take(f"{family.name}.{tensor.offset}", shape, dtype=dtype))
            targets.append(
                (tensors[-1].view(torch.uint8).numpy().reshape(-1), ends * int(np.prod(shape[1:])) * dtype.itemsize)
            )
        tars = [shard.tars[family.name] for shard in samples.shards]
        for (target, starts), offsets in zip(targets, rows.T, strict=False):
            copy_payloads(tars, offsets, target, starts, samples)
        if self._checks_payloads:
            parts = [np.split(target, starts[1:-1]) for target, starts in targets]
            found = [payload_crc32(*payloads) for payloads in zip(*parts, strict=True)]
            check_crcs(samples, family.name, found, np.where(is_dropped, 0, rows[:, -1]))
        return PackedRows(
            values=tensors[0],
            scale=tensors[1] if len(tensors) > 1 else None,
            lengths=torch.from_numpy(np.where(is_dropped, len(self._null), lengths)),
            is_dropped=torch.from_numpy(is_dropped),
            null=self._null,
        )


def read_null(directory: FeatureDirectory, name: str) -> Tensor:
    """Return the one tensor of a directory's null file; UserError if it is damaged."""
    try:
        (null,) = load(directory.read_bytes(name)).values()
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{directory}/{name} is damaged ({error}); {mend_null_caption()}") from None
    return null


def copy_payloads(
    tars: Sequence[np.ndarray], offsets: np.ndarray, target: np.ndarray, starts: np.ndarray, samples: LocatedSamples
) -> None:
    """Copy bytes at `offsets` [B] of mapped tars to [starts[i], starts[i + 1]) of `target`."""
    sizes = np.diff(starts)
    # Nothing but slices in this loop: each copy sweeps the processor's caches, so all else in it would run cold.
    rows = zip(tars, offsets.tolist(), (offsets + sizes).tolist(), starts.tolist(), starts[1:].tolist(), strict=False)
    for i, (tar, offset, end, start, stop) in enumerate(rows):
        if end > len(tar):
            raise UserError(
                f"shard {samples.shards[i].table.name}: sample {samples.keys[i]} ends at byte {end}, but its tar has "
                f"{len(tar)}; the tar was cut short, make its features again"
            )
        target[start:stop] = tar[offset:end]


def check_crcs(samples: LocatedSamples, family: str, found: Sequence[int], expected: np.ndarray) -> None:
    """Compare checksums of what was read with those of the index; names shard, family and key where they differ."""
    for i, (crc, wanted) in enumerate(zip(found, expected.tolist(), strict=True)):
        if crc != wanted:
            has = "has no checksum" if wanted == NOT_THERE else f"has CRC-32 {wanted:08x}"
            raise UserError(
                f"shard {samples.shards[i].table.name}: {family} of sample {samples.keys[i]} {has} in the index, but "
                f"{crc:08x} was read; the tar was changed or damaged, make its features again "
                "(training.check_payloads looks for this)"
            )
