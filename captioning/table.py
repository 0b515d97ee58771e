"""`captions/<shard>.parquet`: its columns, its bytes, and how its flags are written anew when thresholds change."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioning.config import QualityConfig
from captioning.quality import FLAGS, judge
from pipelines.manifest import MANIFEST_NAME, Fingerprint, ShardReport, StageDirectory
from pipelines.pieces import PARTS_FOLDER
from pipelines.storage import atomic_file, sha256_file

# `caption_raw` is what the model said; `caption` differs from it only where boilerplate is stripped. `first_caption` is
# what it said before, where that was a loop and it was asked again.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("alt_text", pa.string()),
        ("caption", pa.string()),
        ("caption_raw", pa.string()),
        ("first_caption", pa.string()),
        ("prompt", pa.string()),
        ("num_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        # Named as Parquet names it, so that a table read back is written as it was.
        ("flags", pa.list_(pa.field("element", pa.string()))),
        ("repeated_ngram_ratio", pa.float32()),
        ("alt_text_overlap", pa.float32()),
        ("clip_score", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("reject", pa.string()),
    ]
)
# Fixed, so that a shard's bytes do not depend on how many parts it was written in.
ROWS_PER_GROUP = 10_000
QUALITY_KEY = b"atelier.quality"
SETTINGS_KEY = b"atelier.settings"


def quality_digest(quality: QualityConfig) -> str:
    """Return a hash of the thresholds, which each file carries."""
    return hashlib.sha256(quality.model_dump_json().encode()).hexdigest()


def write_rows(
    rows: Sequence[Mapping[str, Any]], path: Path, *, quality: QualityConfig, settings: Mapping[str, Any]
) -> None:
    """Write rows that were judged under `quality` and made under `settings`, those of `UPDATABLE`."""
    metadata = {
        QUALITY_KEY: quality_digest(quality).encode(),
        SETTINGS_KEY: json.dumps(settings, sort_keys=True).encode(),
    }
    _write(pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata(metadata)), path)


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table.combine_chunks(), path, row_group_size=ROWS_PER_GROUP, compression="zstd")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings a file's rows were made under, empty for a file that does not say."""
    return json.loads((pq.read_schema(path).metadata or {}).get(SETTINGS_KEY, b"{}"))


def join_files(parts: Sequence[Path], output: Path) -> None:
    """Concatenate files in order."""
    tables = [pq.read_table(part) for part in parts]
    assert all(table.schema.metadata == tables[0].schema.metadata for table in tables), "parts are judged alike"
    _write(pa.concat_tables(tables), output)


def count_flags(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many rows have each flag, as `flag_<name>`; flags that never occur are left out."""
    counts = {f"flag_{flag}": sum(flag in row["flags"] for row in rows) for flag in FLAGS}
    return {name: count for name, count in counts.items() if count}


def judge_directory_again(directory: StageDirectory, *, fingerprint: Fingerprint, quality: QualityConfig) -> list[str]:
    """Rewrite the flags of every finished shard judged under other thresholds; returns the shards' names.

    It may be interrupted anywhere: the manifest goes first, and a file says which thresholds it was judged under. The
    few unfinished parts of an interrupted run are forgotten, and captioned again.
    """
    for part in sorted((directory.path / PARTS_FOLDER).glob("*/*.parquet")):
        if not _is_judged(part, quality):
            part.with_suffix(".report").unlink(missing_ok=True)
    stale = [path for path in sorted(directory.path.glob("*.parquet")) if not _is_judged(path, quality)]
    judged = []
    for path in stale:
        report = directory.report(path.stem, fingerprint)
        if report is not None:
            (directory.path / MANIFEST_NAME).unlink(missing_ok=True)
            _judge_shard_again(directory, report, fingerprint=fingerprint, quality=quality)
            judged.append(path.stem)
    return judged


def _is_judged(path: Path, quality: QualityConfig) -> bool:
    return (pq.read_schema(path).metadata or {}).get(QUALITY_KEY) == quality_digest(quality).encode()


def _judge_shard_again(
    directory: StageDirectory, report: ShardReport, *, fingerprint: Fingerprint, quality: QualityConfig
) -> None:
    path = directory.file(report.name, ".parquet")
    rows = [judge_row_again(row, quality) for row in pq.read_table(path).to_pylist()]
    settings = read_settings(path)
    details = {key: value for key, value in report.details.items() if not key.startswith("flag_")}
    with atomic_file(path) as temporary:
        write_rows(rows, temporary, quality=quality, settings=settings)
        # The marker comes first here: a run that dies in between finds the old file, and writes the same bytes again.
        files = {".parquet": sha256_file(temporary)}
        report = replace(report, files=files, details={**details, **count_flags(rows)})
        directory.write_marker(report, fingerprint)


def judge_row_again(row: Mapping[str, Any], quality: QualityConfig) -> dict[str, Any]:
    """Return a row with the columns that depend on `quality` made anew."""
    return dict(row) if row["reject"] is not None else {**row, **judge(row, quality)}
