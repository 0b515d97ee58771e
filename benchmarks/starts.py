"""`make bench-starts`: seconds of small commands the second time they are typed, in one process against Ray's workers.

Nouns of 3,000 captions, captions of 60 images of the toy world by the embedded LLaVA, and one image of a checkpoint of
the demo's shape, each in a process of its own from the interpreter's start to its end. An untimed run comes first, so
that the disk's cache is warm and kernels are compiled. Then the work as it is done when nothing is set, which is in the
process, and the same under `engine.in_process=false`; the files must be the same to the byte.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines.engine.progress import get_logger

RESULT = Path(__file__).parent / "results" / "starts.json"
RECIPE = "recipes/toyworld.toml"
NUM_CAPTIONS = 3000
NUM_IMAGES = 60
ON_RAY = "engine.in_process=false"


@dataclass(frozen=True, kw_only=True)
class Small:
    """A small command: its room with options, the folder of a run that it writes, and settings of the recipe."""

    name: str
    room: tuple[str, ...]
    outputs: str
    settings: tuple[str, ...] = ()


def small_commands(folder: Path) -> list[Small]:
    """Return the commands over inputs that are made in `folder`, with the run's raw shards in `folder/raw`."""
    get_logger("benchmarks")  # libraries then say nothing of themselves
    # Libraries of models, which need seconds of their own to start.
    from benchmarks.sample import toy_model
    from benchmarks.stats import CaptionMaker
    from pixart.convert import save_diffusers

    captions = folder / "captions.parquet"
    pq.write_table(pa.table({"caption": list(CaptionMaker(0).captions(NUM_CAPTIONS))}), captions)
    save_diffusers(toy_model(), folder / "model")
    counts = {"num_laion": NUM_IMAGES, "num_sa": 0, "num_hq": 0, "num_imagenet": 0}
    world = [f"toyworld.{name}={count}" for name, count in counts.items()]
    finish(command(("toyworld", "world"), folder, world))
    # A path of the recipe, as every run of this benchmark has a folder of its own.
    shards = f"data.shards={folder}/raw/*/*.tar"
    prompt = ("sampling.prompt=a red circle above a blue square", f"sampling.checkpoint={folder}/model")
    return [
        Small(name="stats", room=("dataset_stats",), outputs="stats", settings=(f"dataset_stats.sets=web={captions}",)),
        Small(name="caption", room=("captioning",), outputs="captions", settings=(shards,)),
        Small(name="sample", room=("sampling", "--stage", "2"), outputs="samples", settings=prompt),
    ]


def command(room: tuple[str, ...], run: Path, settings: list[str]) -> list[str]:
    """Return what `make` would run."""
    options = [option for setting in settings for option in ("--set", setting)]
    return [sys.executable, "-m", *room, "--recipe", RECIPE, "--run", str(run), *options]


def finish(line: list[str]) -> tuple[float, float]:
    """Run a command; returns its seconds, and CPU seconds of it and of those processes that it has waited for."""
    before, start_seconds = os.times(), time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start_seconds, os.times()
    assert done.returncode == 0, f"{' '.join(line)}:\n{done.stderr}"
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, spent


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every table and picture that a command wrote: what else there is tells of times."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".parquet", ".png")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def measure(small: Small, folder: Path) -> dict[str, Any]:
    """Run a command thrice: untimed, in the process, on Ray."""
    found, files = {}, []
    for name, settings in (("first", []), ("here", []), ("ray", [ON_RAY])):
        run = folder / f"{small.name}-{name}"
        found[name] = finish(command(small.room, run, [*small.settings, *settings]))
        files.append(digests(run / small.outputs))
    assert files[0], f"{small.name} has written nothing"
    return {
        small.name: round(found["here"][0], 1),
        f"{small.name}_cpu": round(found["here"][1], 1),
        f"{small.name}_first": round(found["first"][0], 1),
        f"{small.name}_ray": round(found["ray"][0], 1),
        f"ratio_{small.name}": round(found["ray"][0] / found["here"][0], 2),
        f"identical_{small.name}": files[0] == files[1] == files[2],
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/starts.json."""
    figures: dict[str, Any] = {}
    table = Table(
        "", "seconds", "CPU seconds", "on Ray", "ratio", "same bytes", title="small commands, the second time"
    )
    with tempfile.TemporaryDirectory(prefix="starts-") as name:
        for small in small_commands(Path(name)):
            figures |= measure(small, Path(name))
            keys = (small.name, f"{small.name}_cpu", f"{small.name}_ray", f"ratio_{small.name}")
            same = "yes" if figures[f"identical_{small.name}"] else "NO"
            table.add_row(small.name, *(str(figures[key]) for key in keys), same)
    Console().print(table)
    line = json.dumps(figures)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
