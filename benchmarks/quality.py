"""`make bench-quality`: steps and seconds of stage 2 until the judge is content: the paper's recipe against the demo's.

Both go on from the same stage 1, on the same features, to unseen prompts with more than 1,000 objects. A rate that
falls to 0 at the end makes stages of other lengths other trainings, so each length is a whole stage of its own: down
from where a recipe is expected while the bars are reached, else up. All goes through the house's doors, and what is
there is kept: the same command goes on after a kill. Near the bars a length may reach or miss them by chance: what is
found from above is then a little long, and from below a little short.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from errors import UserError
from pipelines.store.state_files import read_log
from pipelines.store.summary import read_summary

RESULT = Path(__file__).parent / "results" / "quality.json"
FOLDER = Path("runs/bench-quality")
WORLD = FOLDER / "world"
BARS = {"position": 0.98, "colour": 0.93, "shape": 0.92, "all": 0.86}
NUM_PROMPTS = 560  # with 1,075 objects
STEPS_PER_DOUBLING = 4
LEAST_STEPS, MOST_STEPS = 100, 6_400
NUM_SEEDS, MOST_SEEDS = 3, 10


@dataclass(frozen=True)
class Contestant:
    """A recipe by its file, and the index of the length that its search starts at."""

    recipe: str
    first: int


# In the order of the ratios: what is to be beaten, then ours.
CONTESTANTS = {"paper": Contestant("recipes/toyworld-paper.toml", 15), "ours": Contestant("recipes/toyworld.toml", 6)}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A stage of some length: what training it took, and what the judge says of its pictures."""

    num_steps: int
    seconds: float
    scores: Mapping[str, float]

    @property
    def is_content(self) -> bool:
        """Whether the judge's scores reach all bars."""
        return all(self.scores[name] >= bar for name, bar in BARS.items())


def length(index: int) -> int:
    """Return the steps of a length: 100 times a power of the fourth root of 2, so that lengths are 19% apart."""
    return round(LEAST_STEPS * 2 ** (index / STEPS_PER_DOUBLING))


def find_shortest(train: Callable[[int], Trained], first: int) -> list[Trained]:
    """Train lengths downwards from `first` until one misses the bars, or upwards until one reaches them.

    Returns:
        All that were trained, the shortest that reaches the bars last.

    Raises:
        UserError: the longest does not reach them.
    """
    trained = [train(first)]
    index = first
    if trained[0].is_content:
        while index > 0:
            index -= 1
            shorter = train(index)
            if not shorter.is_content:
                return [shorter, *trained]
            trained.append(shorter)
        return trained
    while length(index) < MOST_STEPS:
        index += 1
        trained.append(train(index))
        if trained[-1].is_content:
            return trained
    raise UserError(f"{length(index):,} steps do not reach {BARS}: {dict(trained[-1].scores)}")


def door(name: str, recipe: str, run: Path, stage: str | None, settings: Sequence[str] = ()) -> None:
    """Go through a door of the house in a process of its own.

    Raises:
        UserError: it fails.
    """
    line = [sys.executable, "-m", "atelier", name, "--recipe", recipe, "--run", str(run)]
    line += ["--stage", stage] if stage else []
    line += [word for setting in settings for word in ("--set", setting)]
    if subprocess.run(line, check=False).returncode:
        raise UserError(f"{' '.join(line)} has failed; the same benchmark goes on from there when it is mended")


def prepare() -> None:
    """Make what all trainings start from: raw shards, captions, features of stage 2 and a trained stage 1."""
    recipe = CONTESTANTS["paper"].recipe
    door("world", recipe, WORLD, None, [f"toyworld.num_prompts={NUM_PROMPTS}"])
    door("caption", recipe, WORLD, None, ['captioning.shards=["laion_*","sa_*"]'])
    door("features", recipe, WORLD, "stage1")
    door("train", recipe, WORLD, "stage1")
    door("features", recipe, WORLD, "stage2")


def train(contestant: Contestant, run: Path, seed: int, num_steps: int) -> Trained:
    """Train a stage 2 of so many steps in a run of its own beside the world, draw with it, and judge."""
    (run / "training").mkdir(parents=True, exist_ok=True)
    for part in ("raw", "captions", "features", "training/stage1"):
        link = run / part
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(WORLD / part, link.parent))
    settings = [f"training.stage2.num_steps={num_steps}", f"training.seed={seed}"]
    door("train", contestant.recipe, run, "stage2", settings)
    door("sample", contestant.recipe, run, "stage2", settings)
    door("judge", contestant.recipe, run, None)
    *_, last = read_log(run / "training" / "stage2" / "metrics.jsonl")
    figures = read_summary(run)["judge"]["stage2"]
    return Trained(num_steps=num_steps, seconds=last["elapsed_seconds"], scores={name: figures[name] for name in BARS})


def compare(num_seeds: int) -> dict[str, Any]:
    """Return the shortest stages of all seeds, and how many times more steps and seconds the paper's recipe takes."""
    prepare()
    searches: dict[str, list[list[Trained]]] = {name: [] for name in CONTESTANTS}
    for seed in range(num_seeds):
        for name, contestant in CONTESTANTS.items():
            folder = FOLDER / name / f"seed-{seed}"
            found = find_shortest(
                lambda index, contestant=contestant, folder=folder, seed=seed: train(
                    contestant, folder / f"steps-{length(index)}", seed, length(index)
                ),
                contestant.first,
            )
            searches[name].append(found)
    return summarize(searches)


def summarize(searches: Mapping[str, Sequence[Sequence[Trained]]]) -> dict[str, Any]:
    """Return ratios as geometric means over seeds, those of each seed, and all that was trained."""
    paper, ours = ([search[-1] for search in searches[name]] for name in CONTESTANTS)
    steps = [theirs.num_steps / mine.num_steps for theirs, mine in zip(paper, ours, strict=True)]
    seconds = [theirs.seconds / mine.seconds for theirs, mine in zip(paper, ours, strict=True)]
    return {
        "ratio_steps_to_bar": round(statistics.geometric_mean(steps), 2),
        "ratio_seconds_to_bar": round(statistics.geometric_mean(seconds), 2),
        "ratios_steps_by_seed": [round(ratio, 2) for ratio in steps],
        "ratios_seconds_by_seed": [round(ratio, 2) for ratio in seconds],
        "bars": BARS,
        "load": round(os.getloadavg()[0], 1),
        "trained": {name: [[asdict(one) for one in search] for search in searches[name]] for name in CONTESTANTS},
    }


def show(searched: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """Print a table of all that was trained; what reaches the bars in the fewest steps is bold."""
    table = Table("recipe", "seed", "steps", "seconds", *BARS)
    for name, searches in searched.items():
        for seed, search in enumerate(searches):
            for one in sorted(search, key=lambda one: one["num_steps"]):
                scores = [f"{math.floor(one['scores'][axis] * 1000) / 10}%" for axis in BARS]
                style = "bold" if one is search[-1] else None
                table.add_row(name, str(seed), str(one["num_steps"]), f"{one['seconds']:.0f}", *scores, style=style)
    Console().print(table)


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/quality.json."""
    parser = argparse.ArgumentParser(description="Steps and seconds until the judge is content.")
    seeds = range(1, MOST_SEEDS + 1)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, choices=seeds, help="trainings of each length")
    try:
        result = compare(parser.parse_args().seeds)
    except UserError as error:
        raise SystemExit(f"bench-quality: {error}") from None
    show(result["trained"])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
