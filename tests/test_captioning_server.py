"""The engine for chat servers: a real `transformers serve` that is killed and comes back, and every way to fail."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioning.__main__ import main
from captioning.canary import check_engine
from captioning.config import DESCRIBE, CaptioningConfig
from captioning.engines.openai_engine import OpenAIEngine
from captioning.engines.protocol import Caption
from captioning.engines.transformers_engine import TransformersEngine
from encoders.chat import ChatClient
from encoders.chat_server import ServerError
from errors import UserError
from pipelines.store.manifest import read_manifest
from tests.chat_server import (
    ScriptedServer,
    TransformersServe,
    describe,
    fail,
    free_port,
    image_of,
    requests,
    say,
)
from tests.raw_shards import write_laion, write_sa1b

TOY = Path(__file__).resolve().parent.parent / "toyworld" / "weights" / "llava"
LOOP = "A red kite. " + "There is a chair in the room. " * 8
RECIPE = """
[data]
shards = "{{run}}/raw/*.tar"

[engine]
samples_per_slice = 4
in_process = true

[captioning]
engine = "openai"
model = "{model}"
max_new_tokens = 40
max_reject_fraction = 0.5

[captioning.server]
base_url = "{base_url}"
num_requests = {num_requests}
max_backoff_seconds = 0.3
patience_seconds = {patience}
penalty_parameter = "frequency_penalty"
"""


def make_run(folder: Path, *, base_url: str, model: str = "toy", num_requests: int = 4, patience: float = 60) -> Path:
    write_laion(folder / "raw" / "laion_00000.tar", 6)
    write_sa1b(folder / "raw" / "sa_000000.tar", 6)
    recipe = RECIPE.format(base_url=base_url, model=model, num_requests=num_requests, patience=patience)
    (folder / "recipe.toml").write_text(recipe)
    return folder


def command(run: Path, *options: str, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run), *options])
    main()


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "captions").glob("*.parquet"))}


def rows(run: Path) -> dict[str, dict[str, Any]]:
    tables = [pq.read_table(path).to_pylist() for path in sorted((run / "captions").glob("*.parquet"))]
    return {f"{row['shard']}/{row['key']}": row for table in tables for row in table}


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    server = TransformersServe(TOY, tmp_path_factory.mktemp("serve") / "log.txt")
    server.start()
    server.wait()
    yield server
    server.kill()


def test_a_real_server_says_what_the_model_says_in_process(serve) -> None:
    table = {"model": serve.model, "max_new_tokens": 60, "server": {"base_url": serve.base_url}}
    remote = OpenAIEngine(CaptioningConfig.model_validate({"engine": "openai", **table}), api_key="")
    local = TransformersEngine(CaptioningConfig.model_validate(table), num_threads=1)
    asked = requests(8)
    check_engine(remote, asked[0].image, DESCRIBE)
    theirs, ours = remote.caption(remote.prepare(asked)), local.caption(local.prepare(asked))
    assert [caption.text for caption in ours] == [caption.text for caption in theirs if isinstance(caption, Caption)]
    assert len({caption.text for caption in ours}) > 4
    for our, their in zip(ours, theirs, strict=True):
        # A server counts the end token, and calls a caption cut whose end token is the last one it may say.
        assert our.num_tokens is not None and isinstance(their, Caption)
        assert their.num_tokens == our.num_tokens + (our.finish_reason == "stop")
        assert their.finish_reason == our.finish_reason or their.num_tokens == 60


@pytest.mark.faults
def test_a_server_killed_in_the_middle_of_a_shard_costs_nothing_but_time(serve, tmp_path, monkeypatch) -> None:
    """Kill -9 after the tenth answer, start it again two seconds later; and another number of requests in flight."""
    calm = make_run(tmp_path / "calm", base_url=serve.base_url, model=serve.model, num_requests=2)
    command(calm, monkeypatch=monkeypatch)
    run = make_run(tmp_path / "run", base_url=serve.base_url, model=serve.model, num_requests=4, patience=240)
    send, answers, killed = ChatClient._send, [], threading.Event()

    def send_and_kill(engine: OpenAIEngine, prompt: Any, decoding: Any) -> Any:
        answer = send(engine, prompt, decoding)
        answers.append(answer)
        if len(answers) == 10 and not killed.is_set():
            killed.set()
            serve.kill()
            restart = threading.Timer(2.0, serve.start)
            restart.start()
        return answer

    monkeypatch.setattr(ChatClient, "_send", send_and_kill)
    command(run, monkeypatch=monkeypatch)
    assert killed.is_set() and len(answers) > 12
    assert contents(run) == contents(calm)
    assert read_manifest(run / "captions").num_kept == 12


def test_the_key_is_in_no_file_and_the_address_in_no_fingerprint(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    run = tmp_path
    with ScriptedServer(describe) as server:
        command(make_run(run, base_url=server.base_url), monkeypatch=monkeypatch)
        assert server.keys == {"Bearer sk-very-secret"}
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 6 and all(b"sk-very-secret" not in path.read_bytes() for path in files)
    before = contents(run)
    # The server is away now, and nothing is left to ask it.
    monkeypatch.setattr(OpenAIEngine, "__init__", None)
    command(run, "--set", "captioning.server.base_url=http://127.0.0.1:1/v1", monkeypatch=monkeypatch)
    assert contents(run) == before


def test_workers_of_a_cluster_ask_with_the_drivers_key_and_write_the_same_bytes(tmp_path, monkeypatch) -> None:
    """Two Ray workers, shards cut inside; the key is in the environment of the command only."""
    with ScriptedServer(describe) as server:
        alone = make_run(tmp_path / "alone", base_url=server.base_url)
        command(alone, monkeypatch=monkeypatch)
        server.keys.clear()
        run = make_run(tmp_path / "run", base_url=server.base_url)
        options = ["--set", "engine.in_process=false", "--set", "engine.num_workers=2"]
        line = [sys.executable, "-m", "captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run), *options]
        environment = {**os.environ, "OPENAI_API_KEY": "sk-of-the-driver"}
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert server.keys == {"Bearer sk-of-the-driver"}
    assert contents(run) == contents(alone) and "sk-of-the-driver" not in done.stderr


def test_a_plan_says_where_the_server_is_and_does_not_wait_for_it(tmp_path, monkeypatch, capsys) -> None:
    run = make_run(tmp_path, base_url="http://127.0.0.1:1/v1")
    with pytest.raises(
        ServerError, match=r"captioning\.server\.base_url http://127\.0\.0\.1:1/v1 has not answered for 0 s"
    ):
        command(run, "--plan", monkeypatch=monkeypatch)
    said = " ".join(capsys.readouterr().err.split())
    assert "toy (toy@main of a server), at http://127.0.0.1:1/v1" in said and "4 captions at a time" in said


def test_a_server_that_never_comes_back_leaves_what_is_done(tmp_path, monkeypatch) -> None:
    with ScriptedServer(describe) as whole:
        calm = make_run(tmp_path / "calm", base_url=whole.base_url)
        command(calm, monkeypatch=monkeypatch)
    fall = len(whole.requests) - 3
    run = make_run(tmp_path / "run", base_url="http://127.0.0.1:1/v1", patience=0.5)
    with ScriptedServer(lambda body, n: describe(body, n) if n < fall else fail(503, "gone")) as server:
        option = ["--set", f"captioning.server.base_url={server.base_url}"]
        with pytest.raises(ServerError, match="bring the server back and run the same command again"):
            command(run, *option, monkeypatch=monkeypatch)
    assert list(contents(run)) == ["laion_00000.parquet"]
    with ScriptedServer(describe) as server:
        option = ["--set", f"captioning.server.base_url={server.base_url}"]
        command(run, *option, monkeypatch=monkeypatch)
        asked_again = len(server.requests)
    assert contents(run) == contents(calm) and asked_again < len(whole.requests)


def test_no_server_at_all_is_said_before_any_work(tmp_path, monkeypatch) -> None:
    run = make_run(tmp_path, base_url=f"http://127.0.0.1:{free_port()}/v1", patience=0.2)
    with pytest.raises(ServerError, match=r"captioning.server.base_url .* has not answered"):
        command(run, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=r"engine.gpus_per_worker is 1.0, but workers of captioning.engine = 'openai'"):
        command(run, "--set", "engine.gpus_per_worker=1.0", monkeypatch=monkeypatch)


def test_a_server_without_usage_or_with_a_filter(tmp_path, monkeypatch) -> None:
    """No token counts: the column is null. Filtered answers are rejects. Cut ones are flagged."""

    def answer(body: dict, number: int) -> Any:
        reasons = {0: "length", 1: "content_filter"}
        probe = body["max_tokens"] == 32
        index = image_of(body).tobytes()[0] % 3
        status, content = describe(body, number)
        content["choices"][0]["finish_reason"] = "stop" if probe else reasons.get(index, "stop")
        del content["usage"]
        return status, content

    with ScriptedServer(answer) as server:
        run = make_run(tmp_path, base_url=server.base_url)
        command(run, "--set", "captioning.max_reject_fraction=1.0", monkeypatch=monkeypatch)
    found = rows(run).values()
    assert {row["finish_reason"] for row in found} == {"length", "stop", None}
    for row in found:
        assert row["num_tokens"] is None
        assert (row["reject"] == "refused_by_server") == (row["caption"] is None)
        assert ("truncated" in row["flags"]) == (row["finish_reason"] == "length")
    manifest = read_manifest(run / "captions")
    assert manifest.rejected == {"refused_by_server": sum(row["reject"] is not None for row in found)}


def test_retry_asks_about_refused_images_only(tmp_path, monkeypatch) -> None:
    """The server is put right: RETRY=1 asks about two images, and ends with the bytes of a run that met no fault."""
    with ScriptedServer(describe) as server:
        calm = make_run(tmp_path / "calm", base_url=server.base_url)
        command(calm, monkeypatch=monkeypatch)
        seen = sorted({image_of(body).tobytes() for body in server.requests if body["max_tokens"] != 32})
    refused = {seen[1], seen[4]}

    def answer(body: dict, number: int) -> Any:
        is_refused = body["max_tokens"] != 32 and image_of(body).tobytes() in refused
        return fail(400, "too dark") if is_refused else describe(body, number)

    with ScriptedServer(answer) as server:
        run = make_run(tmp_path / "run", base_url=server.base_url)
        command(run, monkeypatch=monkeypatch)
    assert 0 < read_manifest(run / "captions").rejected["refused_by_server"] < 12
    num_rejected = sum(row["reject"] is not None for row in rows(run).values())
    with ScriptedServer(describe) as server:
        options = ["--set", f"captioning.server.base_url={server.base_url}", "--set", "captioning.retry_rejects=true"]
        command(run, *options, monkeypatch=monkeypatch)
        assert sum(body["max_tokens"] != 32 for body in server.requests) == num_rejected
    assert contents(run) == contents(calm) and read_manifest(run / "captions").num_kept == 12


def test_a_loop_is_asked_again_once_with_a_penalty(tmp_path, monkeypatch) -> None:
    """One image loops and gets better, another loops for ever; the rest is left alone."""

    def answer(body: dict, number: int) -> Any:
        kind = image_of(body).tobytes()[0] % 3
        if body["max_tokens"] == 32 or kind == 0 or (kind == 1 and "frequency_penalty" in body):
            return describe(body, number)
        return say(LOOP)

    with ScriptedServer(answer) as server:
        run = make_run(tmp_path, base_url=server.base_url)
        command(run, monkeypatch=monkeypatch)
    found = list(rows(run).values())
    retried = [row for row in found if row["first_caption"] is not None]
    again = [body for body in server.requests if "frequency_penalty" in body]
    assert 0 < len(retried) < len(found) and len(again) == len(retried)
    assert all(body["frequency_penalty"] == pytest.approx(0.1) for body in again)
    for row in found:
        assert ("retried" in row["flags"]) == (row["first_caption"] == LOOP.strip())
        assert ("loop" in row["flags"]) == (row["caption_raw"] == LOOP.strip())
    assert {"loop" in row["flags"] for row in retried} == {True, False}
    assert read_manifest(run / "captions").extra["engine"] == "openai"


def test_a_penalty_the_server_does_not_know_is_said_by_its_key(tmp_path, monkeypatch) -> None:
    def answer(body: dict, number: int) -> Any:
        if "repetition_penalty" in body:
            return fail(422, "Unexpected fields in the request: {'repetition_penalty'}")
        return describe(body, number) if body["max_tokens"] == 32 else say(LOOP)

    with ScriptedServer(answer) as server:
        run = make_run(tmp_path, base_url=server.base_url)
        option = ["--set", "captioning.server.penalty_parameter=repetition_penalty"]
        with pytest.raises(ServerError, match=r"captioning.server.penalty_parameter 'repetition_penalty' is not what"):
            command(run, *option, monkeypatch=monkeypatch)
