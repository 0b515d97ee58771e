"""`python -m captioning` under kill -9, on a full and on a read-only disk: it ends with an undisturbed run's bytes."""

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.captioning_run import finish, line
from tests.line_worker import contents
from tests.processes import kill, kill_tree, ray_workers
from tests.raw_shards import write_laion, write_sa1b
from tests.tiny_models import save_llava
from tests.tiny_vlms import save_idefics3

SEED = 20261121
RECIPE = """
[data]
shards = "{folder}/raw/*.tar"

[engine]
samples_per_slice = 8
num_workers = 2
max_shard_attempts = 20

[captioning]
model = "{folder}/model"
engine = "{engine}"
max_new_tokens = 24
batch_size = 4
"""


# The engines that caption in process, each with a model of its own.
SAVES = {"transformers": save_llava, "generate": save_idefics3}


@pytest.fixture(scope="module", params=SAVES)
def folder(request, tmp_path_factory) -> Path:
    """Raw shards, a model, a recipe, and `calm/`, a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    SAVES[request.param](folder / "model")
    for number in range(3):
        write_laion(folder / "raw" / f"laion_{number:05d}.tar", 40, first=100 * number)
    write_sa1b(folder / "raw" / "sa_000000.tar", 24)
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder, engine=request.param))
    finish(line(folder, folder / "calm", alone=True))
    return folder


def count_finished(captions: Path) -> int:
    return len(list(captions.glob(".parts/*/*.report"))) + len(list(captions.glob(".done/*.json")))


@pytest.mark.faults
@pytest.mark.parametrize("seed", [SEED])
def test_workers_and_machine_killed_at_random_moments(tmp_path, folder, seed: int) -> None:
    """Two workers, one after the other, and then everything at one moment; the rerun is one process without Ray."""
    moments = random.Random(seed)
    captions = tmp_path / "run" / "captions"
    process = subprocess.Popen(
        line(folder, tmp_path / "run", alone=False), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(2):
        while process.poll() is None and not (workers := ray_workers(process.pid)):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 4))
        assert process.poll() is None, "ended before a worker could be killed"
        kill(moments.choice(ray_workers(process.pid) or workers))
    num_finished = count_finished(captions)
    while process.poll() is None and count_finished(captions) <= num_finished:
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 0.1))
    kill_tree(process.pid)
    assert process.wait() == -9, "killed in the middle, not after the end"
    assert not (captions / ".manifest.json").exists()
    finish(line(folder, tmp_path / "run", alone=True))
    assert contents(captions) == contents(folder / "calm" / "captions")


DISK = """
set -eu
run=$1; shift
mount -t tmpfs -o size=60k tmpfs "$run"
status=0; "$@" 2> "$run.full" || status=$?; echo "full $status $(ls "$run/captions/.done" | wc -l)"
mount -o remount,size=64m,ro "$run"
status=0; "$@" 2> "$run.read_only" || status=$?; echo "read-only $status"
mount -o remount,rw "$run"
status=0; "$@" 2> "$run.again" || status=$?; echo "again $status"
mount -o remount,ro "$run"
status=0; "$@" 2> "$run.done" || status=$?; echo "done $status"
cp -a "$run/captions" "$run.copy"
"""


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["transformers"], indirect=True)
def test_a_full_disk_and_a_read_only_one(tmp_path, folder) -> None:
    """A real disk of 60 kB, in a mount namespace of its own, that fills up, turns read-only, and gets room."""
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk: unshare --mount needs root or user namespaces")
    run = tmp_path / "run"
    run.mkdir()
    script = ["unshare", "--mount", "sh", "-c", DISK, "sh", str(run), *line(folder, run, alone=True)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    full, read_only, again, finished = done.stdout.splitlines()
    assert full in {"full 2 1", "full 2 2", "full 2 3"}, "some of the four shards were done before the disk was full"
    assert (read_only, again, finished) == ("read-only 2", "again 0", "done 0")
    messages = {name: (tmp_path / f"run.{name}").read_text() for name in ("full", "read_only", "again", "done")}
    assert "the disk is full" in messages["full"] and "what is done is kept" in messages["full"]
    assert "read-only" in messages["read_only"].lower()
    for name in ("full", "read_only"):
        last = messages[name].strip().splitlines()[-1]
        assert last.startswith("captioning: ") and str(run) in last, "one message, behind the log lines"
        assert "Traceback" not in messages[name]
    assert "nothing to do: all 4 shards" in " ".join(messages["done"].split())
    assert contents(tmp_path / "run.copy") == contents(folder / "calm" / "captions")
