"""`make pack`: raw shards of any kind to tars as img2dataset writes them, with the same images and texts.

`00000.tar` has of each sample `<key>.jpg` (or as its bytes say), `<key>.txt`, `<key>.json` and, with a class,
`<key>.cls`; `00000.parquet` lists all samples, those that could not be packed too; `00000_stats.json` is written last,
and says that the tar is done.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.as_typed import typed_flag, typed_path
from pipelines.command import run_command
from pipelines.engine.progress import describe_rejects, get_logger, progress_bar
from pipelines.raw.images import SampleReject, image_size
from pipelines.raw.patterns import expand_shards
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard, ShardDescription, describe_shards, open_shard
from pipelines.store.files import atomic_file, atomic_write_json, exclusive, remove_temporary_files
from pipelines.store.state_files import read_state

STATE_FOLDER, STATE_NAME = ".pack", "pack.json"
SAMPLES_PER_TAR = 1000  # LAION's have ten times as many, SA-1B's ten
NUM_READERS = 8
SAMPLES_READ_AHEAD = 32
MAX_PIXELS = 2**62
# By their first bytes; what is none of them keeps its extension, or is called jpg.
SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"))
SIGNATURES += ((b"MM\0*", "tif"),)
ROW_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "caption", "status", "error_message", "shard", "original_key")),
        *((name, pa.int32()) for name in ("width", "height", "label")),
        ("sha256", pa.string()),
    ]
)

log = get_logger("pack")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What became of a sample: its row, and the members of the tar, none for a reject."""

    row: dict[str, Any]
    members: Sequence[tuple[str, bytes]] = ()
    left_out: Sequence[str] = ()


@dataclass
class PackCounts:
    """What became of all samples; `left_out` counts members that tars have no place for, by extension."""

    num_read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def pack(
    patterns: str | Sequence[str], folder: Path, *, reading: Reading, samples_per_tar: int = SAMPLES_PER_TAR
) -> PackCounts:
    """Write the samples of raw shards, in order, to tars in `folder`; a command that was stopped is continued.

    Raises:
        UserError: the folder has files that no such command has made, or was packed from something else; or see
            `expand_shards` and `describe_shards`.
    """
    paths = expand_shards(patterns)
    state = folder / STATE_FOLDER
    if folder.is_dir() and any(folder.iterdir()) and not state.is_dir():
        raise UserError(
            f"{typed_flag('to')} {folder} has files that are not of this command: name a new or empty folder"
        )
    with exclusive(state):
        shards = describe_shards(paths, reading, run=state)
        _require_same(state / STATE_NAME, shards, reading, samples_per_tar)
        remove_temporary_files(folder, is_held=True)
        counts = PackCounts()
        keeps_keys = _are_keys_good(shards, reading, run=state)
        num_samples = sum(shard.source.num_samples for shard in shards)
        with progress_bar("pack", num_samples) as progress, ThreadPoolExecutor(NUM_READERS) as pool:
            for number, (start, stop) in enumerate(_tars(num_samples, samples_per_tar)):
                name = f"{number:05d}"
                if not (folder / f"{name}_stats.json").is_file():
                    keys = None if keeps_keys else (f"{name}{place:0{len(str(samples_per_tar))}d}" for place in count())
                    parts = _parts(shards, start, stop)
                    _write(folder, name, _pack_parts(parts, keys, reading=reading, run=state, pool=pool))
                _count(folder, name, counts)
                note = describe_rejects(counts.rejected, num_read=counts.num_read)
                progress.advance(stop - start, note=note)
    return counts


def _pack_parts(
    parts: Iterable[tuple[ShardDescription, int, int]],
    keys: Iterator[str] | None,
    *,
    reading: Reading,
    run: Path,
    pool: ThreadPoolExecutor,
) -> Iterator[Packed]:
    """Yield the samples of parts of shards in order, a few at a time in memory; without `keys` under their own."""
    for shard, first, last in parts:
        with open_shard(shard.source.path, reading, run=run, identity=shard.source.identity) as raw:
            for start in range(first, last, SAMPLES_READ_AHEAD):
                samples = raw.samples[start : min(start + SAMPLES_READ_AHEAD, last)]
                names = [sample.key for sample in samples] if keys is None else list(islice(keys, len(samples)))
                yield from pool.map(_pack_sample, [raw] * len(samples), samples, names)


def _tars(num_samples: int, samples_per_tar: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_samples, samples_per_tar):
        yield start, min(start + samples_per_tar, num_samples)


def _parts(shards: Sequence[ShardDescription], start: int, stop: int) -> Iterator[tuple[ShardDescription, int, int]]:
    """Yield the samples [start, stop) of all shards as shards with their own samples [first, last)."""
    position = 0
    for shard in shards:
        first, last = max(0, start - position), min(shard.source.num_samples, stop - position)
        if first < last:
            yield shard, first, last
        position += shard.source.num_samples


