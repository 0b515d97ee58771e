"""`captions/<shard>.parquet`: its columns, its bytes, and how its flags are written anew when thresholds change."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioning.config import QualityConfig
from captioning.quality import FLAGS, JUDGE_VERSION, judge
from errors import UserError
from pipelines.engine.pieces import all_piece_reports, read_piece_note
from pipelines.store.files import atomic_file, atomic_write_json, sha256_file
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory, ShardReport, manifest_path, read_manifest
from pipelines.store.state_files import parse_state
from pipelines.store.tables import MEND_PART, MEND_SHARD, read_table, read_table_schema

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
    """Return a hash of the thresholds and of what judges by them, which each file carries."""
    # The first judge had no version.
    version = "" if JUDGE_VERSION == 1 else f"@{JUDGE_VERSION}"
    return hashlib.sha256(f"{quality.model_dump_json()}{version}".encode()).hexdigest()


def write_rows(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    quality: QualityConfig,
    settings: Mapping[str, Any],
    others: Sequence[str] = (),
) -> None:
    """Write rows that were judged under `quality` and made under `settings`, those of `UPDATABLE`.

    `others` are columns of texts beside `caption`, which come last.
    """
    schema = pa.schema([*SCHEMA, *((name, pa.string()) for name in others)])
    metadata = {
        QUALITY_KEY: quality_digest(quality).encode(),
        SETTINGS_KEY: json.dumps(settings, sort_keys=True).encode(),
    }
    _write(pa.Table.from_pylist(list(rows), schema=schema.with_metadata(metadata)), path)


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table.combine_chunks(), path, row_group_size=ROWS_PER_GROUP, compression="zstd")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings a file's rows were made under, empty for a file that does not say."""
    found = (read_table_schema(path, mend=MEND_SHARD).metadata or {}).get(SETTINGS_KEY, b"{}")
    return parse_state(found, where=str(path), mend=MEND_SHARD)


def join_files(parts: Sequence[Path], output: Path) -> None:
    """Concatenate files in order."""
    tables = [read_table(part, mend=MEND_PART) for part in parts]
    assert all(table.schema.metadata == tables[0].schema.metadata for table in tables), "parts are judged alike"
    _write(pa.concat_tables(tables), output)


def count_flags(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many rows have each flag, as `flag_<name>`; flags that never occur are left out."""
    counts = {f"flag_{flag}": sum(flag in row["flags"] for row in rows) for flag in FLAGS}
    return {name: count for name, count in counts.items() if count}


def is_judged(manifest: Manifest, quality: QualityConfig) -> bool:
    """Whether captions have been judged under these thresholds by today's judge, by what their manifest says."""
    # The first judge had no version.
    found = (manifest.extra["quality"], manifest.extra.get("judge_version", 1))
    return found == (quality.model_dump(mode="json"), JUDGE_VERSION)


def judge_directory_again(directory: ShardDirectory, *, fingerprint: Fingerprint, quality: QualityConfig) -> list[str]:
    """Rewrite the flags of every finished shard judged under other thresholds or an older judge; returns their names.

    Finished parts of an interrupted run are judged again too. It may be interrupted anywhere: the manifest goes
    before a file changes. Of a shard that no manifest vouches for, the marker must have the hash of the file.
    """
    settled = read_manifest(directory.path).shards if manifest_path(directory.path).is_file() else {}
    for report_path in all_piece_reports(directory):
        _judge_part_again(directory, report_path, fingerprint=fingerprint, quality=quality)
    judged = []
    for name in directory.marked():
        report, path = directory.report(name, fingerprint), directory.file(name, ".parquet")
        if report is None or not path.is_file():
            continue
        is_whole = settled.get(name) == report or sha256_file(path) == report.files[".parquet"]
        if is_whole and _is_judged(path, quality):
            continue
        directory.clear_manifest()
        _judge_shard_again(directory, report, fingerprint=fingerprint, quality=quality)
        judged.append(name)
    return judged


def _is_judged(path: Path, quality: QualityConfig) -> bool:
    found = read_table_schema(path, mend=MEND_SHARD).metadata or {}
    return found.get(QUALITY_KEY) == quality_digest(quality).encode()


def _judge_shard_again(
    directory: ShardDirectory, report: ShardReport, *, fingerprint: Fingerprint, quality: QualityConfig
) -> None:
    path = directory.file(report.name, ".parquet")
    with atomic_file(path) as temporary:
        rows = _rewrite(path, temporary, quality=quality)
        # The marker comes first here: a run that dies in between leaves one that is not the old file's.
        files = {".parquet": sha256_file(temporary)}
        report = replace(report, files=files, details=_with_flags(report.details, rows))
        directory.write_marker(report, fingerprint)


def _judge_part_again(
    directory: ShardDirectory, report_path: Path, *, fingerprint: Fingerprint, quality: QualityConfig
) -> None:
    path = report_path.with_suffix(".parquet")
    try:
        content = read_piece_note(report_path)
    except UserError:
        return  # the run that follows says so
    if content.fingerprint != fingerprint.digest or not path.is_file():
        return
    report = content.report
    if _is_judged(path, quality):
        rows = read_table(path, mend=MEND_PART).to_pylist()
    else:
        directory.clear_manifest()
        if report.files:
            # The worker has hashed a whole shard: that goes first, and the run that follows hashes the new file.
            report = replace(report, files={})
            atomic_write_json(report_path, asdict(replace(content, report=report)))
        with atomic_file(path) as temporary:
            rows = _rewrite(path, temporary, quality=quality)
    # Counted even where the file was judged: a run that died in between has left the old counts.
    details = _with_flags(report.details, rows)
    if details != report.details:
        atomic_write_json(report_path, asdict(replace(content, report=replace(report, details=details))))


def _rewrite(path: Path, target: Path, *, quality: QualityConfig) -> list[dict[str, Any]]:
    """Write the rows of `path` to `target`, judged anew; returns them."""
    table = read_table(path, mend=MEND_SHARD)
    rows = [judge_row_again(row, quality) for row in table.to_pylist()]
    others = [name for name in table.column_names if name not in SCHEMA.names]
    write_rows(rows, target, quality=quality, settings=read_settings(path), others=others)
    return rows


def _with_flags(details: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    others = {key: value for key, value in details.items() if not key.startswith("flag_")}
    return {**others, **count_flags(rows)}


def judge_row_again(row: Mapping[str, Any], quality: QualityConfig) -> dict[str, Any]:
    """Return a row with the columns that depend on `quality` made anew."""
    return dict(row) if row["reject"] is not None else {**row, **judge(row, quality)}
