"""The whole captioning command on shards in object storage and on the web, and on tars that people make by hand."""

import io
import logging
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import pipelines.store.remote
from captioning.__main__ import main
from errors import UserError
from pipelines.store.manifest import read_manifest
from tests.raw_shards import encode, photo, write_laion, write_sa1b, write_tar
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
    from s3fs import S3FileSystem

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
        S3FileSystem.clear_instance_cache()  # of other tests' servers, and of this one's when it is gone
        yield "s3://atelier"
        S3FileSystem.clear_instance_cache()
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
    monkeypatch.setattr(pipelines.store.remote, "FIRST_WAIT_SECONDS", 0.001)
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
        with pytest.raises(UserError, match=rf"{server.url}/.*\.tar: gave up after 5 attempts: .*503"):
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
    with pytest.raises(UserError, match=message):
        caption(recipe, tmp_path, shards)


def test_a_remote_run_folder_is_refused(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"RUN s3://atelier/run is a URL.*local or mounted folder"):
        monkeypatch.setattr(sys, "argv", ["captioning", "--recipe", str(recipe), "--run", "s3://atelier/run"])
        main()
    assert not list(tmp_path.iterdir())


def rows_of(run: Path, shard: str) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(run / "captions" / f"{shard}.parquet").to_pylist()}


def test_faulty_samples_and_tars_are_rows_counts_and_warnings(recipe, tmp_path, caplog, monkeypatch) -> None:
    """A shard with every fault that headers show, one cut in the middle, one with members that are no samples."""
    good = encode(photo(0))
    write_tar(
        tmp_path / "raw" / "faults.tar",
        [
            *((f"good_{number}.jpg", encode(photo(number))) for number in range(8)),
            *(("twice.jpg", good), ("twice.jpg", good), ("alone.json", b"{}"), ("alone.txt", b"text")),
            *(("both.jpg", good), ("both.png", good), ("mask.seg.png", good), ("www.v2.jpg", good)),
            *((f"empty_{number}.jpg", b"") for number in range(3)),
            ("\u5bcc\u58eb/\u5c71.jpg", good),
        ],
    )
    whole = write_tar(tmp_path / "cut.tar", [(f"{number}.png", encode(photo(number), "PNG")) for number in range(9)])
    (tmp_path / "raw" / "cut.tar").write_bytes(whole.read_bytes()[: 8 * whole.stat().st_size // 10])
    with tarfile.open(tmp_path / "raw" / "odd.tar", "w") as archive:
        for number, name in enumerate(("ok.jpg", "../up.jpg", "/etc/abs.jpg", "a/../../b.jpg", "link.jpg")):
            info = tarfile.TarInfo(name)
            info.size = len(good)
            if number == 4:
                info.type, info.size, info.linkname = tarfile.SYMTYPE, 0, "/etc/passwd"
            archive.addfile(info, io.BytesIO(good))
    monkeypatch.setattr(logging.getLogger("atelier"), "propagate", True)
    run, shards = tmp_path / "run", f"{tmp_path}/raw"
    with pytest.raises(UserError, match=r"9 of 27 samples rejected \(33.3%\).*: empty_image 3, dotted_name 2, \w+ 1$"):
        caption(recipe, run, shards)
    assert "cut.tar: cut off" in caplog.text
    assert "sparse files or paths that leave the tar: ../up.jpg, /etc/abs.jpg, a/../../b.jpg, ..." in caplog.text
    # All that was done is valid: with a higher ceiling nothing is captioned again.
    done = {path: path.read_bytes() for path in (run / "captions" / ".done").iterdir()}
    monkeypatch.setattr("captioning.worker.CaptionWorker", None)
    caption(recipe, run, shards, "--set", "captioning.max_reject_fraction=0.5")
    assert {path: path.read_bytes() for path in done} == done and len(done) == 3
    rejects = {key: row["reject"] for shard in ("faults", "cut", "odd") for key, row in rows_of(run, shard).items()}
    expected = {"twice": "duplicate_member", "alone": "no_image", "both": "several_images"}
    expected |= {"mask": "dotted_name", "www": "dotted_name"}
    expected |= {f"empty_{number}": "empty_image" for number in range(3)}
    cut = [key for key, reject in rejects.items() if reject == "cut_off"]
    assert {key: reject for key, reject in rejects.items() if reject and key not in cut} == expected and len(cut) == 1
    assert all(row["caption"] for row in rows_of(run, "faults").values() if row["reject"] is None)
    assert rows_of(run, "odd").keys() == {"ok"} and "\u5bcc\u58eb/\u5c71" in rejects
    shards_done = read_manifest(run / "captions").shards
    assert shards_done["odd"].details["unusable_members"] == 4 and shards_done["cut"].details["damaged_tars"] == 1


def test_dialects_are_detected_and_the_recipe_can_say_otherwise(recipe, tmp_path) -> None:
    """The prompt holds the alt text of an img2dataset tar; a recipe that calls it generic has another prompt."""
    good = encode(photo(0))
    write_tar(tmp_path / "raw" / "pairs.tar", [("a.png", good), ("a.txt", b"a red kite"), ("a.json", b"{}")])
    write_tar(tmp_path / "raw" / "classes.tar", [("n01440764_18.JPEG", good), ("n01440764_18.cls", b"0")])
    write_tar(tmp_path / "raw" / "pictures.tar", [("in/some folder/one.WEBP", encode(photo(1), "WEBP"))])
    caption(recipe, tmp_path / "auto", f"{tmp_path}/raw")
    prompts = {name: list(rows_of(tmp_path / "auto", name).values()) for name in ("pairs", "classes", "pictures")}
    assert prompts["pairs"][0]["prompt"].endswith('"a red kite"') and prompts["pairs"][0]["alt_text"] == "a red kite"
    assert [row["reject"] for rows in prompts.values() for row in rows] == [None] * 3
    assert prompts["classes"][0]["alt_text"] is None is prompts["pictures"][0]["alt_text"]
    caption(recipe, tmp_path / "said", f"{tmp_path}/raw", "--set", "data.dialect=sa1b")
    row = rows_of(tmp_path / "said", "pairs")["a"]
    assert row["alt_text"] is None and row["prompt"] == prompts["pictures"][0]["prompt"]


def test_make_caption_as_in_the_readme(recipe, tmp_path) -> None:
    """The target itself, with braces in SHARDS, on tars in SA-1B's layout and in img2dataset's."""
    for number in range(2):
        write_sa1b(tmp_path / "data" / f"sa_{number:06d}.tar", 4, first=10 * number)
    write_laion(tmp_path / "laion" / "00000.tar", 4)
    shards = f"SHARDS={tmp_path}/data/sa_{{000000..000001}}.tar,{tmp_path}/laion"
    # -o: the environment is there; bringing it up is not what this is about.
    line = ["make", "--no-print-directory", "-o", ".venv/.ready", "caption", shards, f"RUN={tmp_path}/run"]
    done = subprocess.run([*line, f"RECIPE={recipe}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ["00000", "sa_000000", "sa_000001"]
    assert sorted(path.stem for path in (tmp_path / "run" / "captions").glob("*.parquet")) == names
    for name in names:
        rows = rows_of(tmp_path / "run", name).values()
        assert [row["reject"] for row in rows] == [None] * 4 and all(row["caption"] is not None for row in rows)
        assert all((row["alt_text"] is None) == name.startswith("sa_") for row in rows)
