"""A disk that fills up while features are written: one clear line, nothing finished is lost, the rerun ends alike."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from feature_run import extract, write_run

from errors import UserError
from pipelines.store.manifest import read_manifest
from pipelines.store.verify.run import verify_run

PAGE_BYTES = 4096


@pytest.fixture
def disk(tmp_path):
    """An empty file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("reference"), num_shards=3, samples_per_shard=20)
    extract(run)
    return run


def pages(paths) -> int:
    return sum(-(-path.stat().st_size // PAGE_BYTES) * PAGE_BYTES for path in paths if path.is_file())


def fill(disk: Path, *, but_bytes: int) -> Path:
    """Write a file that leaves `but_bytes` free."""
    path = disk / "filler"
    free_bytes = os.statvfs(disk).f_bavail * PAGE_BYTES
    with path.open("wb") as file:
        file.write(bytes(max(0, free_bytes - but_bytes)))
    return path


@pytest.mark.parametrize("family", ["text", "latent-32"])
def test_a_full_disk_is_one_clear_error_and_the_rerun_writes_the_same_bytes(disk, reference, family, monkeypatch):
    run = disk / "run"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns("features", "summary.json"))
    shutil.copy(reference.parent / "recipe.toml", disk)
    done = reference / "features" / family
    if family == "latent-32":
        shutil.copytree(reference / "features" / "text", run / "features" / "text")
    # Something else takes the room after the check that comes first.
    monkeypatch.setattr("features.plan._free_bytes", lambda path: 10**12)
    last = (done / "laion_00002.tar").stat().st_size
    filler = fill(disk, but_bytes=pages(done.rglob("*")) - last // 2)
    with pytest.raises(UserError, match=rf"features/{family}: the disk is full .*make room and type the command again"):
        extract(run)
    directory = run / "features" / family
    assert not (directory / "manifest.json").exists()
    assert not (directory / "laion_00002.tar").exists()
    for name in ("laion_00000.tar", "laion_00000.parquet", ".done/laion_00000.json"):
        assert (directory / name).read_bytes() == (done / name).read_bytes(), name
    kept = (directory / "laion_00000.tar").stat().st_mtime_ns
    filler.unlink()
    extract(run)
    assert (directory / "laion_00000.tar").stat().st_mtime_ns == kept
    for path in done.glob("laion_*"):
        assert (directory / path.name).read_bytes() == path.read_bytes(), path.name
    assert read_manifest(directory).shards == read_manifest(done).shards
    assert verify_run(run).problems == []
