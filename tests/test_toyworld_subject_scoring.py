"""What DreamBooth's samples before and after score: pictures that are known to be right or wrong, counted."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from errors import MissingFileError
from pipelines.store.checkpoints import ADAPTER, BASE, LATEST, MODEL, TRAINER, TRAINER_KEYS, WEIGHTS
from toyworld.render import render
from toyworld.scenes import Scene, SceneObject
from toyworld.subject import subject_scene, write_subject
from toyworld.subject_scoring import CELL_PIXELS, score_subject, subject_folders

NUM_SUBJECTS, NUM_OTHERS = 10, 12
COUNTS = {"num_images": 5, "num_prompts": NUM_SUBJECTS, "num_others": NUM_OTHERS, "num_prior": 1}
BLANK = Image.new("RGB", (64, 64), (255, 255, 255))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_subject(tmp_path, seed=0, **COUNTS)
    return tmp_path


def prompts_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "raw" / "prompts.jsonl").read_text().splitlines()]


def right_picture(row: dict) -> Image.Image:
    if "scene" in row:
        scene = Scene.from_json(json.dumps(row["scene"]))
    else:
        scene = subject_scene(row["position"], row["background"], size="large")
    return render(scene, 64, 64, rng=np.random.default_rng(0))


def draw(folder: Path, rows: list[dict], pictures: list[Image.Image]) -> None:
    """Write samples as `make sample` does."""
    folder.mkdir(parents=True)
    for row, picture in zip(rows, pictures, strict=True):
        picture.save(folder / f"{row['key']}.png")
    table = [{"key": row["key"], "prompt": row["prompt"], "file": f"{row['key']}.png"} for row in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / "samples.parquet")


def save_weights(stage: Path, kind: str, shapes: list[tuple[int, ...]]) -> None:
    """Write the weights of a checkpoint, and what says whose they are."""
    path = stage / "step-1" / WEIGHTS[kind]
    path.parent.mkdir(parents=True)
    save_file({f"layer.{number}": torch.zeros(shape) for number, shape in enumerate(shapes)}, path)
    trainer = {name: (kinds[0] if isinstance(kinds, tuple) else kinds)() for name, kinds in TRAINER_KEYS.items()}
    trainer |= {"stage": stage.name} | ({BASE: {}} if kind == ADAPTER else {})
    config = path.parent / ("adapter_config.json" if kind == ADAPTER else "config.json")
    for file, content in ((config, {}), (stage / "step-1" / TRAINER, trainer)):
        file.write_text(json.dumps(content))
    (stage / LATEST).write_text("step-1")


def test_a_subject_counts_where_it_should_be_alone_and_others_by_the_judge(run: Path) -> None:
    rows = prompts_of(run)
    folders = subject_folders(run)
    star = [
        render(
            Scene((SceneObject("star", "yellow", "large", row["position"]),), row["background"], "plain"),
            64,
            64,
            rng=np.random.default_rng(0),
        )
        for row in rows[:NUM_SUBJECTS]
    ]
    right = [right_picture(row) for row in rows]
    wrong_ground, wrong_place = dict(rows[0]), dict(rows[1])
    wrong_ground["background"] = next(
        row["background"] for row in rows[1:] if row["background"] != rows[0]["background"]
    )
    wrong_place["position"] = next(row["position"] for row in rows[2:] if row["position"] != rows[1]["position"])
    after = [right_picture(wrong_ground), right_picture(wrong_place), BLANK, *right[3:]]
    objects = [len(row["scene"]["objects"]) for row in rows[NUM_SUBJECTS:]]
    after[-1] = BLANK.copy()
    draw(folders["before"], rows, [*star, *right[NUM_SUBJECTS:]])
    draw(folders["full"], rows, after)
    figures = score_subject(folders, run)
    assert figures["subject_before"] == 0.0, "a star is no crescent"
    assert figures["subject"] == pytest.approx((NUM_SUBJECTS - 3) / NUM_SUBJECTS)
    assert figures["others_before"] == 1.0
    assert figures["others_lost"] == pytest.approx(objects[-1] / sum(objects))
    assert not any("lora" in name for name in figures)
    assert json.loads((run / "summary.json").read_text())["dreambooth"] == {
        name: round(value, 4) for name, value in figures.items()
    }
    with Image.open(run / "dreambooth.png") as grid:
        assert grid.height > 2 * CELL_PIXELS and grid.width > 12 * CELL_PIXELS


def test_adapters_are_scored_beside_all_weights_and_counted(run: Path) -> None:
    rows = prompts_of(run)
    right = [right_picture(row) for row in rows]
    draw(run / "samples" / "dreambooth-lora", rows, [BLANK, *right[1:]])
    folders = subject_folders(run)
    draw(folders["before"], rows, right)
    draw(folders["full"], rows, right)
    save_weights(run / "training" / "dreambooth", MODEL, [(10, 20), (50,)])
    with pytest.raises(
        MissingFileError,
        match=r"training/dreambooth-lora has no checkpoint: `make train STAGE=dreambooth-lora` trains it",
    ):
        score_subject(folders, run)
    save_weights(run / "training" / "dreambooth-lora", ADAPTER, [(2, 5), (5, 2), (5,)])
    figures = score_subject(folders, run)
    assert figures["lora_fraction_of_weights"] == 25 / 250
    assert (
        figures["subject_lora"] == pytest.approx((NUM_SUBJECTS - 1) / NUM_SUBJECTS) and figures["others_lost_lora"] == 0
    )


def test_samples_of_other_prompts_are_not_scored(run: Path) -> None:
    rows = prompts_of(run)
    folders = subject_folders(run)
    right = [right_picture(row) for row in rows]
    draw(folders["before"], rows, right)
    other = [row | {"prompt": "another"} if row is rows[3] else row for row in rows]
    draw(folders["full"], other, right)
    with pytest.raises(MissingFileError, match=rf"samples/dreambooth has {len(rows) - 1} of {len(rows)} pictures"):
        score_subject(folders, run)
