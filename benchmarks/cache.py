"""`make bench-cache`: what fewer block evaluations an image cost in points of the judge, on a finished demo.

All settings draw the same unseen prompts from the same noise with the run's stage 2, and the judge looks for the same
objects in all images. So differences are paired: image by image, as the objects of one share its noise. Prompts and
noise are others than those that the settings were chosen by (docs/LOG.md, seed 0).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from errors import UserError
from pixart.drawing.passes import num_block_evaluations
from pixart.processes.make import process_of
from pixart.reuse import NUM_FIRST_BLOCKS
from sampling.config import SamplingConfig
from sampling.renderer import Renderer
from sampling.requests import ImageRequest
from sampling.text_encoding import encode_prompts
from sampling.trained_model import TrainedModel, open_run_model
from toyworld.config import ToyworldConfig
from toyworld.judge import Judge
from toyworld.scenes import Scene
from toyworld.world import make_prompts

RESULT = Path(__file__).parent / "results" / "cache.json"
WORLD_SEED = 1
FIRST_NOISE_SEED = 100_000
NUM_PROMPTS = 1050  # with two objects each, more or less
BATCH_SIZE = 64
GUIDANCE = 3.0  # of the demo
# The first is the one that docs/SAMPLING.md recommends, and has the plain names among the figures.
SETTINGS: dict[str, dict[str, Any]] = {
    "cache_2": {"cache": 2},
    "cache_3": {"cache": 3},
    "cache_2_interval": {"cache": 2, "guidance_interval": (0.2, 0.9)},
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What became of all prompts under one setting.

    Attributes:
        right: of each image, whether each of its objects has the right place, colour and shape.
        num_blocks: block evaluations an image.
        cpu_seconds: of drawing all images, without the judge.
    """

    right: list[list[bool]]
    num_blocks: int
    cpu_seconds: float


class Illustrator:
    """A stage of a run, prompts that it has not seen, and the judge."""

    def __init__(self, trained: TrainedModel, *, num_prompts: int, num_steps: int) -> None:
        assert trained.text is not None
        rows = make_prompts(ToyworldConfig(seed=WORLD_SEED, num_prompts=num_prompts))
        self.scenes = [Scene.from_json(json.dumps(row["scene"])) for row in rows]
        self.requests = [
            ImageRequest(
                number=number,
                key=row["key"],
                prompt=row["prompt"],
                label=None,
                seed=FIRST_NOISE_SEED + number,
                width=trained.resolution,
                height=trained.resolution,
                file=f"{row['key']}.png",
            )
            for number, row in enumerate(rows)
        ]
        self.config = SamplingConfig(guidance_scale=GUIDANCE, num_steps=num_steps, device="cpu", num_threads=1)
        prompts = list(dict.fromkeys(["", *(row["prompt"] for row in rows)]))
        self.texts: Mapping[str, Tensor] = encode_prompts(prompts, self.config, trained.text)
        self.renderer, self.judge = Renderer(self.config, trained), Judge.load()

    def draw(self, settings: Mapping[str, Any]) -> Drawn:
        """Draw all prompts under the settings laid over the demo's, and judge them."""
        config = SamplingConfig.model_validate({**self.config.model_dump(), **settings})
        self.renderer.config = config
        images, start_seconds = [], time.process_time()
        for start in range(0, len(self.requests), BATCH_SIZE):
            images += self.renderer.draw(self.requests[start : start + BATCH_SIZE], self.texts).images()
        cpu_seconds = time.process_time() - start_seconds
        verdicts = self.judge.score_batch(images, self.scenes)
        return Drawn(
            right=[[hit.is_right for hit in verdict.hits] for verdict in verdicts],
            num_blocks=self._num_blocks(config),
            cpu_seconds=cpu_seconds,
        )

    def _num_blocks(self, config: SamplingConfig) -> int:
        process = process_of(self.renderer.trained.process)
        passes = config.passes(process.scheduler(config.solver, config.num_steps).timesteps, process.num_times)
        num_blocks = len(self.renderer.model.blocks)
        return num_block_evaluations(passes, num_blocks=num_blocks, num_first_blocks=NUM_FIRST_BLOCKS)


