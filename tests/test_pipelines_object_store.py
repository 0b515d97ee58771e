"""Objects of S3 read by obstore are what s3fs reads: the same bytes and versions, faults told in the same words."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import config

from errors import StorageError, UserError
from pipelines.raw import summaries
from pipelines.raw.patterns import expand_shards
from pipelines.raw.shards import describe_shards, open_shard
from pipelines.store import object_store, remote
from pipelines.store.object_store import open_object
from pipelines.store.remote import READ_ATTEMPTS, VERSION_FIELDS, RemoteFile, open_file_system
from tests.raw_shards import write_laion
from tests.storage_servers import WebServer, serve_folder

KEYS = {"key": "key", "secret": "secret"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)


def options(monkeypatch, url: str, **others: Any) -> None:
    monkeypatch.setattr(config, "conf", {"s3": {"endpoint_url": url, **KEYS, **others}})


@pytest.fixture
def moto(monkeypatch) -> Iterator[Any]:
    """A client of a server that speaks S3's protocol, with a bucket `raw`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options(monkeypatch, f"http://{host}:{port}")
    secrets = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **secrets)
    client.create_bucket(Bucket="raw")
    try:
        yield client
    finally:
        client.close()
        server.stop()


@pytest.fixture
def plain(tmp_path, monkeypatch) -> Iterator[WebServer]:
    """A server whose folder `raw` is a bucket: requests can be counted, and refused."""
    (tmp_path / "raw").mkdir()
    with serve_folder(tmp_path) as server:
        options(monkeypatch, server.url)
        yield server


def is_by_obstore(url: str) -> bool:
    return open_object(*open_file_system(url)) is not None


def test_an_object_is_what_s3fs_says_it_is(moto) -> None:
    data = os.urandom(400_000)
    odd = ["a b.tar", "ä.tar", "50%25.tar", "a//b.tar", "a/../b.tar", "q?x=1.tar"]
    for key in ("folder/laion_00000.tar", *odd):
        moto.put_object(Bucket="raw", Key=key, Body=data)
        url = f"s3://raw/{key}"
        if key == "q?x=1.tar":  # a version, to s3fs
            continue
        file = RemoteFile(url)
        assert (file.size, file.read(100, 300_000), file.read(5, 7)) == (len(data), data[100:300_100], data[5:12])
        assert is_by_obstore(url) == (key not in odd), key
        info = fsspec.filesystem("s3").info(f"raw/{key}")
        assert file.stamp == f"{len(data)}:{next(info[field] for field in VERSION_FIELDS if info.get(field))}"
    assert file.read(len(data) - 3, 10) == data[-3:] and file.read(len(data), 1) == b""


def test_a_missing_object_and_a_missing_bucket_are_not_there(moto) -> None:
    moto.put_object(Bucket="raw", Key="a.tar", Body=b"a")
    for _ in range(2):  # before and after something has been read of the bucket
        for url in ("s3://raw/gone.tar", "s3://nowhere/a.tar"):
            with pytest.raises(FileNotFoundError, match=rf"{url}: does not exist"):
                RemoteFile(url)
        assert RemoteFile("s3://raw/a.tar").read(0, 1) == b"a"


@pytest.mark.parametrize("is_by_s3fs", [False, True])
def test_an_object_that_is_replaced_is_noticed_behind_a_listing(moto, tmp_path, monkeypatch, is_by_s3fs: bool) -> None:
    """A glob lists objects with their versions, and s3fs would go on believing that list."""
    if is_by_s3fs:
        monkeypatch.setattr(remote, "open_object", lambda *_: None)
    path = write_laion(tmp_path / "laion_00000.tar", 3)
    moto.upload_file(str(path), "raw", "laion_00000.tar")
    (url,) = expand_shards("s3://raw/laion_*.tar")
    with pytest.raises(UserError, match=rf"{url} has changed while it was read"), open_shard(url) as raw:
        assert raw.image_bytes(raw.samples[0])
        moto.upload_file(str(write_laion(path, 3, first=50)), "raw", "laion_00000.tar")


