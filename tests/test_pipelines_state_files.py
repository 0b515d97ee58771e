"""Damaged state is named with what to do; what can be had again is, with one line; torn lines are left out."""

import errno
import fcntl
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from errors import UserError
from pipelines.engine.pieces import PARTS_FOLDER
from pipelines.raw.shards import describe_shards, open_shard
from pipelines.run_memory import recall_shards, remember_found
from pipelines.store.files import atomic_file, atomic_folder, atomic_write_bytes, remove_temporary_files
from pipelines.store.manifest import Fingerprint, ShardDirectory, read_manifest
from pipelines.store.state_files import read_log, read_records, read_state, state_of
from pipelines.store.tables import MEND_SHARD, count_table_rows, read_table
from tests.line_worker import contents, make_sources, run
from tests.raw_shards import write_laion
from training.data.survey import Survey, load_survey, save_survey

FINGERPRINT = Fingerprint.of({"version": 1})
DAMAGES = {"empty": b"", "cut": b'{"fingerprint": "x", "rep', "zeros": bytes(64), "a list": b"[1]", "other": b"{}"}


@pytest.fixture
def output(tmp_path) -> Path:
    run(tmp_path / "a", make_sources(3, 20))
    return tmp_path / "a"


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", ".done/s1.json"])
def test_what_is_said_of_damaged_state_is_what_mends_it(output, kind: str, name: str) -> None:
    before = contents(output)
    (output / name).write_bytes(DAMAGES[kind])
    with pytest.raises(UserError, match=rf"{name} .*; remove it and type the command") as said:
        run(output, make_sources(3, 20))
    assert ("is empty" in str(said.value)) == (kind == "empty")
    (output / name).unlink()
    run(output, make_sources(3, 20))
    assert contents(output) == before


@pytest.mark.parametrize("data", [b"", b'{"fingerprint": 1}', b'{"fingerprint": "%s", "report": {"name": "mine"}}'])
def test_a_damaged_marker_of_no_shard_of_the_command_stops_nothing(output, data: bytes, caplog) -> None:
    before = contents(output)
    (output / "manifest.json").unlink()
    mine = output / ".done" / "mine.json"
    mine.write_bytes(data.replace(b"%s", FINGERPRINT.digest.encode()))
    with caplog.at_level(logging.WARNING, logger="atelier"):
        run(output, make_sources(3, 20))
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "mine.json" in line and "it is no shard of this command, and left out" in line
    assert ShardDirectory(output).marked() == ["s0", "s1", "s2"]
    mine.unlink()
    assert contents(output) == before


