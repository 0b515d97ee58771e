"""A run's folder with columns that a test writes down: captions, scores and manifests as their rooms write them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory, ShardReport

CAPTION_TYPES = {
    "key": pa.string(),
    "shard": pa.string(),
    "caption": pa.string(),
    "num_tokens": pa.int32(),
    "flags": pa.list_(pa.string()),
    "clip_score": pa.float32(),
    "width": pa.int32(),
    "reject": pa.string(),
}


def write_columns(
    folder: Path, shards: Mapping[str, pa.Table | Mapping[str, Sequence[Any]]], *, extra: Mapping[str, Any] = {}
) -> Manifest:
    """Write a folder of columns: of each shard a table with `key`, and `reject` where it is not given."""
    output = ShardDirectory(folder)
    fingerprint = Fingerprint.of({"of": folder.name})
    for name, columns in shards.items():
        table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        if "reject" not in table.column_names:
            table = table.append_column("reject", pa.nulls(table.num_rows, pa.string()))
        path = output.file(name, ".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        rejected = Counter(table["reject"].drop_null().to_pylist())
        report = ShardReport(
            name=name,
            source=f"of {name}",
            num_read=table.num_rows,
            num_kept=table.num_rows - rejected.total(),
            rejected=dict(rejected),
            files={".parquet": sha256_file(path)},
        )
        output.write_marker(report, fingerprint)
    return output.write_manifest(fingerprint, list(shards), upstream={}, extra=extra)


def write_captions(folder: Path, shards: Mapping[str, Sequence[Mapping[str, Any]]], *, flags: Sequence[str]) -> None:
    """Write captions: a row of each sample, with null for what a row leaves out."""
    schema = pa.schema(CAPTION_TYPES)
    tables = {
        name: pa.Table.from_pylist([{"shard": name, "flags": [], **row} for row in rows], schema=schema)
        for name, rows in shards.items()
    }
    write_columns(folder, tables, extra={"flags": list(flags)} if flags else {})