def test_credentials_come_from_where_s3fs_takes_them(moto, monkeypatch, tmp_path) -> None:
    """A profile of the files of `~/.aws`; the server sees by whose key a request is signed."""
    moto.put_object(Bucket="raw", Key="a.tar", Body=b"a")
    (tmp_path / "credentials").write_text(
        "[lab]\naws_access_key_id = of_the_lab\naws_secret_access_key = s\naws_session_token = t\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    endpoint = config.conf["s3"]["endpoint_url"]
    monkeypatch.setattr(config, "conf", {"s3": {"endpoint_url": endpoint, "profile": "lab"}})
    seen: list[dict[str, Any]] = []
    true_store = object_store._open_store

    def watched(settings: dict[str, Any]) -> Any:
        seen.append(settings["credential_provider"]())
        return true_store(settings)

    monkeypatch.setattr(object_store, "_open_store", watched)
    assert is_by_obstore("s3://raw/a.tar")
    assert [(found["access_key_id"], found["secret_access_key"], found["token"]) for found in seen] == [
        ("of_the_lab", "s", "t")
    ]


@pytest.mark.parametrize(
    "others",
    [
        {"requester_pays": True},
        {"client_kwargs": {"verify": False}},
        {"config_kwargs": {"s3": {"use_accelerate_endpoint": False}}},
    ],
)
def test_settings_that_obstore_lacks_are_left_to_s3fs(plain, monkeypatch, others: dict[str, Any]) -> None:
    (plain.folder / "raw" / "a.tar").write_bytes(b"abc")
    assert is_by_obstore("s3://raw/a.tar")
    options(monkeypatch, plain.url, **others)
    assert not is_by_obstore("s3://raw/a.tar")
    assert RemoteFile("s3://raw/a.tar").read(1, 2) == b"bc"


@pytest.mark.parametrize("fault", ["num_drops", "num_busy"])
def test_faults_of_the_network_are_retried_a_bounded_number_of_times(plain, fault: str) -> None:
    data = os.urandom(3_000)
    (plain.folder / "raw" / "a.tar").write_bytes(data)
    file = RemoteFile("s3://raw/a.tar")
    setattr(plain, fault, READ_ATTEMPTS - 1)
    assert file.read(0, 3_000) == data and getattr(plain, fault) == 0
    file.close()
    setattr(plain, fault, 1000)
    with pytest.raises(StorageError, match=rf"^s3://raw/a.tar: gave up after {READ_ATTEMPTS} attempts: [^\n]*$"):
        file.read(0, 3_000)
    assert getattr(plain, fault) == 1000 - READ_ATTEMPTS


def test_a_refusal_is_said_at_once(plain) -> None:
    (plain.folder / "raw" / "a.tar").write_bytes(b"abc")
    file = RemoteFile("s3://raw/a.tar")
    plain.is_closed = True
    with pytest.raises(StorageError, match=r"^s3://raw/a.tar: PermissionDenied[^\n]*403[^\n]*$"):
        file.read(0, 3)
    with pytest.raises(StorageError, match=r"^s3://raw/a.tar: .*"):
        RemoteFile("s3://raw/a.tar")


def test_a_fork_of_a_process_that_has_read_reads_too(plain) -> None:
    """obstore's threads are missing there."""
    (plain.folder / "raw" / "a.tar").write_bytes(b"abc")
    assert RemoteFile("s3://raw/a.tar").read(0, 3) == b"abc"
    child = os.fork()
    if child == 0:
        os._exit(0 if RemoteFile("s3://raw/a.tar").read(0, 3) == b"abc" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_headers_read_by_either_are_the_same(moto, tmp_path, monkeypatch) -> None:
    """What a run remembers of shards stays valid, whoever has read them."""
    path: Path = write_laion(tmp_path / "laion_00000.tar", 3)
    moto.upload_file(str(path), "raw", "laion_00000.tar")
    url, run = "s3://raw/laion_00000.tar", tmp_path / "run"
    by_obstore = describe_shards([url], run=run)
    monkeypatch.setattr(remote, "open_object", lambda *_: None)
    monkeypatch.setattr(summaries, "read_headers", None)
    assert describe_shards([url], run=run) == by_obstore