def test_a_marker_or_manifest_of_other_content_is_named_with_the_value(output) -> None:
    marker = output / ".done" / "s1.json"
    content = json.loads(marker.read_text())
    content["report"]["num_read"] = "many"
    marker.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"s1\.json is damaged, or of another version: num_read: .* s1 alone is done"):
        ShardDirectory(output).report("s1", FINGERPRINT)
    content["report"] |= {"num_read": 19, "colour": "red"}
    marker.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"s1\.json .* colour is not known"):
        ShardDirectory(output).report("s1", FINGERPRINT)
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["shards"]["s0"]["num_kept"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json .* shards\.s0\.num_kept: Field required"):
        read_manifest(output)
    with pytest.raises(UserError, match=r"a/manifest\.json does not say what 'vae' is"):
        run(output.parent / "b", make_sources(1, 20)).fact("vae", where=output)


def test_a_damaged_note_of_a_part_has_its_samples_done_again(output, caplog) -> None:
    before = contents(output)
    parts = output / PARTS_FOLDER / "s1"
    parts.mkdir(parents=True)
    (parts / "000000000-000000008.0a1b2c3d.report").write_bytes(b'{"piece": ')
    (parts / "mine.report").write_bytes(b"mine")
    for name in ("manifest.json", ".done/s1.json"):
        (output / name).unlink()
    with caplog.at_level(logging.WARNING, logger="atelier"):
        run(output, make_sources(3, 20))
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "000000000-000000008.0a1b2c3d.report is damaged" in line and "its samples are done again" in line
    assert (parts / "mine.report").read_bytes() == b"mine"
    (parts / "mine.report").unlink()
    assert {name: data for name, data in contents(output).items() if PARTS_FOLDER not in name} == before


@pytest.mark.parametrize("cut", [0, 10, -10])
def test_damaged_headers_are_read_again_once(tmp_path, cut: int, caplog) -> None:
    tar = str(write_laion(tmp_path / "raw" / "a.tar", 30))
    described = describe_shards([tar], run=tmp_path)
    (file,) = (tmp_path / ".headers").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    with caplog.at_level(logging.WARNING, logger="atelier"):
        assert describe_shards([tar], run=tmp_path) == described
        with open_shard(tar, run=tmp_path) as shard:
            assert len(shard.samples) == 30
    assert len(caplog.records) == 1 and file.name in caplog.text and "are read again" in caplog.text
    assert file.read_bytes() == whole


def test_remembered_shards_that_are_damaged_are_named(tmp_path) -> None:
    tar = str(write_laion(tmp_path / "raw" / "a.tar", 30))
    (tmp_path / "shards.json").write_bytes(b'{"a": 3}')
    with pytest.raises(UserError, match=r"shards\.json .* remove it, and type RECIPE and SHARDS with"):
        recall_shards(tmp_path)
    (tmp_path / "shards.json").unlink()
    remember_found(tmp_path, [tar])
    assert recall_shards(tmp_path) == [tar]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_survey_is_none(tmp_path, kind: str, caplog) -> None:
    survey = Survey(buckets=["32x32"], counts=[[[3]]], channels=4, downsample=8, max_label=-1, num_without_size=0)
    save_survey(survey, tmp_path / "survey.json", identity="x")
    assert load_survey(tmp_path / "survey.json", identity="x") == survey
    (tmp_path / "survey.json").write_bytes(DAMAGES[kind])
    with caplog.at_level(logging.WARNING, logger="atelier"):
        assert load_survey(tmp_path / "survey.json", identity="x") is None
    assert len(caplog.records) == 1 and "the shards are counted again" in caplog.text


def test_a_log_is_read_without_torn_lines_and_a_table_of_lines_names_them(tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n\n[2]\n{"step": 3}\n{"ste')
    assert list(read_log(path)) == [{"step": 1}, {"step": 3}]
    with pytest.raises(UserError, match=r"lines\.jsonl, line 2 is empty; write it anew"):
        read_records(path, mend="write it anew")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(UserError, match=r"x\.json is a folder, where a file should be"):
        read_state(tmp_path / "x.json", mend="move it away")
    with pytest.raises(UserError, match=r"x\.json is a folder, where a file is to be written; move it away"):
        atomic_write_bytes(tmp_path / "x.json", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(UserError, match=r"somewhere is damaged, or of another version: a: .*; mend it"):
        state_of(dict[str, int], {"a": "b"}, where="somewhere", mend="mend it")


def leave(path: Path, data: bytes = b"of a killed process") -> Path:
    """Write a temporary file that nobody has written to for a long time."""
    path.write_bytes(data)
    os.utime(path, (0, 0))
    return path


def test_what_is_being_written_is_no_leftover(tmp_path) -> None:
    leave(tmp_path / ".x.0123abcd.tmp")
    with atomic_file(tmp_path / "x") as temporary:
        temporary.write_bytes(b"1")
        remove_temporary_files(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [temporary.name]
    assert (tmp_path / "x").read_bytes() == b"1"


def test_leftovers_go_and_files_are_written_where_locks_are_of_no_use(tmp_path, monkeypatch) -> None:
    """NFS locks no file that is open for reading, SMB lets nobody write a locked one, some storage has no locks."""

    def no_locks(*_) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    leave(tmp_path / ".x.0123abcd.tmp")
    (tmp_path / ".y.0123abcd.tmp").write_bytes(b"perhaps somebody's")
    remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".y.0123abcd.tmp"]
    remove_temporary_files(tmp_path, is_held=True)
    assert not list(tmp_path.iterdir())
    atomic_write_bytes(tmp_path / "x", b"1")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_bytes(b"2")
    assert (tmp_path / "x").read_bytes() + (tmp_path / "folder" / "a").read_bytes() == b"12"


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_renamed_is_told_by_its_own_error(tmp_path, monkeypatch, code: int) -> None:
    def fail(*_) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_bytes(b"1")
    with pytest.raises(UserError, match=r"folder is there by now"), atomic_folder(tmp_path / "folder"):
        pass
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError) as said, atomic_folder(tmp_path / "folder"):
        pass
    assert said.value.errno == code
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("size", [0, 3, -20])
def test_a_damaged_table_is_named(tmp_path, size: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:size])
    for read in (read_table, count_table_rows):
        with pytest.raises(UserError, match=r"a\.parquet is no readable table \(.*\); remove it and type the command"):
            read(path, mend=MEND_SHARD)
