"""Remote storage against real servers on loopback: few requests, nothing unneeded, and errors that name the URL."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

import pipelines.store.remote
from errors import StorageError, UserError
from pipelines.engine.pieces import Piece, PieceReport, Source
from pipelines.engine.run import EngineConfig, run_over_shards
from pipelines.raw.patterns import expand_shards
from pipelines.raw.shards import describe_shards, open_shard, shard_source
from pipelines.store.files import atomic_file, open_binary, open_ranges
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from pipelines.store.remote import MAX_WINDOW_BYTES, READ_ATTEMPTS, RemoteFile, storage_environment
from tests.raw_shards import encode, laion_members, photo, sa1b_members, write_laion, write_tar
from tests.storage_servers import serve_folder


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr(pipelines.store.remote, "FIRST_WAIT_SECONDS", 0.001)


def test_ranges_of_local_and_remote_files_are_the_same(tmp_path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "data.bin").write_bytes(data)
    with serve_folder(tmp_path) as server:
        for url in (str(tmp_path / "data.bin"), f"file://{tmp_path}/data.bin", f"{server.url}/data.bin"):
            with open_ranges(url) as file:
                assert file.size == len(data) and file.stamp
                for offset, size in ((0, 10), (5, 40_000), (1_000_000, 1_500_000), (2_999_990, 100), (3_000_000, 5)):
                    assert file.read(offset, size) == data[offset : offset + size]
            with open_binary(url) as stream:
                stream.seek(-500, os.SEEK_END)
                assert stream.read() == data[-500:]
                assert stream.seek(7) == 7 and stream.read(3) == data[7:10]


def test_threads_share_an_open_file(tmp_path) -> None:
    """Decoding threads ask for small and large members of one shard at once."""
    data = os.urandom(4_000_000)
    (tmp_path / "data.bin").write_bytes(data)
    with serve_folder(tmp_path) as server, open_ranges(f"{server.url}/data.bin") as file:

        def read_at_random(seed: int) -> bool:
            rng = random.Random(seed)
            places = [(rng.randrange(len(data)), rng.choice((10, 3_000, 100_000, 600_000))) for _ in range(40)]
            return all(file.read(offset, size) == data[offset : offset + size] for offset, size in places)

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(read_at_random, range(6)))


def test_short_reads_far_from_each_other_are_under_way_together(tmp_path, monkeypatch) -> None:
    """Each waits for the other to have begun; neighbours share one request."""
    data = os.urandom(3_000_000)
    (tmp_path / "data.bin").write_bytes(data)
    with serve_folder(tmp_path) as server, open_ranges(f"{server.url}/data.bin") as file:
        assert isinstance(file, RemoteFile)
        assert file.read(0, 1) == data[:1]  # the server has been asked for ranges
        server.ranges.clear()
        together, true_fetch = threading.Barrier(2, timeout=10), file._fetch

        def fetch(offset: int, size: int) -> bytes:
            together.wait()
            return true_fetch(offset, size)

        monkeypatch.setattr(file, "_fetch", fetch)
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda place: file.read(place, 10), (1_000_000, 2_000_000, 1_000_010, 2_000_010))
            assert list(found) == [data[place : place + 10] for place in (1_000_000, 2_000_000, 1_000_010, 2_000_010)]
        assert len(server.ranges) == 2


def test_a_tar_of_small_members_takes_few_requests(tmp_path) -> None:
    """A shard as img2dataset writes it: headers, then every image and text, each in about one pass over the bytes."""
    members = []
    for number in range(300):
        members += laion_members(f"{number:09d}", os.urandom(20_000), "alt")
    path = write_tar(tmp_path / "laion_00000.tar", members)
    size = path.stat().st_size
    with serve_folder(tmp_path) as server:
        url = f"{server.url}/laion_00000.tar"
        assert shard_source(url).identity == shard_source(str(path)).identity
        # Windows double up to their largest size.
        most = 12 + size // MAX_WINDOW_BYTES
        assert len(server.ranges) <= most and server.bytes_sent < 1.2 * size
        with open_shard(url) as raw:
            server.ranges.clear()
            server.bytes_sent = 0
            for sample in raw.samples:
                assert raw.image_bytes(sample) and raw.alt_text(sample) == "alt"
        assert len(server.ranges) <= most and server.bytes_sent < 1.2 * size


def test_the_masks_of_sa1b_are_not_read(tmp_path, monkeypatch) -> None:
    """Of a JSON of masks, its last block is read for the shard's identity; over the web, what a short window has."""
    masks = [("./sa_1.json", b'{"annotations": [' + b" " * 3_000_000 + b"]}"), ("./sa_1.jpg", os.urandom(400_000))]
    masks += [("./sa_2.jpg", os.urandom(400_000)), ("./sa_2.json", b"{" + b" " * 2_000_000 + b"}")]
    path = write_tar(tmp_path / "sa_000000.tar", masks)
    read: list[tuple[int, int]] = []
    true_pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        read.append((offset, offset + size))
        return true_pread(descriptor, size, offset)

    def read_all(url: str) -> dict[str, tuple[int, int]]:
        with open_shard(url) as raw:
            assert [sample.reject for sample in raw.samples] == [None, None]
            for sample in raw.samples:
                assert len(raw.image_bytes(sample)) == 400_000 and raw.alt_text(sample) is None
            json_members = {sample.key: sample.members["json"] for sample in raw.samples}
        return {key: (member.offset, member.offset + member.size) for key, member in json_members.items()}

    def bytes_in(span: tuple[int, int]) -> int:
        return sum(max(0, min(stop, span[1]) - max(start, span[0])) for start, stop in read)

    monkeypatch.setattr(os, "pread", counted)
    spans = read_all(str(path))
    assert {key: bytes_in(span) for key, span in spans.items()} == {"sa_1": 512, "sa_2": 512}
    with serve_folder(tmp_path) as server:
        read_all(f"{server.url}/sa_000000.tar")
        read[:] = [(first, stop) for _, first, stop in server.ranges]
        assert all(bytes_in(span) <= 2 * pipelines.store.remote.MIN_WINDOW_BYTES for span in spans.values())
        assert len(server.ranges) <= 9  # one per member, one per image, the first header, a probe for ranges


