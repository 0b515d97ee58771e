"""The rows of other folders that scores are made from: of one shard, in its order, with what they reject."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from curation.scores.protocol import REJECT, Reads
from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.engine.pieces import Source
from pipelines.raw.reading import Reading
from pipelines.raw.shards import open_shard
from pipelines.store.manifest import ShardDirectory
from pipelines.store.tables import MEND_SHARD, read_table

SHARDS_NAMED = 3


def input_hashes(run: Path, reads: Sequence[Reads], shards: Sequence[str], *, score: str) -> dict[str, list[str]]:
    """Return, by shard, the hashes of the files that a score is made from.

    Raises:
        UserError: some shards have no such file yet; names them, and the command that makes it.
    """
    hashes: dict[str, list[str]] = {shard: [] for shard in shards}
    for read in reads:
        directory = ShardDirectory(run / read.folder)
        done = set(directory.marked())
        if missing := [shard for shard in shards if shard not in done]:
            raise UserError(_describe_missing(run, read, missing, num_shards=len(shards), score=score))
        for shard in shards:
            hashes[shard].append(directory.any_report(shard).files[".parquet"])
    return hashes


def _describe_missing(run: Path, read: Reads, missing: Sequence[str], *, num_shards: int, score: str) -> str:
    names = ", ".join(missing[:SHARDS_NAMED]) + (", …" if len(missing) > SHARDS_NAMED else "")
    command = typed_command("caption" if read.folder.startswith("captions") else "columns", {"run": run})
    return (
        f"the score {score} is made from {run / read.folder}, which {len(missing):,} of {num_shards:,} shards lack "
        f"({names}): type {command}, and then this again"
    )


def source_identity(source: str, *parts: str) -> str:
    """Return the identity of a shard as an input, together with the hashes of other inputs."""
    return hashlib.sha256("\0".join((source, *parts)).encode()).hexdigest()


def sample_keys(raw: Source, reading: Reading, *, run: Path) -> list[str]:
    """Return the keys of a raw shard, in order; raises as `open_shard`."""
    with open_shard(raw.path, reading, run=run, identity=raw.identity) as shard:
        return [sample.key for sample in shard.samples]


def read_inputs(
    run: Path, reads: Sequence[Reads], shard: str, keys: Sequence[str] | None = None
) -> tuple[pa.Table, list[str | None]]:
    """Return the rows of a shard, `key` and `<folder>.<column>`, and why each has no columns, or None.

    A reason of another folder has its name in front, as it is counted there.

    Raises:
        UserError: a folder has other samples than the raw shard; names it.
    """
    columns: dict[str, pa.ChunkedArray | pa.Array] = {}
    reasons: list[str | None] | None = None
    for read in reads:
        path = run / read.folder / f"{shard}.parquet"
        table = read_table(path, ["key", REJECT, *read.columns], mend=MEND_SHARD)
        found = table["key"].to_pylist()
        if keys is not None and found != list(keys):
            raise UserError(f"{path} has other samples than the raw shard, or in another order; {MEND_SHARD}")
        keys = found
        name = read.folder.removeprefix("columns/")
        found_reasons = [None] * len(found) if read.keeps_rejected else table[REJECT].to_pylist()
        here = [None if reason is None else f"{name}:{reason}" for reason in found_reasons]
        reasons = here if reasons is None else [first or other for first, other in zip(reasons, here, strict=True)]
        columns |= {f"{name}.{column}": table[column] for column in read.columns}
    keys = list(keys or ())
    table = pa.table({"key": pa.array(keys, pa.string()), **columns})
    return table, reasons or [None] * len(keys)
