"""Answers that are no captions: refusals at the first look and at a second try, web pages, and halves of characters."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioning.__main__ import main
from captioning.canary import CanaryError
from captioning.config import CaptioningConfig
from captioning.engines.openai_engine import OpenAIEngine
from captioning.engines.protocol import Caption, Request
from encoders.chat_server import ServerError
from pipelines.store.manifest import read_manifest
from tests.chat_server import ScriptedServer, describe, fail, image_of, say
from tests.raw_shards import encode, laion_members, photo, write_tar

LOOP = "A red kite. " + "There is a chair in the room. " * 8
PROBE_TOKENS = 32
RECIPE = """
[data]
shards = "{{run}}/raw/*.tar"

[engine]
samples_per_slice = {samples_per_slice}
in_process = true

[captioning]
engine = "openai"
model = "toy"
max_new_tokens = 40
max_reject_fraction = 1.0

[captioning.server]
num_requests = 2
max_attempts = 2
max_backoff_seconds = 0.02
patience_seconds = 5
"""


def make_run(folder: Path, *, num_samples: int = 8, samples_per_slice: int = 8) -> Path:
    """One shard of contrasted images, stored without loss so that the server knows them."""
    images = [encode(photo(n), "PNG") for n in range(num_samples)]
    members = [laion_members(f"{n:09d}", image, f"alt {n}", extension="png") for n, image in enumerate(images)]
    write_tar(folder / "raw" / "laion_00000.tar", [member for sample in members for member in sample])
    (folder / "recipe.toml").write_text(RECIPE.format(samples_per_slice=samples_per_slice))
    return folder


def command(run: Path, server: ScriptedServer, *options: str, monkeypatch) -> None:
    address = ("--set", f"captioning.server.base_url={server.base_url}")
    recipe = str(run / "recipe.toml")
    monkeypatch.setattr("sys.argv", ["captioning", "--recipe", recipe, "--run", str(run), *address, *options])
    main()


def rows(run: Path) -> list[dict[str, Any]]:
    return pq.read_table(run / "captions" / "laion_00000.parquet").to_pylist()


def contents(run: Path) -> dict[str, bytes]:
    """Every byte of captions/ that is meant to stay."""
    folder = run / "captions"
    kept = (path for path in folder.rglob("*") if path.suffix in (".parquet", ".json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def shows(body: dict[str, Any], *numbers: int) -> bool:
    """Whether a request is about one of these images."""
    return image_of(body).tobytes() in [photo(number).tobytes() for number in numbers]


def refuse_two(body: dict[str, Any], number: int) -> Any:
    return fail(400, "flagged by content policy") if shows(body, 0, 1) else describe(body, number)


def test_refused_images_at_the_head_of_a_shard_are_rejects_and_no_end(tmp_path, monkeypatch) -> None:
    """The look goes on until an image has a caption, and then it is over."""
    run = make_run(tmp_path)
    with ScriptedServer(refuse_two) as server:
        command(run, server, monkeypatch=monkeypatch)
        probed = [body for body in server.requests if body["max_tokens"] == PROBE_TOKENS and not shows(body, 0, 1)]
    assert [row["reject"] for row in rows(run)] == ["refused_by_server"] * 2 + [None] * 6
    assert read_manifest(run / "captions").rejected == {"refused_by_server": 2}
    assert any(shows(body, 2) for body in probed) and not any(shows(body, 3, 4, 5, 6, 7) for body in probed)


@pytest.mark.parametrize("samples_per_slice", [1, 8])
def test_a_small_shard_whose_every_image_is_refused_is_done(tmp_path, monkeypatch, samples_per_slice: int) -> None:
    """In one piece or in two."""
    run = make_run(tmp_path, num_samples=2, samples_per_slice=samples_per_slice)
    with ScriptedServer(refuse_two) as server:
        command(run, server, monkeypatch=monkeypatch)
    assert [row["reject"] for row in rows(run)] == ["refused_by_server"] * 2


@pytest.mark.parametrize("samples_per_slice", [2, 8])
def test_a_server_that_refuses_everything_stops_the_job_with_its_reason(
    tmp_path, monkeypatch, samples_per_slice: int
) -> None:
    """After three images, even where the first piece has only two."""
    run = make_run(tmp_path, num_samples=4, samples_per_slice=samples_per_slice)
    with ScriptedServer(lambda body, n: fail(400, "Server is pinned to 'other'")) as server:
        with pytest.raises(CanaryError, match=r"first 3 images are refused.*refused_by_server.*pinned to 'other'"):
            command(run, server, monkeypatch=monkeypatch)
        assert not any(shows(body, 3) for body in server.requests)
    assert not list((run / "captions").glob("*.parquet"))


@pytest.mark.parametrize(
    ("second", "reason"),
    [(fail(500, "division by zero"), "server_failed"), (say("", finish_reason="content_filter"), "refused_by_server")],
)
def test_a_second_try_that_fails_is_a_reject_that_retry_mends(tmp_path, monkeypatch, second: Any, reason: str) -> None:
    """A server that fails on one image's second try; put right, RETRY=1 ends with the bytes of an undisturbed run."""

    def answer(body: dict[str, Any], number: int) -> Any:
        loops = body["max_tokens"] == 40 and shows(body, 2, 5) and "repetition_penalty" not in body
        return say(LOOP) if loops else describe(body, number)

    def failing(body: dict[str, Any], number: int) -> Any:
        return second if "repetition_penalty" in body and shows(body, 5) else answer(body, number)

    calm, run = make_run(tmp_path / "calm"), make_run(tmp_path / "run")
    with ScriptedServer(answer) as server:
        command(calm, server, monkeypatch=monkeypatch)
    with ScriptedServer(failing) as server:
        command(run, server, monkeypatch=monkeypatch)
    assert read_manifest(run / "captions").rejected == {reason: 1}
    failed = rows(run)[5]
    assert (failed["reject"], failed["caption"], failed["caption_raw"]) == (reason, None, None)
    assert failed["first_caption"] == LOOP.strip() and failed["flags"] == []
    assert rows(run)[2] == rows(calm)[2] and rows(calm)[5]["reject"] is None
    with ScriptedServer(answer) as server:
        command(run, server, "--set", "captioning.retry_rejects=true", monkeypatch=monkeypatch)
    assert contents(run) == contents(calm)


