"""Runs of before fingerprints left out defaults, and keys that come after them, are captioned no second time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import Field

from captioning import pass_jobs
from captioning.__main__ import main
from captioning.config import CaptioningConfig, LoopRetryConfig
from captioning.worker import CaptionWorker
from encoders.chat_config import ChatServerConfig
from pipelines.recipe import Decides
from pipelines.store.manifest import Fingerprint, read_manifest
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
{table}
[captioning.loop_retry]
{loop_retry}
[captioning.server]
base_url = "{base_url}"
num_requests = 2
{server}
"""
# Of the former fingerprint, what is left out today.
FORMER = {
    "prompts": CaptioningConfig().prompts,
    "max_alt_text_chars": 300,
    "dtype": "auto",
    "max_new_tokens": 256,
    "temperature": 0.0,
    "seed": 0,
}
LOOP_RETRY = {"repetition_penalty": 1.1, "ngram_words": 4, "max_repeated_ngram_ratio": 0.3}
SERVER = {"image_short_side_pixels": 0, "penalty_parameter": "repetition_penalty"}
LOWERED = ("--set", "captioning.max_aspect_ratio=19")
SOME_SET = {"loop_retry": "ngram_words = 5", "server": "image_short_side_pixels = 32", "table": "seed = 3"}
NUM_SAMPLES = 10


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def server():
    with ScriptedServer(describe) as server:
        yield server


def make_run(folder: Path, asked: ScriptedServer, tables: dict[str, str] | None = None) -> Path:
    """Two shards of ten samples, captioned."""
    for number in range(2):
        write_laion(folder / "raw" / f"laion_0000{number}.tar", NUM_SAMPLES, first=100 * number)
    given = {"table": "", "loop_retry": "", "server": ""} | (tables or {})
    (folder / "recipe.toml").write_text(RECIPE.format(base_url=asked.base_url, **given))
    with pytest.MonkeyPatch.context() as monkeypatch:
        command(folder, monkeypatch=monkeypatch)
    return folder


def command(run: Path, *options: str, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run), *options])
    main()


def as_formerly(run: Path) -> str:
    """Rewrite manifest and markers as they were when every field was written out; returns the digest."""
    path = run / "captions" / ".manifest.json"
    manifest = json.loads(path.read_text())
    fields = manifest["fingerprint"]["fields"]
    fields = FORMER | fields | {"loop_retry": LOOP_RETRY | fields.get("loop_retry", {})}
    former = Fingerprint.of(fields | {"server": SERVER | fields.get("server", {})})
    assert former.digest != manifest["fingerprint"]["digest"]
    extra = manifest["extra"] | {"texts": former.digest}
    del extra["judge_version"]
    fingerprint = {"fields": former.fields, "digest": former.digest}
    path.write_text(json.dumps(manifest | {"fingerprint": fingerprint, "extra": extra}))
    for marker in (run / "captions" / ".done").glob("*.json"):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"fingerprint": former.digest}))
    return former.digest


def interrupt(run: Path) -> None:
    """As if the command had been killed after the first of its shards."""
    for name in (".manifest.json", "laion_00001.parquet", ".done/laion_00001.json"):
        (run / "captions" / name).unlink()


def num_captions(server: ScriptedServer) -> int:
    return sum(body["max_tokens"] == 256 for body in server.requests)


def texts(run: Path) -> list[str]:
    tables = [pq.read_table(path).to_pylist() for path in sorted((run / "captions").glob("*.parquet"))]
    return [row["caption"] for table in tables for row in table]


