"""kill -9 in the middle of a raw shard of each kind, on Ray: the command typed again ends with the same bytes."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.captioning_run import finish, line
from tests.line_worker import contents
from tests.processes import kill_tree
from tests.raw_kinds import Sample, write_folder, write_rows, write_table
from tests.raw_shards import encode, photo, write_laion
from tests.tiny_models import save_llava

SEED = 20261128
NUM_SAMPLES = 48
# In the order in which they are done: one of each kind.
SHARDS = ("a_folder", "b_rows", "c_table", "d_tar")
RECIPE = """
[data]
shards = ["{folder}/raw/a_folder", "{folder}/raw/b_rows.parquet", "{folder}/raw/c_table.csv", "{folder}/raw/d_tar.tar"]

[engine]
samples_per_slice = 8
num_workers = 1
max_shard_attempts = 20

[captioning]
model = "{folder}/model"
engine = "transformers"
max_new_tokens = 24
batch_size = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    raw = folder / "raw"
    save_llava(folder / "model")
    samples = [Sample(f"{n:04d}", encode(photo(n), "png"), f"text {n}", n % 3) for n in range(NUM_SAMPLES)]
    write_folder(raw / "a_folder", samples)
    write_rows(raw / "b_rows.parquet", samples, is_struct=True)
    write_table(raw / "c_table.csv", samples, folder="a_folder/")
    write_laion(raw / "d_tar.tar", NUM_SAMPLES)
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    return folder


def has_begun(captions: Path, shard: str) -> bool:
    return any((captions / ".parts" / shard).glob("*.attempts"))


@pytest.mark.faults
@pytest.mark.parametrize("seed", [SEED])
def test_killed_in_the_middle_of_a_shard_of_each_kind(tmp_path, folder, seed: int) -> None:
    """The driver and its worker, once in each shard; those before it are done, and the last run is without Ray."""
    moments = random.Random(seed)
    captions = tmp_path / "run" / "captions"
    for shard in SHARDS:
        process = subprocess.Popen(
            line(folder, tmp_path / "run", alone=False), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not has_begun(captions, shard):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        kill_tree(process.pid)
        assert process.wait() == -9, f"ended before it could be killed in {shard}"
        assert not (captions / ".done" / f"{shard}.json").exists(), f"{shard} is done before the kill"
    finish(line(folder, tmp_path / "run", alone=True))
    finish(line(folder, folder / "calm", alone=True))
    assert contents(captions) == contents(folder / "calm" / "captions")
