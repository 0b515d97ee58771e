"""Every command of the chain killed at a random moment and typed again: the run's files are an undisturbed run's.

What may differ, and why: figures of time, speed and memory (`MEASURED`), in `summary.json`, `metrics.jsonl` and
`trainer.json`; and TensorBoard's event files, which carry the time in name and content and are one per start.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.processes import kill_tree

SEED = 20261121
TINY = (
    "toyworld.num_laion=24",
    "toyworld.num_sa=12",
    "toyworld.num_hq=12",
    "toyworld.num_imagenet=0",
    "toyworld.samples_per_shard=12",
    "toyworld.num_prompts=2",
    "engine.in_process=true",
    "engine.samples_per_slice=4",
    "features.stage2.shards=['laion_*', 'sa_*']",
    "training.num_processes=1",
    "training.global_batch_size=8",
    "training.stage2.num_steps=3",
    "training.stage2.starts_from=scratch",
    "sampling.num_steps=2",
)
# Each command and the folder of the run that it writes.
CHAIN = {
    ("captioning",): "captions",
    ("dataset_stats",): "stats",
    ("features", "--stage", "2"): "features",
    ("training", "--stage", "2"): "training",
    ("sampling", "--stage", "2"): "samples",
}


MEASURED = {
    "seconds",
    "elapsed_seconds",
    "device_seconds",
    "images_per_second",
    "samples_per_second_of_a_worker",
    "data_wait_fraction",
    "teraflops_per_second",
    "mfu",
    "peak_memory_gigabytes",
    "device_days",
    "dollars",
    "co2_kilograms",
}


def line(run: Path, room: str, *arguments: str) -> list[str]:
    overrides = [argument for pair in TINY for argument in ("--set", pair)]
    recipe = ["--recipe", "recipes/toyworld.toml", "--run", str(run)]
    task = ["world"] if room == "toyworld" else []
    return [sys.executable, "-m", room, *task, *recipe, *overrides, *arguments]


def finish(command: list[str]) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def interrupt(command: list[str], folder: Path, *, num_files: int) -> int:
    """kill -9 of the command and all its processes once its folder has so many files; returns its exit status."""
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and count_files(folder) < num_files:
        time.sleep(0.002)
    kill_tree(process.pid)
    return process.wait()


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_measured(item) for key, item in value.items() if key not in MEASURED}
    return [without_measured(item) for item in value] if isinstance(value, list) else value


def contents(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or path.name.endswith(".lock") or path.name.startswith("events.out.tfevents."):
            continue
        if path.name in {"summary.json", "trainer.json"}:
            found[name] = without_measured(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            found[name] = [without_measured(json.loads(text)) for text in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [SEED])
def test_a_chain_of_killed_commands_ends_with_the_files_of_an_undisturbed_run(tmp_path, seed: int) -> None:
    run = tmp_path / "run"
    finish(line(run, "toyworld"))
    start = contents(run)
    for stage in CHAIN:
        finish(line(run, *stage))
    undisturbed = contents(run)
    num_files = {folder: count_files(run / folder) for folder in CHAIN.values()}
    assert all(number > 1 for number in num_files.values()), num_files
    # Under the same path, as manifests and `run.json` name it, and with the very same raw shards.
    for name in undisturbed.keys() - start.keys():
        (run / name).unlink()
    for folder in CHAIN.values():
        shutil.rmtree(run / folder)
    (run / "summary.json").write_text(json.dumps(start["summary.json"]))
    moments = random.Random(seed)
    for stage, folder in CHAIN.items():
        moment = moments.randrange(1, num_files[folder])
        assert interrupt(line(run, *stage), run / folder, num_files=moment) == -9, f"{stage} ended before"
        finish(line(run, *stage))
    again = contents(run)
    assert again.keys() == undisturbed.keys()
    assert [name for name in again if again[name] != undisturbed[name]] == []
