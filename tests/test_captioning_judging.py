"""Other thresholds ask nothing: finished shards and parts are judged in place, and a kill in between loses nothing."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioning import job, quality, table
from captioning.__main__ import main
from captioning.worker import CaptionWorker
from pipelines.engine import run as engine
from pipelines.store.files import sha256_file
from pipelines.store.manifest import ShardDirectory, read_manifest
from tests.chat_server import ScriptedServer, describe
from tests.raw_shards import write_laion

RECIPE = """
[data]
shards = "{{run}}/raw/*.tar"

[engine]
samples_per_slice = 4
in_process = true

[captioning]
engine = "openai"
model = "toy"

[captioning.server]
base_url = "{base_url}"
num_requests = 2
"""
STRICT = ("--set", "captioning.quality.min_alt_text_overlap=0.5")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def server():
    with ScriptedServer(describe) as server:
        yield server


def make_run(folder: Path, server: ScriptedServer) -> Path:
    """One shard of ten samples, which one worker takes in two pieces."""
    write_laion(folder / "raw" / "laion_00000.tar", 10)
    (folder / "recipe.toml").write_text(RECIPE.format(base_url=server.base_url))
    return folder


def command(run: Path, *options: str, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run), *options])
    main()


def contents(run: Path) -> dict[str, bytes]:
    """Every byte of captions/ that is meant to stay, markers and manifest included."""
    folder = run / "captions"
    kept = (path for path in folder.rglob("*") if path.suffix in (".parquet", ".json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def calm(tmp_path_factory, server) -> dict[str, dict[str, bytes]]:
    """What undisturbed runs leave, by thresholds."""
    found = {}
    for name, options in (("plain", ()), ("strict", STRICT)):
        run = make_run(tmp_path_factory.mktemp(name), server)
        with pytest.MonkeyPatch.context() as monkeypatch:
            command(run, *options, monkeypatch=monkeypatch)
        found[name] = contents(run)
    assert found["plain"]["laion_00000.parquet"] != found["strict"]["laion_00000.parquet"]
    return found


def dying(owner: Any, name: str, *, calls: int, monkeypatch) -> None:
    """Let the process end right after `calls` calls."""
    step, done = getattr(owner, name), []

    def stepping(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        done.append(name)
        if len(done) == calls:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, stepping)


def die(*_: Any, **__: Any) -> None:
    raise Killed


def test_a_newer_judge_writes_flags_anew_and_captions_nothing(tmp_path, server, calm, monkeypatch) -> None:
    run = make_run(tmp_path, server)
    command(run, monkeypatch=monkeypatch)
    num_requests = len(server.requests)
    for module in (table, job):
        monkeypatch.setattr(module, "JUDGE_VERSION", quality.JUDGE_VERSION + 1)
    newer = quality.judge

    def judge(row: Any, thresholds: Any) -> Any:
        found = newer(row, thresholds)
        return {**found, "flags": [*found["flags"], "loop"]}

    monkeypatch.setattr(table, "judge", judge)
    texts = read_manifest(run / "captions").extra["texts"]
    command(run, monkeypatch=monkeypatch)
    rows = pq.read_table(run / "captions" / "laion_00000.parquet").to_pylist()
    assert all(row["flags"] == ["loop"] for row in rows if row["reject"] is None)
    manifest = read_manifest(run / "captions")
    assert manifest.extra["judge_version"] == quality.JUDGE_VERSION + 1 and manifest.extra["texts"] == texts
    assert manifest.extra["flags"] == list(quality.FLAGS)
    assert sum(shard.details.get("flag_loop", 0) for shard in manifest.shards.values()) == len(rows)
    assert len(server.requests) == num_requests
    written = contents(run)
    command(run, monkeypatch=monkeypatch)
    assert contents(run) == written, "a third time does nothing"


@pytest.mark.parametrize("end", ["plain", "strict"])
def test_killed_between_marker_and_file_and_then_any_thresholds(tmp_path, server, calm, monkeypatch, end: str) -> None:
    """The marker speaks of a file that never came; the old thresholds again must not take it at its word."""
    run = make_run(tmp_path, server)
    command(run, monkeypatch=monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(ShardDirectory, "write_marker", calls=1, monkeypatch=patch)
        command(run, *STRICT, monkeypatch=patch)
    server.requests.clear()
    command(run, *(STRICT if end == "strict" else ()), monkeypatch=monkeypatch)
    assert contents(run) == calm[end] and server.requests == []
    [report] = read_manifest(run / "captions").shards.values()
    assert report.files[".parquet"] == sha256_file(run / "captions" / "laion_00000.parquet")


def test_a_manifest_of_other_settings_vouches_for_no_marker(tmp_path, server, calm, monkeypatch) -> None:
    """As above, but another shard was captioned under another prompt in between, which left a manifest."""
    run = make_run(tmp_path, server)
    command(run, monkeypatch=monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(ShardDirectory, "write_marker", calls=1, monkeypatch=patch)
        command(run, *STRICT, monkeypatch=patch)
    other = write_laion(tmp_path / "other" / "laion_00001.tar", 2)
    prompt = 'captioning.prompts={"laion_*" = "What is this?"}'
    command(run, "--set", f"data.shards={other}", "--set", prompt, monkeypatch=monkeypatch)
    command(run, monkeypatch=monkeypatch)
    assert {name: data for name, data in contents(run).items() if "laion_00001" not in name} == calm["plain"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_parts_of_an_interrupted_run_are_judged_and_not_captioned_again(
    tmp_path, server, calm, monkeypatch, is_killed: bool
) -> None:
    """Killed once more between a part's file and its report, too: the counts are those of the file."""
    run = make_run(tmp_path, server)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(CaptionWorker, "__call__", calls=2, monkeypatch=patch)
        command(run, monkeypatch=patch)
    [report] = (run / "captions").glob(".parts/*/*.report")
    assert "flag_off_alt_text" not in json.loads(report.read_text())["report"]["details"]
    if is_killed:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(table, "atomic_write_json", die)
            command(run, *STRICT, monkeypatch=patch)
        assert "flag_off_alt_text" not in json.loads(report.read_text())["report"]["details"]
    server.requests.clear()
    command(run, *STRICT, monkeypatch=monkeypatch)
    assert contents(run) == calm["strict"]
    assert sum(body["max_tokens"] == 256 for body in server.requests) == 10 - 8, "the second piece only"


