"""A run with captions in several passes, and its command."""

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioning.__main__ import main
from tests.raw_shards import write_laion, write_sa1b

RECIPE = """
[data]
shards = "{{run}}/raw/*.tar"

[engine]
samples_per_slice = 4
in_process = true

[captioning]
model = "{model}"
max_new_tokens = 16
batch_size = 4
prompts = {{ "sa_*" = "What does this large photo show?" }}

[captioning.passes.short]
prompts = {{ default = "What is this?" }}
max_new_tokens = 6

[captioning.passes.given]
engine = "given"
table = "#"
shards = ["laion_*"]
"""


def write_run(run: Path, model: Path) -> Path:
    """Write a shard of LAION with twelve texts of its own, one of SA-1B with ten without, and the recipe."""
    write_laion(run / "raw" / "laion_00000.tar", 12)
    write_sa1b(run / "raw" / "sa_000000.tar", 10)
    (run / "recipe.toml").write_text(RECIPE.format(model=model))
    return run


def command(run: Path, *settings: str, monkeypatch: pytest.MonkeyPatch, is_plan: bool = False) -> None:
    argv = ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run)]
    for setting in settings:
        argv += ["--set", setting]
    monkeypatch.setattr(sys, "argv", argv + (["--plan"] if is_plan else []))
    main()


def rows_of(run: Path, column: str, shard: str) -> list[dict[str, Any]]:
    folder = "captions" if column == "caption" else f"captions@{column}"
    return pq.read_table(run / folder / f"{shard}.parquet").to_pylist()


def contents(run: Path, column: str) -> dict[str, bytes]:
    """The bytes of every file of a column's folder, but not of the folders of markers and parts."""
    folder = run / ("captions" if column == "caption" else f"captions@{column}")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}