def test_a_server_without_ranges_is_refused_before_anything_is_downloaded(tmp_path) -> None:
    write_laion(tmp_path / "laion_00000.tar", 2)
    with (tmp_path / "laion_00000.tar").open("ab") as file:
        file.write(bytes(30_000_000))
    with serve_folder(tmp_path, has_ranges=False) as server:
        with pytest.raises(UserError, match=r"http://.*laion_00000.tar: .*does not answer range requests.*download"):
            describe_shards([f"{server.url}/laion_00000.tar"])
        time.sleep(0.2)
        assert server.bytes_sent < 20_000_000  # what was under way when the connection was closed


@pytest.mark.parametrize("fault", ["num_drops", "num_busy"])
def test_dropped_connections_are_retried_a_bounded_number_of_times(tmp_path, fault: str) -> None:
    path = write_laion(tmp_path / "laion_00000.tar", 4)
    with serve_folder(tmp_path) as server:
        url = f"{server.url}/laion_00000.tar"
        setattr(server, fault, READ_ATTEMPTS - 1)
        assert shard_source(url).identity == shard_source(str(path)).identity
        assert getattr(server, fault) == 0
        setattr(server, fault, 1000)
        with pytest.raises(StorageError, match=rf"{url}: gave up after {READ_ATTEMPTS} attempts"):
            describe_shards([url])
        assert getattr(server, fault) == 1000 - READ_ATTEMPTS


def test_a_server_that_is_gone_and_a_file_that_is_not_there_are_told_apart(tmp_path) -> None:
    with serve_folder(tmp_path) as server:
        url = f"{server.url}/gone.tar"
        with pytest.raises(FileNotFoundError, match=rf"{url}: does not exist"):
            RemoteFile(url)
    with socket.socket() as unserved:
        unserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unserved.getsockname()[1]}/gone.tar"
    with pytest.raises(StorageError, match=rf"{url}: gave up after {READ_ATTEMPTS} attempts: .*[Cc]onnect"):
        RemoteFile(url)


def test_a_protocol_without_its_package_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"gs://bucket/a.tar: gs:// needs a package.*gcsfs"):
        describe_shards(["gs://bucket/a.tar"])
    with pytest.raises(UserError, match=r"gs://bucket/\*.tar: gs:// needs a package.*gcsfs"):
        expand_shards("gs://bucket/*.tar")
    with pytest.raises(UserError, match=r"s4://bucket/a.tar: Protocol not known: s4"):
        describe_shards(["s4://bucket/a.tar"])


def test_an_object_replaced_while_it_is_read_stops_the_work(tmp_path) -> None:
    """Its later ranges belong to another tar: what was read of both is not kept."""
    path = write_laion(tmp_path / "laion_00000.tar", 3)
    with serve_folder(tmp_path) as server:
        url = f"{server.url}/laion_00000.tar"
        with pytest.raises(UserError, match=rf"{url} has changed while it was read"), open_shard(url) as raw:
            assert raw.image_bytes(raw.samples[0])
            write_laion(path, 3, first=50)


def test_web_addresses_globs_and_queries(tmp_path) -> None:
    for number in range(3):
        write_tar(tmp_path / "data" / f"sa_00000{number}.tar", sa1b_members(number, encode(photo(number))))
    with serve_folder(tmp_path) as server:
        names = [f"{server.url}/data/sa_00000{number}.tar" for number in range(3)]
        assert expand_shards(f"{server.url}/data/sa_*.tar") == expand_shards(f"{server.url}/data/") == names
        braces = f"{server.url}/data/sa_{{000000..000001}}.tar"
        assert expand_shards(braces) == names[:2]
        (signed,) = expand_shards(names[0] + "?X-Signature=abc&X-Expires=60")
        source = shard_source(signed)
        assert isinstance(source, Source) and (source.name, source.num_samples) == ("sa_000000", 1)


