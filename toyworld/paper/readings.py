"""What the runs of `make paper` hold about a training and what it drew: one run a seed, `runs/paper/seed-<n>`."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipelines.store.manifest import ShardDirectory
from pipelines.store.state_files import read_log
from pipelines.store.summary import read_summary
from pipelines.store.tables import MEND_SHARD, read_table

SEED_FOLDER = re.compile(r"seed-([0-9]+)")
WORLD_FOLDER = "world"
DISTANCE = "FD-LLaVA"
METRICS_NAME = "metrics.jsonl"

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Hits:
    """The judge's view of an arm's pictures: by prompt, objects that are all right, and objects that were named."""

    by_prompt: Mapping[str, tuple[float, int]]

    @property
    def share(self) -> float:
        """Part of the objects that are all right."""
        return sum(right for right, _ in self.by_prompt.values()) / self.num_objects

    @property
    def num_objects(self) -> int:
        """Objects that the prompts name."""
        return sum(named for _, named in self.by_prompt.values())


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the log of a stage says at its end; memory is that of the process with all its libraries."""

    num_steps: int
    num_samples: int
    seconds: float
    peak_memory_gigabytes: float
    device_days: float
    dollars: float
    co2_kilograms: float


@dataclass(frozen=True)
class PaperRuns:
    """The folders of `make paper`: that of the world, and one for each seed of the trainings, by seed."""

    folder: Path
    seeds: Mapping[int, Path]

    @property
    def world(self) -> Path:
        """The run with raw shards, captions and statistics."""
        return self.folder / WORLD_FOLDER

    def by_seed(self, read: Callable[[Path], Value | None]) -> dict[int, Value]:
        """Return what `read` gives of each seed's run, without those that have none."""
        found = {seed: read(run) for seed, run in self.seeds.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def hits(self, name: str) -> dict[int, Hits]:
        """Return what the judge saw of samples `name`, by seed."""
        return self.by_seed(lambda run: read_hits(run, name))

    def trained(self, stage: str) -> dict[int, Trained]:
        """Return how a stage was trained, by seed."""
        return self.by_seed(lambda run: read_training(run, stage))


def find_runs(folder: Path) -> PaperRuns:
    """Return the runs of `make paper` that there are below its folder."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := SEED_FOLDER.fullmatch(path.name))}
    return PaperRuns(folder, dict(sorted(found.items())))


def num_right(objects: Sequence[Mapping[str, bool]]) -> int:
    """Return how many of a verdict's objects are at their place, in their colour and of their shape."""
    return sum(item["has_position"] and item["has_colour"] and item["has_shape"] for item in objects)


def read_hits(run: Path, name: str) -> Hits | None:
    """Return what the judge saw of the pictures `name` of a run; None where it has not looked at any."""
    path = ShardDirectory(run / "judge").file(name, ".parquet")
    if not path.is_file():
        return None
    rows = read_table(path, ["key", "objects"], mend=MEND_SHARD).to_pylist()
    by_prompt: dict[str, tuple[float, int]] = {}
    for row in rows:  # a prompt may have several pictures
        right, named = by_prompt.get(row["key"], (0.0, 0))
        by_prompt[row["key"]] = (right + num_right(row["objects"]), named + len(row["objects"]))
    return Hits(by_prompt=by_prompt) if by_prompt else None


def read_axes(run: Path, name: str) -> dict[str, tuple[float, int]] | None:
    """Return T2I-CompBench's axes in miniature of pictures `name`: a score, and over how many pictures it is."""
    path = ShardDirectory(run / "judge").file(name, ".json")
    if not path.is_file():
        return None
    axes = json.loads(path.read_bytes())["axes"]
    return {axis["name"]: (axis["score"], axis["num_images"]) for axis in axes if axis["num_images"]}


def read_distance(run: Path, name: str) -> float | None:
    """Return the Fréchet distance of pictures `name` to the reference, of the features of the toy LLaVA's tower."""
    return read_summary(run).get("evaluation", {}).get(name, {}).get(DISTANCE)


def read_training(run: Path, stage: str) -> Trained | None:
    """Return what the last line of a stage's log says; None where it has none."""
    rows = _log(run, stage)
    if not rows:
        return None
    last = rows[-1]
    return Trained(
        num_steps=last["step"],
        num_samples=last["num_samples_seen"],
        seconds=last["elapsed_seconds"],
        peak_memory_gigabytes=max(row["peak_memory_gigabytes"] for row in rows),
        device_days=last["device_days"],
        dollars=last["dollars"],
        co2_kilograms=last["co2_kilograms"],
    )


def seconds_at(run: Path, stage: str, step: int) -> float | None:
    """Return the seconds of training that a stage had taken by a step, the last one that was logged up to it."""
    before = [row["elapsed_seconds"] for row in _log(run, stage) if row["step"] <= step]
    return before[-1] if before else None


def _log(run: Path, stage: str) -> list[dict[str, Any]]:
    path = run / "training" / stage / METRICS_NAME
    rows = read_log(path) if path.is_file() else ()
    return [row for row in rows if isinstance(row.get("loss"), int | float) and math.isfinite(row["loss"])]
