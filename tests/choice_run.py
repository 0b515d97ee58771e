"""Choices of samples written beside the features of a tiny run, as the columns of its samples would give them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.store.files import sha256_file
from pipelines.store.manifest import ShardDirectory, ShardReport


def write_choice(
    run: Path,
    shards: Mapping[str, int],
    *,
    table: str = "stage2",
    chooses: Callable[[int], bool] = lambda i: True,
    weigh: Callable[[int], float | None] | None = None,
    weigh_captions: Mapping[str, Callable[[int], float | None]] | None = None,
    **keys: Any,
) -> None:
    """Write `RUN/choices/<table>/` of `shards` (name -> number of samples); `keys` are the table's.

    `chooses` and `weigh` say of sample i of a shard whether it is chosen, and its weight; `weigh_captions` by column
    that of its captions.
    """
    directory = ShardDirectory(run / "choices" / table)
    directory.path.mkdir(parents=True, exist_ok=True)
    settings = ChoiceSettings.of(table, keys)
    assert settings is not None
    num_chosen = 0
    for name, num_samples in shards.items():
        numbers = range(num_samples)
        chosen = [chooses(i) for i in numbers]
        weighted = {"weight": weigh or (lambda i: None)} | {
            f"weight.{column}": own for column, own in (weigh_captions or {}).items()
        }
        columns = {
            column: pa.array([own(i) if chosen[i] else None for i in numbers], pa.float32())
            for column, own in weighted.items()
        }
        sample_keys = pa.array([f"{name}_{i:03d}" for i in numbers])
        pq.write_table(pa.table({"key": sample_keys, "chosen": chosen} | columns), directory.file(name, ".parquet"))
        report = ShardReport(
            name=name,
            source="test",
            num_read=num_samples,
            num_kept=num_samples,
            files={".parquet": sha256_file(directory.file(name, ".parquet"))},
        )
        directory.write_marker(report, settings.fingerprint)
        num_chosen += sum(chosen)
    extra = {"where": keys.get("where"), "num_samples": sum(shards.values()), "num_chosen": num_chosen}
    directory.write_manifest(settings.fingerprint, list(shards), upstream={}, extra=extra)
