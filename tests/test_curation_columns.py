"""`make columns`: one row per sample in raw order, resumed, and each score made for its own sake alone."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.__main__ import main
from pipelines.engine.progress import console
from pipelines.store.manifest import read_manifest
from tests.raw_shards import broken_images, encode, photo, write_laion, write_tar


@pytest.fixture
def columns(tmp_path, monkeypatch):
    """Types `make columns` for a run in `tmp_path`."""

    def make(*words: str) -> Path:
        run = tmp_path / "run"
        typed = ["--run", str(run), "--set", f"data.shards={tmp_path}/raw/*.tar", "--set", "engine.in_process=true"]
        monkeypatch.setattr("sys.argv", ["curation", *typed, *words])
        main()
        return run / "columns"

    return make


def test_every_sample_has_a_row_in_raw_order_and_rejects_have_nulls(tmp_path, columns) -> None:
    broken = {name: each for name, each in broken_images().items() if each[1] != "too_elongated"}
    members = [(f"{name}.jpg", data) for name, (data, _) in broken.items()]
    write_tar(tmp_path / "raw/a.tar", [("first.jpg", encode(photo(1, 64, 48))), *members])
    folder = columns("--set", "columns.max_reject_fraction=1.0", "--set", "data.max_pixels=1000000")
    table = pq.read_table(folder / "pixels/a.parquet")
    assert table["key"].to_pylist() == ["first", *broken]
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["width"], first["height"], first["min_side"], first["max_side"]) == (64, 48, 48, 64)
    assert (first["file_bytes"], first["reject"]) == (len(encode(photo(1, 64, 48))), None)
    for row in table.slice(1).to_pylist():
        assert row.pop("reject") == broken[row["key"]][1]
        assert {name for name, value in row.items() if value is not None} == {"key"}
    manifest = read_manifest(folder / "pixels")
    assert manifest.num_read == table.num_rows == manifest.num_kept + sum(manifest.rejected.values())
    said = manifest.extra["score"]
    assert (said["name"], said["needs"]) == ("pixels", "image")
    assert all(str(table.schema.field(name).type) == each["type"] for name, each in said["columns"].items())
    assert table.schema.field(table.num_columns - 1) == pa.field("reject", pa.string())


def test_a_plan_counts_what_is_made_from_scores_that_are_to_be_made(tmp_path, columns) -> None:
    write_laion(tmp_path / "raw/a.tar", 5)
    scores = ("--set", 'columns.scores=["pixels", "duplicates"]')

    def plan() -> dict[str, list[str]]:
        with console.capture() as told:
            columns(*scores, "--plan")
        rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in told.get().splitlines() if "│" in line]
        return {row[0]: row[-2:] for row in rows if len(row) > 2}

    assert plan() == {"pixels": ["1", "5"], "hashes": ["1", "5"], "duplicates": ["1", "5"]}
    assert not (tmp_path / "run/columns").exists()
    columns(*scores)
    assert plan() == {"pixels": ["0", "0"], "hashes": ["0", "0"], "duplicates": ["0", "0"]}
    write_laion(tmp_path / "raw/b.tar", 3, first=100)
    assert plan() == {"pixels": ["1", "3"], "hashes": ["1", "3"], "duplicates": ["2", "8"]}


def test_a_second_run_makes_nothing_and_a_new_shard_alone_is_measured(tmp_path, columns) -> None:
    write_laion(tmp_path / "raw/a.tar", 5)
    folder = columns()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    summary = (tmp_path / "run/summary.json").read_bytes()
    columns()
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (tmp_path / "run/summary.json").read_bytes() == summary
    assert json.loads(summary)["counts"]["columns"]["pixels"] == {"read": 5, "kept": 5, "rejected": {}}
    write_laion(tmp_path / "raw/b.tar", 3, first=100)
    columns()
    assert (folder / "pixels/a.parquet").stat().st_mtime_ns == written[folder / "pixels/a.parquet"]
    assert read_manifest(folder / "pixels").num_read == 8
