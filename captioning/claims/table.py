"""`columns/claims/<shard>.parquet`: what each caption claims, how far it is supported, and which sentences are not."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.store.files import sha256_text
from pipelines.store.tables import MEND_PART, MEND_SHARD, read_table, read_table_schema

NAME = "claims"
# Raised when the columns mean something else.
VERSION = 1
# Columns with their types, units and meanings, as the manifest tells them.
COLUMNS: dict[str, tuple[pa.DataType, str, str]] = {
    "num_claims": (pa.int32(), "claims", "what the caption claims, in clauses or sentences"),
    "num_unknown": (pa.int32(), "claims", "claims that the model has said neither yes nor no to"),
    "unsupported_share": (pa.float32(), "0 to 1", "share of the claims answered whose support is below the threshold"),
    "min_support": (pa.float32(), "0 to 1", "smallest support of a claim: the yes of yes and no"),
    "unsupported_sentences": (
        pa.list_(pa.field("element", pa.int32())),
        "numbers",
        "sentences with an unsupported claim, from 0",
    ),
    "claim_sentences": (pa.list_(pa.field("element", pa.int32())), "numbers", "sentence of each claim, from 0"),
    "claim_supports": (
        pa.list_(pa.field("element", pa.float32())),
        "0 to 1",
        "support of each claim, null where unknown",
    ),
}
SCHEMA = pa.schema(
    [("key", pa.string()), *((name, kind) for name, (kind, _, _) in COLUMNS.items()), ("reject", pa.string())]
)
ROWS_PER_GROUP = 10_000
ASKED_KEY = b"atelier.asked"


def score_spec() -> dict[str, Any]:
    """Return what a manifest says of this score."""
    columns = {name: {"type": str(kind), "unit": unit, "meaning": text} for name, (kind, unit, text) in COLUMNS.items()}
    return {"name": NAME, "version": VERSION, "needs": "image", "columns": columns}


def marked(claims: Sequence[int], supports: Sequence[float | None], *, threshold: float) -> dict[str, Any]:
    """Return the columns of a caption: `claims` are the sentence of each claim, `supports` how far it is supported.

    Claims of which nobody knows are neither supported nor unsupported. Without any claim that is answered there is no
    share and no least support.
    """
    known = [support for support in supports if support is not None]
    unsupported = [
        number for number, support in zip(claims, supports, strict=True) if support is not None and support < threshold
    ]
    return {
        "num_claims": len(claims),
        "num_unknown": len(supports) - len(known),
        "unsupported_share": len(unsupported) / len(known) if known else None,
        "min_support": min(known, default=None),
        "unsupported_sentences": sorted(set(unsupported)),
        "claim_sentences": list(claims),
        "claim_supports": list(supports),
    }


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path, *, asked: str) -> None:
    """Write rows, and `asked`, by which a later run knows their answers; see `asked_digest`."""
    schema = SCHEMA.with_metadata({ASKED_KEY: asked.encode()})
    _write(pa.Table.from_pylist(list(rows), schema=schema), path)


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table.combine_chunks(), path, row_group_size=ROWS_PER_GROUP, compression="zstd")


def join_files(parts: Sequence[Path], output: Path) -> None:
    """Concatenate files in order."""
    _write(pa.concat_tables([read_table(part, mend=MEND_PART) for part in parts]), output)


def asked_digest(asked: str, *, raw: str, texts: Sequence[Sequence[str | None]]) -> str:
    """Return what answers about a shard are known by: what is asked of whom, the raw shard, and its captions."""
    return sha256_text(json.dumps([asked, raw, *texts], ensure_ascii=False))


def read_answers(path: Path, *, asked: str) -> list[dict[str, Any]] | None:
    """Return the rows of a finished shard whose answers still hold, one per sample; None where they are to be made.

    Answers stay under another threshold, and when captions are written anew with the same texts.
    """
    if not path.is_file():
        return None
    try:
        found = (read_table_schema(path, mend=MEND_SHARD).metadata or {}).get(ASKED_KEY, b"")
        return read_table(path, mend=MEND_SHARD).to_pylist() if found == asked.encode() else None
    except UserError:
        return None  # damaged: made anew