def paired_loss(before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Return by how many points of 100 objects fewer are right after than before, and half its 95% interval.

    Objects of an image are no independent draws: the interval is that of a ratio of sums over images (Cochran 1977,
    6.4), of lost objects by objects.
    """
    lost = [sum(old) - sum(new) for old, new in zip(before, after, strict=True)]
    sizes = [len(old) for old in before]
    num_objects, num_images = sum(sizes), len(sizes)
    ratio = sum(lost) / num_objects
    squares = sum((one - ratio * size) ** 2 for one, size in zip(lost, sizes, strict=True))
    deviation = math.sqrt(squares * num_images / (num_images - 1)) / num_objects
    return 100 * ratio, 1.96 * 100 * deviation


def compare(off: Drawn, on: Drawn) -> dict[str, Any]:
    """Return the figures of one setting against none."""
    pairs = [pair for old, new in zip(off.right, on.right, strict=True) for pair in zip(old, new, strict=True)]
    points_lost, half = paired_loss(off.right, on.right)
    return {
        "ratio_blocks": round(off.num_blocks / on.num_blocks, 2),
        "ratio_cpu_seconds": round(off.cpu_seconds / on.cpu_seconds, 2),
        "points_lost": round(points_lost, 2),
        "points_lost_95": [round(points_lost - half, 2), round(points_lost + half, 2)],
        "num_lost": sum(old and not new for old, new in pairs),
        "num_gained": sum(new and not old for old, new in pairs),
    }


def measure(trained: TrainedModel, *, num_prompts: int, num_steps: int) -> dict[str, Any]:
    """Draw without either setting and under each; returns figures by the names of the JSON line."""
    illustrator = Illustrator(trained, num_prompts=num_prompts, num_steps=num_steps)
    off = illustrator.draw({})
    hits = [is_right for image in off.right for is_right in image]
    figures: dict[str, Any] = {"num_objects": len(hits), "right_off": round(sum(hits) / len(hits), 4)}
    for place, (name, settings) in enumerate(SETTINGS.items()):
        found = compare(off, illustrator.draw(settings))
        print(f"{name}: {json.dumps(found)}", flush=True)
        figures |= {key if place == 0 else f"{key}_{name}": value for key, value in found.items()}
    return figures


def print_table(figures: Mapping[str, Any]) -> None:
    """Print one row a setting."""
    title = f"against all blocks at every pass, guided everywhere: {figures['num_objects']:,} objects, same noise"
    headings = ("fewer blocks", "CPU seconds", "points lost (95%)", "objects lost, gained")
    table = Table(Column(no_wrap=True), *headings, title=title)
    for place, (name, settings) in enumerate(SETTINGS.items()):
        end = "" if place == 0 else f"_{name}"
        low, high = figures[f"points_lost_95{end}"]
        table.add_row(
            ", ".join(f"{key.removeprefix('guidance_')} = {value}" for key, value in settings.items()),
            f"{figures[f'ratio_blocks{end}']}",
            f"{figures[f'ratio_cpu_seconds{end}']}",
            f"{figures[f'points_lost{end}']:+} ({low:+} to {high:+})",
            f"{figures[f'num_lost{end}']}, {figures[f'num_gained{end}']}",
        )
    Console().print(table)


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/cache.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run of `make demo`")
    try:
        trained = open_run_model(parser.parse_args().run, "stage2")
    except UserError as error:
        raise SystemExit(f"bench-cache draws with stage 2 of a finished `make demo`: {error}") from None
    figures = measure(trained, num_prompts=NUM_PROMPTS, num_steps=20)
    print_table(figures)
    line = json.dumps(figures)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
