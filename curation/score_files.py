"""`columns/<score>/<shard>.parquet`: one row per sample of the raw shard, in its order, rejected ones too."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.scores.protocol import REJECT, Score

# Fixed, so that a shard's bytes do not depend on how many parts it was written in.
ROWS_PER_GROUP = 10_000


def rows_of(score: Score, keys: Sequence[str], reasons: Sequence[str | None], measured: Mapping[str, Any]) -> pa.Table:
    """Return the rows of some samples: `measured` has the columns of those that have no reason to be rejected.

    A score may reject more of them, in `measured["reject"]`.
    """
    reasons = list(reasons)
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    own = measured.get(REJECT)
    places: list[int | None] = [None] * len(reasons)
    for place, index in enumerate(kept):
        reasons[index] = own[place] if own is not None else None
        places[index] = place if reasons[index] is None else None
    columns: dict[str, Any] = {"key": pa.array(keys, pa.string())}
    for column in score.columns:
        found = _array(measured.get(column.name, ()), column.type)
        assert len(found) == len(kept), f"{score.name}.{column.name}: {len(found)} values of {len(kept)} samples"
        columns[column.name] = found.take(pa.array(places, pa.int64()))
    columns[REJECT] = pa.array(reasons, pa.string())
    return pa.table(columns, schema=score.schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)


def write_rows(tables: Sequence[pa.Table], path: Path) -> None:
    """Write tables of one schema as one file; its bytes do not depend on how the rows were cut."""
    table = pa.concat_tables(tables).combine_chunks()
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="zstd")


def rejects_of(table: pa.Table, name: str = REJECT) -> dict[str, int]:
    """Return how many rows have each reason, sorted."""
    return dict(sorted(Counter(table[name].drop_null().to_pylist()).items()))


def count_unknown(table: pa.Table) -> dict[str, int]:
    """Return, as details of a shard, how many kept rows have NaN (`nan_<column>`) or null (`null_<column>`)."""
    kept = table.filter(pc.field(REJECT).is_null())
    counts: dict[str, int] = {}
    for field in table.schema:
        if field.name in ("key", REJECT):
            continue
        counts[f"null_{field.name}"] = kept[field.name].null_count
        if pa.types.is_float32(field.type) or pa.types.is_float64(field.type):
            counts[f"nan_{field.name}"] = kept.filter(pc.field(field.name).is_nan()).num_rows
    return {name: count for name, count in counts.items() if count}
