"""Remote features through a real S3 server: one download for all, checked, bounded, and nothing half after a kill."""

import fcntl
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
import torch
from cache_process import open_once
from choice_run import write_choice
from moto.server import ThreadedMotoServer
from training_run import arguments, make_run, metrics, validations, write_latents, write_text
from warm_python import run_module

from errors import UserError
from pipelines.command import parse_command
from training.data.assembly import BatchAssembler
from training.data.cache import CacheFullError, ShardCache
from training.data.index import FeatureIndex
from training.data.reader import BatchReader
from training.data.stage_data import stage_plan, survey_stage
from training.launch.preflight import inspect_stage, print_plan
from training.stages.stage import TrainingJob, open_stage

BUCKET = "features"
SHARDS = {f"laion_{i}": 20 + i for i in range(6)}
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def source(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on disk, of which the bucket holds a copy."""
    run = make_run(tmp_path_factory.mktemp("source"))
    write_latents(run, 32, SHARDS, buckets=["32x32"], is_bucketed=False)
    write_text(run, SHARDS)
    client = boto3.client("s3")
    for path in (run / "features").rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"run/{path.relative_to(run)}")
    return run


@pytest.fixture(autouse=True)
def fresh_listings() -> None:
    fsspec.config.conf.clear()
    for filesystem in fsspec.get_filesystem_class("s3")._cache.values():
        filesystem.invalidate_cache()


def put(name: str, content: bytes) -> tuple[str, str]:
    """Upload an object; returns its URL and hash."""
    boto3.client("s3").put_object(Bucket=BUCKET, Key=name, Body=content)
    return f"s3://{BUCKET}/{name}", hashlib.sha256(content).hexdigest()


def files_of(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.glob("*/*")}


def test_the_least_recently_used_file_makes_room(endpoint: str, tmp_path: Path) -> None:
    objects = [put(f"lru/{name}.tar", name.encode() * 1000) for name in "abcd"]
    cache = ShardCache(tmp_path, 3500)
    for url, sha256 in objects[:3]:
        cache.open(url, sha256).close()
    cache.open(*objects[0]).close()
    cache.open(*objects[3]).close()
    assert files_of(tmp_path) == {"a.tar": 1000, "c.tar": 1000, "d.tar": 1000}, "b had not been used for longest"
    with cache.open(*objects[3]) as file:
        assert file.path.read_bytes() == b"d" * 1000


def test_open_files_are_kept_and_a_full_cache_is_a_clear_error(endpoint: str, tmp_path: Path) -> None:
    objects = [put(f"full/{name}.tar", name.encode() * 1000) for name in "abc"]
    cache = ShardCache(tmp_path, 2500)
    first, second = (cache.open(*pair) for pair in objects[:2])
    with pytest.raises(CacheFullError, match=r"cache_gigabytes = 2\.5e-06 has no room .*c\.tar.* 2e-06 GB are in use"):
        cache.open(*objects[2])
    assert files_of(tmp_path) == {"a.tar": 1000, "b.tar": 1000}
    first.close()
    with cache.open(*objects[2]) as third:
        assert third.path.is_file()
    assert second.path.read_bytes() == b"b" * 1000
    second.close()
    with pytest.raises(CacheFullError, match=r"0 GB are in use; raise it"):
        cache.open(*put("full/huge.tar", bytes(3000)))


def test_a_file_that_is_not_the_manifests_is_refused(endpoint: str, tmp_path: Path) -> None:
    url, _ = put("changed.tar", b"other bytes")
    with pytest.raises(OSError, match=r"changed\.tar has SHA-256 .*, but the manifest beside it says 000"):
        ShardCache(tmp_path, 10**6).open(url, "0" * 64)
    with pytest.raises(FileNotFoundError, match=r"s3://features/none\.tar: does not exist"):
        ShardCache(tmp_path, 10**6).open(f"s3://{BUCKET}/none.tar", "0" * 64)
    assert files_of(tmp_path) == {}


def test_a_download_ends_when_nobody_wants_it_any_more(endpoint: str, tmp_path: Path) -> None:
    is_stopping = threading.Event()
    is_stopping.set()
    url, sha256 = put("stopped.tar", bytes(500))
    cache = ShardCache(tmp_path, 10**6)
    with pytest.raises(OSError, match="the reader was left"):
        cache.open(url, sha256, is_stopping=is_stopping)
    assert files_of(tmp_path) == {}
    cache.open(url, sha256).close()


class SlowServer:
    """Serves one object over http in small pieces, and notes which of its bytes are asked for."""

    def __init__(self, content: bytes, *, seconds: float) -> None:
        self.requests: list[str] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                requests.append(self.headers.get("Range", "all"))
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                wanted = self.headers.get("Range", "")
                first, last = wanted.removeprefix("bytes=").split("-") if wanted else ("0", "")
                part = content[int(first) : int(last or len(content)) + 1]
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Accept-Ranges", "bytes")
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
                self.end_headers()
                pieces = [part[i : i + 1000] for i in range(0, len(part), 1000)]
                for piece in pieces if body else []:
                    self.wfile.write(piece)
                    time.sleep(seconds / len(pieces))

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/shard.tar"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "SlowServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_processes_that_want_one_file_download_it_once(tmp_path: Path) -> None:
    content = os.urandom(20_000)
    sha256 = hashlib.sha256(content).hexdigest()
    with SlowServer(content, seconds=1.0) as server, SPAWN.Pool(3) as pool:
        found = pool.starmap(open_once, [(str(tmp_path), server.url, sha256)] * 3)
        assert found == [content] * 3
        assert len([wanted for wanted in server.requests if wanted.startswith("bytes=0-")]) == 1, server.requests
    assert files_of(tmp_path) == {"shard.tar": 20_000}


def test_a_killed_download_leaves_nothing_half_used(tmp_path: Path) -> None:
    content = os.urandom(50_000)
    sha256 = hashlib.sha256(content).hexdigest()
    with SlowServer(content, seconds=60.0) as server:
        victim = SPAWN.Process(target=open_once, args=(str(tmp_path), server.url, sha256))
        victim.start()
        deadline = time.monotonic() + 60
        while not server.requests or files_of(tmp_path) != {"shard.tar.partial": 50_000}:
            assert time.monotonic() < deadline, "the download did not begin"
            time.sleep(0.02)
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(20)
    assert files_of(tmp_path) == {"shard.tar.partial": 50_000}
    with SlowServer(content, seconds=0.0) as server:
        # Other hosts and ports are other URLs, but the same content: the next one takes the lock and begins anew.
        assert open_once(str(tmp_path), server.url, sha256) == content
    assert files_of(tmp_path) == {"shard.tar": 50_000}


def begin_download(path: Path, content: bytes) -> int:
    """Hold what another process holds that downloads a copy; returns its descriptor."""
    path.parent.mkdir(parents=True)
    descriptor = os.open(path.with_name(f"{path.name}.partial"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, content)
    return descriptor


def wait_until_open(path: Path, *, times: int) -> None:
    deadline = time.monotonic() + 60
    while sum(os.path.realpath(link) == str(path) for link in Path("/proc/self/fd").iterdir()) < times:
        assert time.monotonic() < deadline, "nobody waits for the download"
        time.sleep(0.005)


def test_who_waits_for_a_download_never_waits_for_a_reader(tmp_path: Path) -> None:
    """A copy is its temporary file under another name, so readers' locks are on what the others wait for.

    Two ranks that each read one file and waited for the other's waited for ever.
    """
    content = b"x" * 1000
    path = tmp_path / "cache" / hashlib.sha256(content).hexdigest() / "shard.tar"
    descriptor = begin_download(path, content)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(open_once, str(tmp_path / "cache"), "file:///nowhere/shard.tar", path.parent.name)
        wait_until_open(path.with_name("shard.tar.partial"), times=2)
        path.with_name("shard.tar.partial").rename(path)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # from here on it is a reader's, as long as that needs the file
        try:
            assert waiting.result(timeout=60) == content
        finally:
            os.close(descriptor)


def test_who_waits_for_a_download_leaves_when_the_reader_is_left(tmp_path: Path) -> None:
    path = tmp_path / ("0" * 64) / "shard.tar"
    descriptor, is_stopping = begin_download(path, b""), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        cache = ShardCache(tmp_path, 10**6)
        waiting = pool.submit(cache.open, "file:///nowhere/shard.tar", "0" * 64, is_stopping=is_stopping)
        wait_until_open(path.with_name("shard.tar.partial"), times=2)
        is_stopping.set()
        try:
            with pytest.raises(OSError, match="the reader was left"):
                waiting.result(timeout=60)
        finally:
            os.close(descriptor)
    assert files_of(tmp_path) == {"shard.tar.partial": 0}, "the other process's goes on"


def test_what_a_killed_process_left_makes_room(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / ("0" * 64)).mkdir()
    (tmp_path / ("0" * 64) / "dead.tar.partial").write_bytes(bytes(900))
    with ShardCache(tmp_path, 1000).open(*put("alive.tar", b"x" * 500)):
        assert files_of(tmp_path) == {"alive.tar": 500}


def job_of(run: Path, *overrides: str) -> TrainingJob:
    flags = arguments(run, 2, starts_from="scratch", shards_per_block=2)
    for override in overrides:
        flags += ["--set", override]
    return open_stage(parse_command("training", "", argv=flags, has_stages=True))


def remote_job(run: Path, *overrides: str) -> TrainingJob:
    return job_of(run, f'training.datasets=[{{run = "s3://{BUCKET}/run"}}]', *overrides)


def empty_run(folder: Path, source: Path) -> Path:
    (folder / "run" / "training" / "stage2").mkdir(parents=True)
    shutil.copy(source.parent / "recipe.toml", folder / "recipe.toml")
    return folder / "run"


def read_keys_and_sums(job: TrainingJob, *, rank: int = 0, num_ranks: int = 1, num_steps: int = 12) -> list[Any]:
    """Key and sum of text and latents of every sample a rank reads."""
    survey = survey_stage(job)
    assembler = BatchAssembler(
        job.features.datasets[0], buckets=survey.buckets, seed=0, stream=2, caption_dropout=0.1, checks_payloads=True
    )
    reader = BatchReader(
        stage_plan(job, survey),
        FeatureIndex(job.features.datasets),
        assembler,
        steps=range(num_steps),
        rank=rank,
        num_ranks=num_ranks,
    )
    found: list[Any] = []
    with reader:
        for packed in reader:
            batch = packed.to(torch.device("cpu"))
            assert batch.text is not None
            tokens, ends = batch.text.values.double().sum(1), batch.text.offsets[1:].tolist()
            texts = torch.stack([tokens[start:end].sum() for start, end in itertools.pairwise([0, *ends])])
            sums = (texts + batch.mean.double().sum((1, 2, 3))).tolist()
            found += zip(batch.keys, sums, strict=True)
    return found


def test_a_remote_run_gives_the_batches_of_a_local_one(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = remote_job(empty_run(tmp_path, source))
    (source / "training" / "stage2").mkdir(parents=True, exist_ok=True)
    assert read_keys_and_sums(job) == read_keys_and_sums(job_of(source))
    assert job.fingerprint == job_of(source).fingerprint, "features are what they hold, not where they lie"
    print_plan(job, inspect_stage(job, 1))
    said = " ".join(capsys.readouterr().err.split())
    assert "s3://features/run/features/latent-32 and s3://features/run/features/text" in said
    assert "cache 100 GB in" in said


def test_a_remote_choice_gives_the_batches_of_a_local_one(source: Path, tmp_path: Path) -> None:
    expressions = {"where": "min_side > 3", "weight": "sharpness"}
    write_choice(source, SHARDS, chooses=lambda i: i % 2 == 0, weigh=lambda i: i + 1.0, **expressions)
    client = boto3.client("s3")
    for path in (source / "choices").rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"run/{path.relative_to(source)}")
    settings = [f"features.stage2.{key}='{text}'" for key, text in expressions.items()]
    local, remote = job_of(source, *settings), remote_job(empty_run(tmp_path, source), *settings)
    (source / "training" / "stage2").mkdir(parents=True, exist_ok=True)
    assert remote.fingerprint == local.fingerprint
    found = read_keys_and_sums(remote)
    assert found == read_keys_and_sums(local)
    assert all(int(key.rpartition("_")[2]) % 2 == 0 for key, _ in found)


def test_ranks_share_a_small_cache(source: Path, tmp_path: Path) -> None:
    """Two ranks as threads with caches of their own, in one folder with room for two of the three blocks."""
    num_bytes = sum(path.stat().st_size for path in (source / "features").rglob("laion_*.tar"))
    run = empty_run(tmp_path, source)
    job = remote_job(run, f"training.cache_gigabytes={num_bytes * 0.75 / 1e9}")
    survey_stage(job)
    (source / "training" / "stage2").mkdir(parents=True, exist_ok=True)
    jobs = [remote_job(run, f"training.cache_gigabytes={num_bytes * 0.75 / 1e9}") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        ranks = list(
            pool.map(lambda rank: read_keys_and_sums(jobs[rank], rank=rank, num_ranks=2, num_steps=40), range(2))
        )
    shares = [rank[4 * step : 4 * step + 4] for step in range(40) for rank in ranks]
    assert [sample for share in shares for sample in share] == read_keys_and_sums(job_of(source), num_steps=40)
    assert sum(files_of(run / "training" / "cache").values()) <= num_bytes * 0.75


def test_a_cache_smaller_than_what_is_mixed_is_refused_before_training(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.cache_gigabytes = 5e-05 is less than the .* of the 8 remote tars"):
        inspect_stage(remote_job(empty_run(tmp_path, source), "training.cache_gigabytes=5e-5"), 1)


def test_features_that_are_not_there_are_named(source: Path, tmp_path: Path) -> None:
    run = empty_run(tmp_path, source)
    with pytest.raises(FileNotFoundError, match=r"s3://features/run/features/latent-512/manifest\.json does not exist"):
        remote_job(run, "features.stage2.resolution=512")


@pytest.mark.slow
def test_a_stage_trains_on_a_remote_and_a_local_dataset(source: Path, tmp_path: Path) -> None:
    run = empty_run(tmp_path, source)
    datasets = (
        f'[{{run = "s3://{BUCKET}/run", shards = ["laion_[0-3]"]}}, {{run = "{source}", shards = ["laion_[45]"]}}]'
    )
    validation = {"validation_shards": ["laion_0"], "num_validation_samples": 8, "validate_every": 1}
    settings = {"starts_from": "scratch", "num_steps": 4, "log_every": 1, **validation}
    done = run_module("training", [*arguments(run, 2, **settings), "--set", f"training.datasets={datasets}"])
    assert done.returncode == 0, done.stderr
    assert "50.00% of every batch" in done.stderr
    assert [line["step"] for line in metrics(run, 2)] == [1, 2, 3, 4]
    assert [line["step"] for line in validations(run, 2)] == [0, 1, 2, 3, 4], "leaving its reader stops no other"
