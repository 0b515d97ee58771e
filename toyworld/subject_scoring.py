"""How well a subject was learnt and what was lost by it: samples before and after, with the same noise."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from errors import MissingFileError
from pipelines.as_typed import typed_command
from pipelines.engine.progress import get_logger
from pipelines.store.checkpoints import find_checkpoint
from pipelines.store.files import atomic_file
from pipelines.store.png_files import read_picture
from pipelines.store.state_files import read_records
from pipelines.store.summary import update_summary
from toyworld.detector import detect
from toyworld.mending import mend_sample, mend_world
from toyworld.scenes import Scene
from toyworld.scoring import SAMPLES_TABLE, read_samples
from toyworld.subject import OTHER_KEY, SUBJECT_KEY

log = get_logger("toyworld")

GRID_COLUMNS, GRID_SUBJECTS, GRID_NAME = 12, 8, "dreambooth.png"
CELL_PIXELS, GAP_PIXELS = 112, 6


def subject_folders(run: Path) -> dict[str, Path]:
    """Return where a run's samples before and after lie: `before` is drawn in the run of the prior images."""
    samples = {"before": run / "prior" / "samples" / "before", "full": run / "samples" / "dreambooth"}
    lora = run / "samples" / "dreambooth-lora"
    return samples | ({"lora": lora} if lora.is_dir() else {})


def score_subject(folders: Mapping[str, Path], run: Path) -> dict[str, float]:
    """Score folders of samples, `before`, `full` and, if it is there, `lora`; write them to the run's summary.

    The share of the prompts of the subject whose picture has it where it should be, there alone, on the background
    asked for; and of all objects of the other prompts the share that the judge finds right.

    Raises:
        MissingFileError: there are no prompts, or samples before or after.
    """
    prompts = read_records(run / "raw" / "prompts.jsonl", mend=mend_world(), keys=("key", "prompt"))
    pictures = {name: read_pictures(folder, prompts) for name, folder in folders.items()}
    subjects = {name: _subject_share(prompts, found) for name, found in pictures.items()}
    others = {name: _others_share(prompts, found) for name, found in pictures.items()}
    figures = {
        "subject_before": subjects["before"],
        "subject": subjects["full"],
        "others_before": others["before"],
        "others_lost": others["before"] - others["full"],
    }
    if "lora" in pictures:
        figures |= {
            "subject_lora": subjects["lora"],
            "others_lost_lora": others["before"] - others["lora"],
            "lora_fraction_of_weights": lora_fraction(run),
        }
    for name, value in figures.items():
        update_summary(run, f"dreambooth.{name}", round(value, 4))
    grid = run / GRID_NAME
    with atomic_file(grid) as path:
        _grid(prompts, pictures).save(path, format="PNG")
    log.info(f"{grid}: {', '.join(f'{name} {value:.1%}' for name, value in figures.items())}")
    return figures


def lora_fraction(run: Path) -> float:
    """Return how many weights the adapters have, as a part of those of the network that was trained whole.

    Raises:
        MissingFileError: a checkpoint of either is gone.
    """
    counts = {stage: _num_weights(run / "training" / stage) for stage in ("dreambooth", "dreambooth-lora")}
    return counts["dreambooth-lora"] / counts["dreambooth"]


def _num_weights(stage_directory: Path) -> int:
    checkpoint = find_checkpoint(stage_directory)
    if checkpoint is None:
        trains = typed_command("train", {"stage": stage_directory.name})
        raise MissingFileError(f"{stage_directory} has no checkpoint: `{trains}` trains it")
    shapes = []
    for path in checkpoint.weights.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as weights:
            shapes += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)


def read_pictures(folder: Path, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Image.Image]:
    """Return the pictures of a folder of samples by key; of prompts that are as they were."""
    if not (folder / SAMPLES_TABLE).is_file():
        raise MissingFileError(
            f"{folder} has no samples: `{typed_command('sample', {'stage': folder.name})}` draws them"
        )
    asked = {row["key"]: row["prompt"] for row in prompts}
    rows = [row for row in read_samples(folder) if asked.get(row["key"]) == row["prompt"]]
    if len(rows) < len(asked):
        raise MissingFileError(f"{folder} has {len(rows)} of {len(asked)} pictures of the prompts of this run")
    return {row["key"]: read_picture(folder / row["file"], mend=mend_sample()) for row in rows}


def _subject_share(prompts: Sequence[Mapping[str, Any]], pictures: Mapping[str, Image.Image]) -> float:
    hits = []
    for row in prompts:
        if row["key"].startswith(SUBJECT_KEY):
            seen = detect(pictures[row["key"]])
            hits.append(seen.positions == (row["position"],) and seen.background == row["background"])
    return sum(hits) / len(hits)


def _others_share(prompts: Sequence[Mapping[str, Any]], pictures: Mapping[str, Image.Image]) -> float:
    from toyworld.judge import Judge, Score

    rows = [row for row in prompts if row["key"].startswith(OTHER_KEY)]
    scenes = [Scene.from_json(json.dumps(row["scene"])) for row in rows]
    return Score.of(Judge.load().score_batch([pictures[row["key"]] for row in rows], scenes)).all


def _grid(prompts: Sequence[Mapping[str, Any]], pictures: Mapping[str, Mapping[str, Image.Image]]) -> Image.Image:
    """Return a named row of pictures for each folder, of the subject first and then of others, a prompt a column."""
    subjects = [row["key"] for row in prompts if row["key"].startswith(SUBJECT_KEY)][:GRID_SUBJECTS]
    others = [row["key"] for row in prompts if row["key"].startswith(OTHER_KEY)][: GRID_COLUMNS - len(subjects)]
    keys = [*subjects, *others]
    font = ImageFont.load_default(CELL_PIXELS // 8)
    margin = GAP_PIXELS + math.ceil(max(font.getlength(name) for name in pictures)) + GAP_PIXELS
    step = CELL_PIXELS + GAP_PIXELS
    grid = Image.new("RGB", (margin + step * len(keys), GAP_PIXELS + step * len(pictures)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (name, found) in enumerate(pictures.items()):
        top = GAP_PIXELS + step * row
        draw.text((GAP_PIXELS, top + CELL_PIXELS // 2), name, fill="black", font=font, anchor="lm")
        for column, key in enumerate(keys):
            cell = found[key].resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.LANCZOS)
            grid.paste(cell, (margin + step * column, top))
    return grid