def test_a_finished_former_run_killed_after_a_new_limit_keeps_its_captions(tmp_path, server, monkeypatch) -> None:
    """Killed once all is set aside and the manifest is gone, before anything is made under the new limit."""
    run = make_run(tmp_path, server)
    as_formerly(run)
    before = texts(run)
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def die(*_: Any, **options: Any) -> None:
            raise Killed

        patch.setattr("captioning.__main__.run_over_shards", die)
        command(run, *LOWERED, monkeypatch=patch)
    assert not (run / "captions" / ".manifest.json").exists()
    server.requests.clear()
    command(run, *LOWERED, monkeypatch=monkeypatch)
    assert num_captions(server) == 0 and texts(run) == before
    assert read_manifest(run / "captions").fingerprint.fields["seed"] == 0, "still in the former form"


def test_an_interrupted_former_run_goes_on_under_another_limit(tmp_path, server, monkeypatch) -> None:
    run = make_run(tmp_path, server)
    as_formerly(run)
    interrupt(run)
    server.requests.clear()
    command(run, *LOWERED, monkeypatch=monkeypatch)
    assert num_captions(server) == NUM_SAMPLES, "the second shard's"
    assert read_manifest(run / "captions").fingerprint.fields["seed"] == 0


def test_parts_of_a_former_run_are_taken_up(tmp_path, server, monkeypatch) -> None:
    """Nothing but parts is there to tell the form."""
    run = make_run(tmp_path, server)
    digest = as_formerly(run)
    shutil.rmtree(run / "captions")
    one = ("--set", 'captioning.shards=["laion_00000"]')
    step, calls = CaptionWorker.__call__, []
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def stepping(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            calls.append(result)
            if len(calls) == 2:
                raise Killed
            return result

        patch.setattr(CaptionWorker, "__call__", stepping)
        command(run, *one, monkeypatch=patch)
    [path] = (run / "captions").glob(".parts/*/*.report")
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"fingerprint": digest}))
    server.requests.clear()
    command(run, *one, monkeypatch=monkeypatch)
    assert read_manifest(run / "captions").fingerprint.digest == digest
    assert num_captions(server) == NUM_SAMPLES - report["report"]["num_read"]


class NewRetry(LoopRetryConfig):
    added: Decides[int] = Field(default=7, description="a key that came later")


class NewServer(ChatServerConfig):
    added: Decides[int] = Field(default=7, description="a key that came later")


class NewConfig(CaptioningConfig):
    added: Decides[int] = Field(default=7, description="a key that came later")
    loop_retry: Decides[NewRetry] = Field(default=NewRetry(), description="with a key that came later")
    server: NewServer = Field(default=NewServer(), description="with a key that came later")


@pytest.mark.parametrize("tables", [{}, SOME_SET], ids=["defaults", "some set"])
@pytest.mark.parametrize("is_former", [True, False], ids=["former", "today's"])
def test_keys_that_come_later_break_no_resume(tmp_path, server, monkeypatch, tables, is_former) -> None:
    """In the table and in tables within it; of a finished run and of an interrupted one."""
    run = make_run(tmp_path, server, tables)
    if is_former:
        as_formerly(run)
    before, manifest = texts(run), (run / "captions" / ".manifest.json").read_bytes()
    monkeypatch.setattr(pass_jobs, "CaptioningConfig", NewConfig)
    server.requests.clear()
    command(run, monkeypatch=monkeypatch)
    assert num_captions(server) == 0 and (run / "captions" / ".manifest.json").read_bytes() == manifest
    interrupt(run)
    command(run, monkeypatch=monkeypatch)
    assert num_captions(server) == NUM_SAMPLES and texts(run) == before


@pytest.mark.parametrize("table", ["captioning", "captioning.loop_retry", "captioning.server"])
def test_a_key_that_came_later_decides_once_it_is_set(tmp_path, server, monkeypatch, table) -> None:
    run = make_run(tmp_path, server)
    as_formerly(run)
    monkeypatch.setattr(pass_jobs, "CaptioningConfig", NewConfig)
    server.requests.clear()
    command(run, "--set", f"{table}.added=8", monkeypatch=monkeypatch)
    assert num_captions(server) == 2 * NUM_SAMPLES