def _require_same(path: Path, shards: Sequence[ShardDescription], reading: Reading, samples_per_tar: int) -> None:
    """Note what is packed, or make sure that it is what a command before has begun with."""
    wanted = {
        "sources": {shard.source.name: shard.source.identity for shard in shards},
        "samples_per_tar": samples_per_tar,
        "reading": dataclasses.asdict(reading),
    }
    if not path.is_file():
        atomic_write_json(path, wanted)
        return
    found = read_state(path, mend="remove the folder and pack again")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{typed_flag('to')} {path.parent.parent} was packed from other {name} than these: name a new folder, "
                "or remove that one"
            )


def _are_keys_good(shards: Sequence[ShardDescription], reading: Reading, *, run: Path) -> bool:
    """Whether all samples have keys of their own that webdataset reads as they are: to the first dot of a name."""
    keys: set[str] = set()
    for shard in shards:
        with open_shard(shard.source.path, reading, run=run, identity=shard.source.identity) as raw:
            for sample in raw.samples:
                if sample.key in keys or "." in sample.key.rpartition("/")[2]:
                    return False
                keys.add(sample.key)
    return True


def _pack_sample(raw: RawShard, sample: RawSample, key: str) -> Packed:
    row: dict[str, Any] = {"key": key, "shard": raw.name, "original_key": sample.key}
    try:
        if sample.reject is not None:
            raise SampleReject(sample.reject)
        data, caption, label = raw.image_bytes(sample), raw.text(sample), raw.label(sample)
        texts = {name: raw.named_text(sample, name) for name in raw.text_names(sample)}
    except SampleReject as reject:
        return Packed(row={**row, "status": reject.reason, "error_message": str(reject)})
    row |= {"status": "success", "caption": caption, "label": label, "sha256": hashlib.sha256(data).hexdigest()}
    try:
        row["width"], row["height"] = image_size(data, max_pixels=MAX_PIXELS)
    except SampleReject as reject:  # it is packed as it is: whoever reads the tar rejects it for the same reason
        row["error_message"] = str(reject)
    members = [(f"{key}.{_extension(data, sample)}", data)]
    if caption is not None:
        members.append((f"{key}.txt", caption.encode()))
    record = {**row, "texts": texts}
    members.append((f"{key}.json", json.dumps(record, ensure_ascii=False, indent=1).encode()))
    if label is not None:
        members.append((f"{key}.cls", str(label).encode()))
    known = {sample.image_extension, "cls", *raw.text_names(sample)}
    others = [name for name in sample.members if name not in known and name.partition(".")[0] not in known]
    return Packed(row=row, members=members, left_out=others)


def _extension(data: bytes, sample: RawSample) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    found = next((extension for start, extension in SIGNATURES if data.startswith(start)), None)
    return found or (sample.image_extension or "jpg").rpartition(".")[2]


def _write(folder: Path, name: str, packed: Iterable[Packed]) -> None:
    """Write a tar, its table, and last what says that both are done."""
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    with atomic_file(folder / f"{name}.tar") as path, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in packed:
            rows.append(sample.row)
            left_out.update(sample.left_out)
            for member, data in sample.members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with atomic_file(folder / f"{name}.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), path)
    statuses = Counter(row["status"] for row in rows)
    stats = {
        "count": len(rows),
        "successes": statuses["success"],
        "status_dict": dict(sorted(statuses.items())),
        "members_left_out": dict(sorted(left_out.items())),
    }
    atomic_write_json(folder / f"{name}_stats.json", stats)


def _count(folder: Path, name: str, counts: PackCounts) -> None:
    mend = f"remove it and type the command again: {name}.tar is packed anew"
    stats = read_state(folder / f"{name}_stats.json", mend=mend, keys=("count", "status_dict", "members_left_out"))
    counts.num_read += stats["count"]
    counts.rejected.update({status: count for status, count in stats["status_dict"].items() if status != "success"})
    counts.left_out.update(stats["members_left_out"])


def main() -> None:
    """Pack what is typed."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.raw.pack", description="Raw shards of any kind to tars.")
    parser.add_argument("shards", help="folders, tars, Parquet, tables: as raw shards of other commands")
    parser.add_argument("to", type=Path, help="a new folder, for the tars")
    parser.add_argument("--n", type=int, default=SAMPLES_PER_TAR, help="samples of each tar")
    parser.add_argument("--image-column", help="as data.image_column of a recipe")
    parser.add_argument("--text-column", help="as data.text_column of a recipe")
    options = parser.parse_args()
    if options.n < 1:
        raise UserError(f"{typed_flag('n')} is {options.n}: a tar has one sample or more")
    reading = Reading(image_column=options.image_column, text_column=options.text_column)
    folder = typed_path(options.to)
    counts = pack(options.shards, folder, reading=reading, samples_per_tar=options.n)
    num_rejected = counts.rejected.total()
    log.info(f"{folder}: {counts.num_read - num_rejected:,} of {counts.num_read:,} samples are packed")
    if num_rejected:
        some = ", ".join(f"{count:,} {reason}" for reason, count in counts.rejected.most_common(3))
        log.warning(f"{num_rejected:,} samples are not packed ({some}); each is a row of the tables beside the tars")
    if counts.left_out:
        some = ", ".join(f"{count:,} {name}" for name, count in counts.left_out.most_common(3))
        log.warning(
            f"{counts.left_out.total():,} members that are neither image, text nor class are not packed: {some}"
        )


if __name__ == "__main__":
    sys.exit(run_command("pack", main))
