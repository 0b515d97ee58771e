"""How well a control branch is followed: shapes and places against the edges, colours against the prompts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_file
from pipelines.store.png_files import read_picture
from pipelines.store.state_files import read_records
from pipelines.store.summary import update_summary
from toyworld.edges import LED
from toyworld.mending import mend_world
from toyworld.scenes import Scene
from toyworld.subject_scoring import read_pictures

log = get_logger("toyworld")

GRID_COLUMNS, GRID_NAME = 10, "control.png"
# What the demo aims at, of the objects of all scenes whose edges lead.
LED_TARGETS = {"position": 0.97, "colour": 0.95, "shape": 0.97}
CELL_PIXELS, GAP_PIXELS, FONT_PIXELS = 112, 6, 11


def edges_folders(run: Path) -> dict[str, Path]:
    """Return where a run's samples lie: led by the edges, and of the same prompts and noise in its run `alone`."""
    return {"led": run / "samples" / "control", "alone": run / "alone" / "samples" / "alone"}


def score_edges(folders: Mapping[str, Path], run: Path) -> dict[str, float]:
    """Score folders of samples, `led` and `alone`, against the scenes whose edges led; write them to the run's summary.

    Of all objects of these scenes, the share at whose place there is one, that has the right shape there, and that has
    the colour of the prompt there; how many objects a picture has where there should be none; and the share of right
    shapes without control.

    Raises:
        MissingFileError: there are no prompts, or samples of either kind.
    """
    from toyworld.judge import Judge, Score

    prompts = read_records(run / "raw" / LED, mend=mend_world(), keys=("key", "prompt", "scene", "control"))
    pictures = {name: read_pictures(folder, prompts) for name, folder in folders.items()}
    scenes = [Scene.from_json(json.dumps(row["scene"])) for row in prompts]
    judge = Judge.load()
    led, alone = (
        Score.of(judge.score_batch([pictures[name][row["key"]] for row in prompts], scenes))
        for name in ("led", "alone")
    )
    figures = {
        "shape": led.shape,
        "position": led.position,
        "colour": led.colour,
        "extra": led.extra,
        "shape_without_control": alone.shape,
    }
    for name, value in figures.items():
        update_summary(run, f"control.{name}", round(value, 4))
    edges = {row["key"]: read_picture(run / "raw" / row["control"], mend=mend_world()) for row in prompts}
    grid = run / GRID_NAME
    with atomic_file(grid) as path:
        _grid(prompts[:GRID_COLUMNS], {"edges": edges, **pictures}).save(path, format="PNG")
    log.info(f"{grid}: {', '.join(f'{name} {value:.1%}' for name, value in figures.items())}")
    return figures


def _grid(prompts: Sequence[Mapping[str, Any]], pictures: Mapping[str, Mapping[str, Image.Image]]) -> Image.Image:
    """Return a named row of pictures for each kind, a prompt a column, and the prompts below."""
    font = ImageFont.load_default(FONT_PIXELS)
    texts = [_wrap(row["prompt"], font) for row in prompts]
    margin = GAP_PIXELS + math.ceil(max(font.getlength(name) for name in pictures)) + GAP_PIXELS
    step = CELL_PIXELS + GAP_PIXELS
    text_top = GAP_PIXELS + step * len(pictures)
    text_height = max(len(lines) for lines in texts) * (FONT_PIXELS + 3)
    grid = Image.new("RGB", (margin + step * len(prompts), text_top + text_height + GAP_PIXELS), "white")
    draw = ImageDraw.Draw(grid)
    for row, (name, found) in enumerate(pictures.items()):
        top = GAP_PIXELS + step * row
        draw.text((GAP_PIXELS, top + CELL_PIXELS // 2), name, fill="black", font=font, anchor="lm")
        for column, prompt in enumerate(prompts):
            cell = found[prompt["key"]].convert("RGB").resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.LANCZOS)
            grid.paste(cell, (margin + step * column, top))
    for column, lines in enumerate(texts):
        draw.multiline_text((margin + step * column, text_top), "\n".join(lines), fill="black", font=font, spacing=3)
    return grid


def _wrap(text: str, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > CELL_PIXELS:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