PAGE = b"<!doctype html><title>Sign in</title>"


@pytest.fixture(params=["text/html; charset=utf-8", "application/json"])
def web_page(request) -> Iterator[str]:
    """The address of a server that answers everything with a page, and a success."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", request.param)
            self.send_header("Content-Length", str(len(PAGE)))
            self.end_headers()
            self.wfile.write(PAGE)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def make_engine(base_url: str) -> OpenAIEngine:
    table = {"engine": "openai", "model": "toy", "server": {"base_url": base_url, "patience_seconds": 5}}
    return OpenAIEngine(CaptioningConfig.model_validate(table), api_key="")


def test_an_address_that_answers_with_a_page_is_named(tmp_path, monkeypatch, web_page: str) -> None:
    """Before any work starts, and where it happens in the middle of the work."""
    message = rf"captioning.server.base_url {web_page} is not the address .* login page .*Sign in"
    run = make_run(tmp_path)
    recipe, option = str(run / "recipe.toml"), f"captioning.server.base_url={web_page}"
    monkeypatch.setattr("sys.argv", ["captioning", "--recipe", recipe, "--run", str(run), "--set", option])
    with pytest.raises(ServerError, match=message):
        main()
    engine = make_engine(web_page)
    with pytest.raises(ServerError, match=message):
        engine.caption(engine.prepare([Request(image=photo(0), prompt="What?", seed=0)]))


def test_half_a_character_of_an_answer_reaches_no_file() -> None:
    """JSON can say a lone surrogate, which Parquet's strings cannot hold; a whole pair is left alone."""
    with ScriptedServer(lambda body, n: say("\ud83d A kite \U0001f600 \ude00")) as server:
        engine = make_engine(server.base_url)
        [caption] = engine.caption(engine.prepare([Request(image=photo(0), prompt="What?", seed=0)]))
    assert isinstance(caption, Caption) and caption.text == "? A kite \U0001f600 ?"
