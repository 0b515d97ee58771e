"""Raw Parquet and tables on S3 and on a hub, through the protocols' own clients, are what they are on disk."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from errors import UserError
from pipelines.raw.patterns import expand_shards
from pipelines.raw.shards import describe_shards, open_shard
from pipelines.raw.tables.row_texts import RowTexts
from tests.raw_kinds import Sample, write_rows, write_table
from tests.raw_shards import encode, photo
from tests.storage_servers import serve_folder

READ = """
import sys
from pipelines.raw.patterns import expand_shards
from pipelines.raw.shards import describe_shards, open_shard
from pipelines.raw.tables.row_texts import RowTexts
for path in expand_shards(sys.argv[1]):
    (described,) = describe_shards([path])
    with open_shard(path, identity=described.source.identity) as raw:
        for sample in raw.samples:
            print(sample.key, raw.image_bytes(sample).hex(), raw.text(sample), raw.label(sample))
    print(described.source.name, described.source.identity)
table = RowTexts(sys.argv[2:])
print([table.text(row) for row in range(len(table.column("file_name")))])
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set `birds/` of one Parquet file with images, and a table of paths beside it."""
    samples = [Sample(f"{n:04d}", encode(photo(n), "png"), f"text {n} Ä", n % 3) for n in range(20)]
    write_rows(tmp_path / "birds" / "data" / "train-00000-of-00001.parquet", samples, is_struct=True)
    write_table(tmp_path / "birds" / "list.csv", samples)
    write_table(tmp_path / "birds" / "list.jsonl.gz", samples)
    return tmp_path


def local_parquet(folder: Path) -> str:
    return str(folder / "birds" / "data" / "train-00000-of-00001.parquet")


def read(path: str) -> list[tuple[str, bytes, str | None, int | None]]:
    with open_shard(path) as raw:
        return [(s.key, raw.image_bytes(s), raw.text(s), raw.label(s)) for s in raw.samples]


@pytest.fixture
def bucket(folder, monkeypatch) -> Iterator[str]:
    """The folder's files in a bucket of a server that speaks S3's protocol."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setattr(fsspec.config, "conf", {"s3": {"endpoint_url": f"http://{host}:{port}"}})
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="raw")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.upload_file(str(file), "raw", str(file.relative_to(folder)))
        client.close()
        yield "s3://raw"
    finally:
        server.stop()


def test_parquet_and_tables_on_s3(folder, bucket, tmp_path) -> None:
    (path,) = expand_shards(f"{bucket}/birds/data/*.parquet")
    assert expand_shards(f"{bucket}/birds/") == [path]
    run = tmp_path / "run"
    described = describe_shards([path], run=run)
    (here,) = describe_shards([local_parquet(folder)])
    assert [shard.source.identity for shard in described] == [here.source.identity]
    assert described == describe_shards([path], run=run), "remembered by its ETag"
    assert read(path) == read(local_parquet(folder)) and len(read(path)) == 20
    for name in ("list.csv", "list.jsonl.gz"):
        assert RowTexts([f"{bucket}/birds/{name}"]).column("text") == [f"text {n} Ä" for n in range(20)]
        with pytest.raises(UserError, match=r"s3://raw/birds/list.* names images by their paths: download it"):
            describe_shards([f"{bucket}/birds/{name}"])


def test_parquet_and_tables_of_a_hub(folder) -> None:
    """huggingface_hub's own client against a server that answers as a hub does; this process is told to be offline."""
    with serve_folder(folder / "birds", is_hub=True) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        address = "hf://datasets/user/name"
        line = [sys.executable, "-c", READ, address, f"{address}/list.csv"]
        there = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    line = [sys.executable, "-c", READ, str(folder / "birds"), str(folder / "birds" / "list.csv")]
    here = subprocess.run(line, capture_output=True, text=True, check=False)
    assert there.returncode == here.returncode == 0, there.stderr + here.stderr
    # The hub's data set is called `name`, the folder `birds`.
    assert there.stdout.replace("name-train", "birds-train") == here.stdout
    assert here.stdout.count("\n") == 22
