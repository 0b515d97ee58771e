"""What must hold before the next stage is worth its cost: loss, health, and samples that somebody has looked at."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.text import Text

from pipelines.as_typed import typed_command
from pipelines.engine.progress import console
from pipelines.store.checkpoints import Checkpoint
from pipelines.store.files import own_files
from pipelines.store.previews import FOLDER as PREVIEWS
from pipelines.store.state_files import read_log
from pixart.processes.specs import spec_of_trainer, student_of
from training.codec_keys import CODEC
from training.loop.metrics import METRICS
from training.previews.page import PAGE

# Part of the logged lines at either end whose mean is compared: single lines are noisy.
END_FRACTION = 0.1
MIN_LINES = 8
# Standard errors by which the means must differ to tell a fall or a rise. Noise alone does in 5% of stages of eight
# lines, and in 2% of those of 40.
MARGIN = 2.5
NORMAL_MEDIAN = 0.6745  # of the distances from the mean, in standard deviations
# A validation loss this far over its lowest is on its way up.
TOLERATED_RISE = 1.02
MAX_SKIPPED_FRACTION = 0.001
DUMP_NAME = re.compile(r"non-finite-step-\d+\.json")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition; `holds` is None where only a person can tell, or nothing was measured."""

    name: str
    holds: bool | None
    finding: str


def stage_gate(checkpoint: Checkpoint, *, samples: Path) -> list[Check]:
    """Return the conditions for going on from a stage's checkpoint.

    Args:
        checkpoint: the stage's newest; its folder's parent holds the metrics.
        samples: folder of the images drawn from it, whether there are any or not.
    """
    directory = checkpoint.path.parent
    path = directory / METRICS
    lines = list(read_log(path)) if path.is_file() else []
    page = directory / PREVIEWS / PAGE
    previews = [Check(name="previews", holds=None, finding=f"look at {page}")] if page.is_file() else []
    # In the sum that a codec minimises is what a discriminator says, whose standards rise.
    loss = "mse" if checkpoint.trainer["kind"] == CODEC else "loss"
    is_student = student_of(spec_of_trainer(checkpoint.trainer)) is not None
    return [
        _steps(checkpoint),
        *(
            _untold(check) if is_student else check
            for check in (_loss(_numbers(lines, loss)), _validation(_numbers(lines, f"validation_{loss}")))
        ),
        _health(checkpoint, [path.name for path in own_files(directory, DUMP_NAME)]),
        *previews,
        *([] if checkpoint.trainer["kind"] == CODEC else [_samples(checkpoint, samples)]),
    ]


def _numbers(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if isinstance(line.get(name), int | float)]


def samples_of(checkpoint: Checkpoint) -> Path:
    """Return where `make sample` puts the images of a stage's checkpoint: `RUN/samples/<stage>`."""
    stage = checkpoint.path.parent
    return stage.parent.parent / "samples" / stage.name


def print_gate(checkpoint: Checkpoint, *, samples: Path) -> None:
    """Print the gate of a stage."""
    checks = stage_gate(checkpoint, samples=samples)
    console.print(Text(f"before going on from {checkpoint.path.parent.name}", style="bold"))
    for check in checks:
        mark = {True: ("ok  ", "green"), False: ("NO  ", "red"), None: ("look", "yellow")}[check.holds]
        console.print(Text.assemble("  ", mark, f" {check.name:<11}{check.finding}"), soft_wrap=True)


def _steps(checkpoint: Checkpoint) -> Check:
    num_steps = checkpoint.trainer["num_steps"]
    return Check(name="steps", holds=checkpoint.is_finished, finding=f"{checkpoint.step:,} of {num_steps:,} done")


def _untold(check: Check) -> Check:
    """Return a check of a student's loss: it begins at the teacher's weights, and its target moves with it."""
    return replace(check, holds=None, finding=f"{check.finding}: of a student it tells little, as its target moves")


def _loss(losses: Sequence[float]) -> Check:
    if len(losses) < MIN_LINES:
        return Check(name="loss", holds=None, finding="too few lines of metrics to tell; lower training.log_every")
    num_lines = max(1, int(len(losses) * END_FRACTION))
    first, last = (sum(part) / num_lines for part in (losses[:num_lines], losses[-num_lines:]))
    margin = MARGIN * _line_scatter(losses) * math.sqrt(2 / num_lines)
    finding = f"{first:.4f} -> {last:.4f} (means of the first and last {num_lines} of {len(losses)} lines)"
    if abs(last - first) <= margin:
        untold = f"{finding}, which is within the scatter of its lines: a change would be over {margin:.4f}"
        return Check(name="loss", holds=None, finding=untold)
    return Check(name="loss", holds=last < first, finding=finding)


def _line_scatter(losses: Sequence[float]) -> float:
    """Return the standard deviation of a line, of lines that are independent, as batches are.

    It is that of a normal distribution whose neighbours differ by the median found: a spike does not count, and a trend
    only by what it is from line to line.
    """
    changes = [abs(after - before) for before, after in pairwise(losses)]
    return statistics.median(changes) / (NORMAL_MEDIAN * math.sqrt(2))


def _validation(losses: Sequence[float]) -> Check:
    if len(losses) < 2:
        return Check(name="validation", holds=None, finding="none: training.validation_shards holds shards out for it")
    lowest, last = min(losses), losses[-1]
    finding = f"{losses[0]:.4f} -> {last:.4f}, lowest {lowest:.4f}"
    return Check(name="validation", holds=last < losses[0] and last <= TOLERATED_RISE * lowest, finding=finding)


def _health(checkpoint: Checkpoint, dumps: Sequence[str]) -> Check:
    trainer: dict[str, Any] = checkpoint.trainer
    num_skipped = trainer["skipped_steps"]
    finding = f"{num_skipped:,} of {checkpoint.step:,} updates skipped"
    if dumps:
        finding += f"; losses that were not finite: {', '.join(dumps)}"
    is_well = not dumps and num_skipped <= MAX_SKIPPED_FRACTION * checkpoint.step
    return Check(name="health", holds=is_well, finding=finding)


def _samples(checkpoint: Checkpoint, samples: Path) -> Check:
    # What is drawn from one PROMPT lies in a folder of its own.
    grids = [samples.with_name(name) / "grid.png" for name in (samples.name, f"{samples.name}-prompt")]
    grid = max(filter(Path.is_file, grids), key=lambda path: path.stat().st_mtime, default=None)
    if grid is None:
        return Check(name="samples", holds=None, finding=f"not drawn yet: {typed_command('sample')}, and look at them")
    if grid.stat().st_mtime < (checkpoint.path / "trainer.json").stat().st_mtime:
        return Check(
            name="samples", holds=False, finding=f"{grid} is of an earlier checkpoint: {typed_command('sample')} again"
        )
    return Check(name="samples", holds=None, finding=f"look at {grid}")
