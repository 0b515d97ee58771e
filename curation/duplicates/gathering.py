"""What duplicates are told by, of all samples: hashes and preferences in memory, the rest in files of scratch."""

# N samples, V views

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from curation.duplicates.banding import dealt
from curation.hashing import EXACT_BYTES, THUMBNAIL_BYTES, mirrored, view_hashes
from errors import UserError

EXACT, PERCEPTUAL, THUMBNAIL = "hashes.exact_hash", "hashes.perceptual_hash", "hashes.thumbnail"
EMBEDDING = "clip.clip_embedding"
MAX_SAMPLES = (1 << 32) - 1
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Part:
    """A shard of one of the runs.

    Attributes:
        name: what its samples are called by, before their keys: `00012/`, of another run `runs/other:00012/`.
        run: number of the run in order of precedence.
        read: gives its rows that have hashes: `key`, `hashes.<column>`, and perhaps `clip.clip_embedding`.
        preferences: gives for the keys of those rows how much each is preferred, NaN where that is not known.
    """

    name: str
    run: int
    read: Callable[[], pa.Table]
    preferences: Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """All samples, part by part.

    Attributes:
        starts: number of the first sample of each part, and of all, int64.
        hashes: uint64 [N].
        exact: uint64 [N, 2].
        preferred: the samples, the best first, uint32 [N].
        num_unknown: of the last run, how many have an unknown preference.
        views: dealt hashes of cropped views, uint64 [N * V], and `mirrored` those of the mirrored sample.
    """

    parts: Sequence[Part]
    starts: np.ndarray
    hashes: np.ndarray
    exact: np.ndarray
    preferred: np.ndarray
    num_unknown: int
    views: np.ndarray
    mirrored: np.ndarray
    scratch: Path

    def name(self, sample: int) -> str:
        """Return what a sample is called: `<shard>/<key>`, of another run with the run in front."""
        part = int(np.searchsorted(self.starts, sample, side="right")) - 1
        offsets, keys = _mapped(self.scratch / "key_ends", np.uint64), _mapped(self.scratch / "keys", np.uint8)
        start = int(offsets[sample - 1]) if sample else 0
        return self.parts[part].name + keys[start : int(offsets[sample])].tobytes().decode()

    def thumbnails(self, involved: np.ndarray) -> np.ndarray:
        """Write those of some samples, bool [N], and return them, uint8 [I, 864], at least one row."""
        path = self.scratch / "thumbnails"
        with path.open("wb") as file:
            for part, start, stop in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
                if (wanted := involved[start:stop]).any():
                    file.write(_fixed(part.read()[THUMBNAIL], THUMBNAIL_BYTES)[wanted].tobytes())
            if not file.tell():
                file.write(bytes(THUMBNAIL_BYTES))
        return _mapped(path, np.uint8).reshape(-1, THUMBNAIL_BYTES)

    def embeddings(self, wanted: np.ndarray, name: str) -> np.ndarray:
        """Write those of some samples, sorted, as a file of a name, and return them, float16 [W, D]."""
        path = self.scratch / name
        width = 1
        with path.open("wb") as file:
            ends = np.searchsorted(wanted, self.starts)
            for part, start, low, high in zip(self.parts, self.starts[:-1], ends[:-1], ends[1:], strict=True):
                if low < high:
                    column = part.read()[EMBEDDING].combine_chunks()
                    width = column.type.list_size
                    rows = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
                    file.write(rows[wanted[low:high] - start].astype(np.float16).tobytes())
        return _mapped(path, np.float16).reshape(-1, width)


def gather(parts: Sequence[Part], scratch: Path, *, crops: bool, mirror: bool, num_threads: int) -> Samples:
    """Read all parts once.

    Raises:
        UserError: there are more samples than numbers of 32 bits.
    """
    hashes, exact, preferences, runs, starts = [], [], [], [], [0]
    names = ("keys", "key_ends", "views", "mirrored")
    files = {name: (scratch / name).open("wb") for name in names}
    end = 0
    for part in parts:
        table = part.read()
        keys = [key.encode() for key in table["key"].to_pylist()]
        ends = end + np.cumsum([len(key) for key in keys], dtype=np.uint64) if keys else np.empty(0, np.uint64)
        files["keys"].write(b"".join(keys))
        files["key_ends"].write(ends.tobytes())
        end = int(ends[-1]) if keys else end
        thumbnails = _fixed(table[THUMBNAIL], THUMBNAIL_BYTES)
        for views, of_mirrored in _views(thumbnails, crops=crops, mirror=mirror, num_threads=num_threads):
            files["views"].write(dealt(views.ravel()).tobytes())
            files["mirrored"].write(dealt(of_mirrored.ravel()).tobytes())
        hashes.append(table[PERCEPTUAL].to_numpy().astype(np.uint64))
        exact.append(_fixed(table[EXACT], EXACT_BYTES).view(np.uint64))
        preferences.append(part.preferences(table["key"]))
        runs.append(np.full(len(keys), part.run, np.uint16))
        starts.append(starts[-1] + len(keys))
    for file in files.values():
        file.close()
    if starts[-1] > MAX_SAMPLES:
        raise UserError(f"columns.duplicates: {starts[-1]:,} samples are more than can be compared at a time")
    preference = np.concatenate(preferences)
    is_unknown = np.isnan(preference)
    run = np.concatenate(runs)
    order = np.lexsort((np.where(is_unknown, np.inf, -preference), is_unknown, run))
    return Samples(
        parts=parts,
        starts=np.array(starts, np.int64),
        hashes=np.concatenate(hashes),
        exact=np.concatenate(exact),
        preferred=order.astype(np.uint32),
        num_unknown=int(is_unknown[run == parts[-1].run].sum()),
        views=_mapped(scratch / "views", np.uint64),
        mirrored=_mapped(scratch / "mirrored", np.uint64),
        scratch=scratch,
    )


def _views(
    thumbnails: np.ndarray, *, crops: bool, mirror: bool, num_threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield hashes of cropped views, and of the views of the mirrored samples, in order."""

    def of(start: int) -> tuple[np.ndarray, np.ndarray]:
        some = thumbnails[start : start + _ROWS_AT_ONCE]
        none = np.empty(0, np.uint64)
        views = view_hashes(some, crops=True)[:, 1:] if crops else none
        return views, view_hashes(mirrored(some), crops=crops) if mirror else none

    with ThreadPoolExecutor(num_threads) as pool:
        yield from pool.map(of, range(0, len(thumbnails), _ROWS_AT_ONCE))


def _fixed(column: pa.ChunkedArray, num_bytes: int) -> np.ndarray:
    """Return a column of fixed-size binary as uint8 [N, bytes]."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * num_bytes, chunk.offset * num_bytes)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(parts).reshape(-1, num_bytes) if parts else np.empty((0, num_bytes), np.uint8)


def _mapped(path: Path, kind: type[np.generic]) -> np.ndarray:
    """Return a scratch file as an array of which only what is looked at is in memory."""
    if not path.stat().st_size:
        return np.empty(0, kind)
    # Copied on write: a writable array is of the type that kernels are compiled for.
    return np.memmap(path, kind, "c").view(np.ndarray)