@pytest.mark.parametrize("last_step", ["", "atomic_write_json", "_with_flags"])
def test_a_whole_shard_judged_before_it_is_in_place_is_hashed_anew(
    tmp_path, server, calm, monkeypatch, last_step: str
) -> None:
    """Its part's report has the worker's hash. Killed again before the file is judged, before its counts, or not."""
    run, whole = make_run(tmp_path, server), ("--set", "engine.samples_per_slice=16")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine, "finish_shard", die)
        command(run, *whole, monkeypatch=patch)
    [report] = (run / "captions").glob(".parts/*/*.report")
    assert json.loads(report.read_text())["report"]["files"]
    if last_step:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dying(table, last_step, calls=1, monkeypatch=patch)
            command(run, *whole, *STRICT, monkeypatch=patch)
    command(run, *whole, *STRICT, monkeypatch=monkeypatch)
    assert contents(run) == calm["strict"]
    [shard] = read_manifest(run / "captions").shards.values()
    assert shard.files[".parquet"] == sha256_file(run / "captions" / "laion_00000.parquet")


def test_thresholds_there_and_back_while_another_shard_has_a_manifest(tmp_path, server, calm, monkeypatch) -> None:
    """Parts of an interrupted shard beside a manifest of the old thresholds, which must not hide what they are now."""
    run = make_run(tmp_path, server)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(CaptionWorker, "__call__", calls=2, monkeypatch=patch)
        command(run, monkeypatch=patch)
    other = write_laion(tmp_path / "other" / "laion_00001.tar", 2)
    command(run, "--set", f"data.shards={other}", monkeypatch=monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(table, "atomic_write_json", die)
        command(run, *STRICT, monkeypatch=patch)
    command(run, monkeypatch=monkeypatch)
    names = ("laion_00000.parquet", ".done/laion_00000.json")
    assert [contents(run)[name] for name in names] == [calm["plain"][name] for name in names]