def test_data_sets_of_a_hub(tmp_path) -> None:
    """huggingface_hub's own client against a server that answers as a hub does; this process is told to be offline."""
    path = write_laion(tmp_path / "data" / "00000.tar", 3)
    script = (
        "from pipelines.raw.patterns import expand_shards\n"
        "from pipelines.raw.shards import open_shard\n"
        "(path,) = expand_shards('hf://datasets/user/name/data/*.tar')\n"
        "assert expand_shards('hf://datasets/user/name/data/') == [path]\n"
        "with open_shard(path) as raw:\n"
        "    print(raw.identity, [len(raw.image_bytes(sample)) for sample in raw.samples])"
    )
    with serve_folder(tmp_path, is_hub=True) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        line = [sys.executable, "-c", script]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    with open_shard(str(path)) as raw:
        expected = f"{raw.identity} {[len(raw.image_bytes(sample)) for sample in raw.samples]}"
    assert done.stdout.strip() == expected, done.stderr


class MemberWorker:
    """Counts the bytes of a shard's images."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    def __init__(self, config: None) -> None:
        pass

    def __call__(self, piece: Piece) -> PieceReport:
        with open_shard(piece.source.path) as raw, atomic_file(piece.output(".txt")) as path:
            path.write_text(str(sum(len(raw.image_bytes(sample)) for sample in raw.samples)))
        return PieceReport(num_read=piece.stop, num_kept=piece.stop)


def test_ray_workers_read_with_the_credentials_of_the_command(tmp_path, monkeypatch) -> None:
    """Ray was started before they were set, as on a cluster: its processes know of no endpoint and no key."""
    import boto3
    import ray
    from moto.server import ThreadedMotoServer

    path = write_laion(tmp_path / "laion_00000.tar", 3)
    ray.shutdown()  # that of the tests before this one
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setattr(fsspec.config, "conf", {"s3": {"endpoint_url": f"http://{host}:{port}"}})
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="raw")
        client.upload_file(str(path), "raw", "laion_00000.tar")
        client.close()
        run_over_shards(
            MemberWorker,
            None,
            sources=[shard_source("s3://raw/laion_00000.tar")],
            output=ShardDirectory(tmp_path / "out"),
            fingerprint=Fingerprint.of({}),
            engine=EngineConfig(num_workers=1),
            max_reject_fraction=0.0,
            room="test",
        )
    finally:
        server.stop()
        ray.shutdown()
    assert int((tmp_path / "out" / "laion_00000.txt").read_text()) > 100


def test_workers_elsewhere_get_what_storage_needs_and_nothing_else() -> None:
    environment = {"AWS_ENDPOINT_URL": "http://minio:9000", "AWS_SECRET_ACCESS_KEY": "s", "FSSPEC_S3_KEY": "k"}
    environment |= {"HF_TOKEN": "t", "GOOGLE_APPLICATION_CREDENTIALS": "/key.json", "https_proxy": "http://proxy"}
    assert storage_environment({**environment, "HOME": "/root", "PATH": "/bin", "HF_HOME": "/cache"}) == environment


def test_a_directory_of_before_fingerprints_left_out_defaults_goes_on_under_its_digest(tmp_path: Path) -> None:
    defaults = {"seed": 0, "max_tokens": 120, "retry.words": 4, "retry.penalty": 1.1}
    former = Fingerprint.of({"model": "m", "seed": 0, "max_tokens": 300, "retry": {"words": 4, "penalty": 1.5}})
    today = Fingerprint.of({"model": "m", "max_tokens": 300, "retry": {"penalty": 1.5}})
    later = {**defaults, "added": "x", "retry.added": "y"}
    directory = ShardDirectory(tmp_path)
    assert directory.known_as(today, defaults=defaults) == today, "nothing is there yet"
    directory.write_marker(ShardReport(name="a", source="s", num_read=1, num_kept=1), former)
    assert directory.known_as(today, defaults=defaults) == former, "interrupted: there is no manifest yet"
    other = Fingerprint.of({**today.fields, "model": "n"})
    assert directory.known_as(other, defaults=defaults) == other, "nothing in here was made by that model"
    here = directory.known_as(other, defaults=defaults, made_under=[{"model": "x"}, {"model": "m"}])
    assert here == Fingerprint.of({**former.fields, "model": "n"}), "but something may be completed for it"
    directory.write_manifest(former, ["a"], upstream={}, extra={})
    assert directory.known_as(today, defaults=later) == former, "a key that came later, at its default"
    other = Fingerprint.of({"model": "m", "max_tokens": 300, "seed": 1, "retry": {"words": 5, "penalty": 1.5}})
    assert directory.known_as(other, defaults=defaults).fields == other.fields
    assert directory.known_as(other, defaults=defaults).digest not in (former.digest, today.digest)


def test_a_directory_of_today_stays_as_it_is(tmp_path: Path) -> None:
    defaults = {"seed": 0, "max_tokens": 120}
    today = Fingerprint.of({"model": "m", "max_tokens": 300})
    directory = ShardDirectory(tmp_path)
    directory.write_marker(ShardReport(name="a", source="s", num_read=1, num_kept=1), today)
    for _ in range(2):
        assert directory.known_as(today, defaults=defaults) == today
        directory.write_manifest(today, ["a"], upstream={}, extra={})
