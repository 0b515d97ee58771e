"""A run whose captions are given, and its command."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from captioning.__main__ import main
from tests.raw_shards import write_laion, write_sa1b

RECIPE = """
[data]
shards = "{run}/raw/*.tar"

[engine]
samples_per_slice = 4
in_process = true
gpus_per_worker = 1.0

[captioning]
engine = "given"
max_reject_fraction = 1.0
"""


def write_run(run: Path) -> Path:
    """Write a shard of SA-1B with sa_0 … sa_9, one of LAION with ten texts of its own, and the recipe."""
    write_sa1b(run / "raw" / "sa_000000.tar", 10, first=0)
    write_laion(run / "raw" / "laion_00000.tar", 10)
    (run / "recipe.toml").write_text(RECIPE)
    return run


def command(run: Path, table: str = "", *settings: str, monkeypatch, is_plan: bool = False) -> None:
    argv = ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run)]
    for setting in (*([f"captioning.table={table}"] if table else []), *settings):
        argv += ["--set", setting]
    monkeypatch.setattr("sys.argv", argv + (["--plan"] if is_plan else []))
    main()


def rows_of(run: Path, shard: str) -> dict[str, dict[str, Any]]:
    table = pq.read_table(run / "captions" / f"{shard}.parquet")
    return {row["key"]: row for row in table.to_pylist()}
