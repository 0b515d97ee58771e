"""The whole captioning command on shards in object storage and on the web, and on tars that people make by hand."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import pipelines.remote
from captioning.__main__ import main
from tests.raw_shards import write_laion, write_sa1b
from tests.storage_servers import serve_folder
from tests.tiny_models import save_llava

RECIPE = """
[data]
shards = "{{run}}/raw/*.tar"

[engine]
samples_per_slice = 8
in_process = true

[captioning]
model = "{model}"
max_new_tokens = 12
batch_size = 4
max_reject_fraction = 0.2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(model=save_llava(folder / "llava")))
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for number in range(3):
        write_laion(folder / "laion" / f"{number:05d}.tar", 9, first=100 * number)
    write_sa1b(folder / "sa" / "sa_000000.tar", 9)
    return folder


@pytest.fixture(scope="module")
def bucket(raw):
    """`s3://atelier` on a server that speaks S3's protocol, holding the folder `raw`."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "k"}
        settings |= {"AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in settings.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="atelier")
        for path in raw.rglob("*.tar"):
            client.upload_file(str(path), "atelier", str(path.relative_to(raw)))
        client.close()
        yield "s3://atelier"
        server.stop()


def caption(recipe: Path, run: Path, shards: str, *options: str) -> None:
    """Run the command as typed: `make caption RECIPE= RUN= SHARDS=`."""
    arguments = ["captioning", "--recipe", str(recipe), "--run", str(run), "--set", f"data.shards={shards}", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        main()


def contents(run: Path) -> dict[str, bytes]:
    """The bytes of captions, manifest and markers."""
    return {str(path.relative_to(run)): path.read_bytes() for path in (run / "captions").rglob("*.*") if path.is_file()}


@pytest.fixture(scope="module")
def local(recipe, raw, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("local")
    caption(recipe, run, f"{raw}/laion/*.tar,{raw}/sa")
    return run


def test_the_same_bytes_from_object_storage(recipe, raw, local, bucket, tmp_path) -> None:
    """Braces, a glob and a folder of S3; captions, markers and manifest are those made from local disk."""
    shards = f"{bucket}/laion/{{00000..00001}}.tar,{bucket}/laion/*2.tar,{bucket}/sa/"
    caption(recipe, tmp_path / "s3", shards)
    assert contents(tmp_path / "s3") == contents(local)
    # A copy of the shards elsewhere is the same input: nothing is captioned again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s3" / "captions").rglob("*") if path.is_file()}
    caption(recipe, tmp_path / "s3", f"{raw}/laion,{raw}/sa")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_same_bytes_from_the_web_and_headers_are_read_once(recipe, raw, local, tmp_path) -> None:
    with serve_folder(raw) as server:
        shards = f"{server.url}/laion/{{00000..00002}}.tar,{server.url}/sa/sa_*.tar"
        caption(recipe, tmp_path, shards, "--plan")
        assert server.ranges
        caption(recipe, tmp_path, shards)
        assert contents(tmp_path) == contents(local)
        server.ranges.clear()
        caption(recipe, tmp_path, shards)
        assert not server.ranges
        # Another file at the same address is seen, by its version.
        replaced = (raw / "laion" / "00000.tar").read_bytes()
        try:
            write_laion(raw / "laion" / "00000.tar", 5, first=900)
            caption(recipe, tmp_path, shards)
        finally:
            (raw / "laion" / "00000.tar").write_bytes(replaced)
    assert pq.read_table(tmp_path / "captions" / "00000.parquet")["key"].to_pylist()[0] == "000000900"


def test_a_lost_connection_fails_by_name_and_the_next_run_goes_on(recipe, raw, local, tmp_path, monkeypatch) -> None:
    """The server answers nothing but 503 after the first shard: what is done stays, and nothing is done twice."""
    monkeypatch.setattr(pipelines.remote, "FIRST_WAIT_SECONDS", 0.001)
    with serve_folder(raw) as server:
        shards = f"{server.url}/laion/{{00000..00002}}.tar,{server.url}/sa/sa_000000.tar"
        caption(recipe, tmp_path, shards, "--plan")
        from captioning.worker import CaptionWorker

        call, calls = CaptionWorker.__call__, []

        def call_then_break(self, piece):
            calls.append(piece.source.name)
            server.num_busy = 0 if len(calls) == 1 else 10_000
            return call(self, piece)

        monkeypatch.setattr(CaptionWorker, "__call__", call_then_break)
        with pytest.raises((ValueError, OSError), match=rf"{server.url}/.*\.tar: gave up after 5 attempts: .*503"):
            caption(recipe, tmp_path, shards)
        server.num_busy = 0
        monkeypatch.setattr(CaptionWorker, "__call__", call)
        assert len(list((tmp_path / "captions" / ".done").iterdir())) == 1
        caption(recipe, tmp_path, shards)
    assert contents(tmp_path) == contents(local)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("s3://atelier/laion/9*.tar", r"data.shards: no shard matches s3://atelier/laion/9\*.tar"),
        ("s3://atelier/laion/{00000..00009}.tar", r"s3://atelier/laion/0000[3-9].tar: does not exist"),
        ("s3://no-such-bucket/a.tar", r"s3://no-such-bucket/a.tar: does not exist"),
    ],
)
def test_what_is_not_in_the_bucket_is_said(recipe, bucket, tmp_path, shards: str, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        caption(recipe, tmp_path, shards)


def test_a_remote_run_folder_is_refused(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"RUN s3://atelier/run is a URL.*local or mounted folder"):
        monkeypatch.setattr(sys, "argv", ["captioning", "--recipe", str(recipe), "--run", "s3://atelier/run"])
        main()
    assert not list(tmp_path.iterdir())
