"""Choices of samples written beside the features of a tiny run, as the columns of its samples would give them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport


def write_choice(
    run: Path,
    shards: Mapping[str, int],
    *,
    table: str = "stage2",
    chooses: Callable[[int], bool] = lambda i: True,
    weigh: Callable[[int], float | None] | None = None,
    captions: Mapping[str, Callable[[int], float | None]] | None = None,
    **fields: Any,
) -> None:
    """Write `RUN/choices/<table>/` of `shards` (name -> number of samples); `fields` are of its fingerprint.

    `chooses` and `weigh` say of sample i of a shard whether it is chosen, and its weight; `captions` by column that of
    its captions.
    """
    directory = ShardDirectory(run / "choices" / table)
    directory.path.mkdir(parents=True, exist_ok=True)
    fingerprint = Fingerprint.of(fields | {"version": 1})
    num_chosen = 0
    for name, num_samples in shards.items():
        numbers = range(num_samples)
        chosen = [chooses(i) for i in numbers]
        weighted = {"weight": weigh or (lambda i: None)} | {
            f"weight.{column}": own for column, own in (captions or {}).items()
        }
        columns = {
            column: pa.array([own(i) if chosen[i] else None for i in numbers], pa.float32())
            for column, own in weighted.items()
        }
        keys = pa.array([f"{name}_{i:03d}" for i in numbers])
        pq.write_table(pa.table({"key": keys, "chosen": chosen} | columns), directory.file(name, ".parquet"))
        report = ShardReport(
            name=name,
            source="test",
            num_read=num_samples,
            num_kept=num_samples,
            files={".parquet": sha256_file(directory.file(name, ".parquet"))},
        )
        directory.write_marker(report, fingerprint)
        num_chosen += sum(chosen)
    extra = {"where": fields.get("where"), "num_samples": sum(shards.values()), "num_chosen": num_chosen}
    directory.write_manifest(fingerprint, list(shards), upstream={}, extra=extra)
