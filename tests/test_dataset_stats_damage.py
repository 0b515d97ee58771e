"""Damaged inputs: a bad row is a counted reject or an odd key and never ends the run; no text is lost in silence."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_shards import write_tar
from stats_run import run_stage

from dataset_stats import captions
from errors import UserError
from pipelines.store.summary import read_summary

LATIN_1 = "café".encode("latin-1")


def counted(folder: Path, files: str) -> dict:
    """The summary of the set over `files`."""
    run_stage(folder / "run", f"dataset_stats.sets=odd={files}")
    return read_summary(folder / "run")["dataset_stats"]["odd"]


def keys(folder: Path) -> list[str]:
    (path,) = (folder / "run" / "stats" / "counts").glob("*.captions.parquet")
    return pq.read_table(path)["key"].to_pylist()


def not_utf8(kind: pa.DataType, values: list[bytes]) -> pa.Array:
    """Strings as careless writers leave them: of type text, but not UTF-8."""
    raw = pa.array(values, pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    return pa.Array.from_buffers(kind, len(raw), raw.buffers())


def test_a_csv_in_latin_1_keeps_its_rows_apart(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"key,caption\n" + LATIN_1 + b"1,a dog\n" + LATIN_1 + b"2," + LATIN_1 + b"\n")
    summary = counted(tmp_path, f"{tmp_path}/a.csv")
    assert (summary["num_captions"], summary["rejected"]) == (1, {"not_utf8": 1})
    first, second = keys(tmp_path)
    assert first.startswith("caf") and first.endswith("1") and second.endswith("2")


@pytest.mark.parametrize("is_first", [True, False])
def test_odd_json_is_a_counted_row(tmp_path, is_first):
    odd = [b'{"caption": ' + b"[" * 100_000, b'{"caption": "a dog", "n": ' + b"1" * 5000 + b"}"]
    good = [b'{"key": "\\ud800", "caption": "a dog"}', b'{"key": "b", "caption": "a cat"}']
    lines = odd + good if is_first else good + odd
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    summary = counted(tmp_path, f"{tmp_path}/a.jsonl")
    assert (summary["num_captions"], summary["rejected"]) == (2, {"not_json": 2})
    assert {"\\ud800", "b"} <= set(keys(tmp_path))


def test_text_files_with_names_in_an_old_encoding_are_read(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / os.fsdecode(LATIN_1 + b".txt")).write_bytes(b"a dog")
    summary = counted(tmp_path, str(tmp_path / "texts"))
    assert (summary["num_captions"], summary["rejected"]) == (1, {})
    assert keys(tmp_path) == ["caf\\xe9"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("change", [lambda values: values, pa.Array.dictionary_encode], ids=["plain", "dictionary"])
def test_parquet_strings_that_are_not_utf8_spoil_their_own_row_only(
    tmp_path, kind, change: Callable[[pa.Array], pa.Array]
):
    columns = {
        "key": [LATIN_1, b"b", b"c", b"d"],
        "status": [b"success", b"success", LATIN_1, b"success"],
        "error_message": [b"", b"", LATIN_1, b""],
        "caption": [b"a dog", LATIN_1, b"a cat", b"a lamp"],
    }
    table = pa.table({name: change(not_utf8(kind, values)) for name, values in columns.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    summary = counted(tmp_path, f"{tmp_path}/a.parquet")
    assert (summary["num_captions"], summary["rejected"]) == (2, {"caf\\xe9": 1, "not_utf8": 1})
    assert keys(tmp_path) == ["caf\\xe9", "b", "c", "d"]


def test_a_folder_of_tars_and_texts_is_refused(tmp_path):
    write_tar(tmp_path / "sam" / "00.tar", [(f"{number}.txt", b"a dog") for number in range(100)])
    (tmp_path / "sam" / "README.txt").write_text("How to read these tars.")
    assert counted(tmp_path, f"{tmp_path}/sam")["num_captions"] == 100
    (tmp_path / "sam" / "0.txt").write_text("a dog")
    with pytest.raises(
        UserError, match=r"sets\.odd\.files: .*sam holds tar \(00\.tar\) and text \(0\.txt\).*sam/\*\.tar"
    ):
        counted(tmp_path, f"{tmp_path}/sam")
    assert counted(tmp_path, f"{tmp_path}/sam/*.tar")["num_captions"] == 100


def test_a_damaged_tar_of_texts_is_used_up_to_the_damage_and_named(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "0.txt"
        tar.addfile(link)
        for number in range(4):
            (tmp_path / f"{number}.txt").write_text("a dog " * 500)
            tar.add(tmp_path / f"{number}.txt", f"{number}.txt")
        middle_of_last = tar.offset - 2000
    os.truncate(tmp_path / "a.tar", middle_of_last)
    warnings: list[str] = []
    monkeypatch.setattr(captions.log, "warning", warnings.append)
    summary = counted(tmp_path, f"{tmp_path}/a.tar")
    assert (summary["num_captions"], summary["rejected"]) == (3, {"cut_off": 1})
    cut, links = warnings
    assert "a.tar: cut off" in cut and "a.tar: 1 members are no samples" in links and "link.txt" in links
