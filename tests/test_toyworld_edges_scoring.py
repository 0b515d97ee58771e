"""How edges and prompts are followed: pictures that are known to be right or wrong, counted."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from errors import MissingFileError
from pipelines.recipe import load_recipe
from pipelines.store.summary import update_summary
from tests.conftest import REPOSITORY
from toyworld.edges import LED, write_edges
from toyworld.edges_scoring import CELL_PIXELS, GRID_COLUMNS, GRID_NAME, edges_folders, score_edges
from toyworld.render import render
from toyworld.report import write_report
from toyworld.scenes import COLOURS, POSITIONS, SHAPES, Scene, SceneObject

NUM_PROMPTS = 12


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_edges(tmp_path, seed=0, num_images=1, num_prompts=NUM_PROMPTS)
    return tmp_path


def scenes_of(run: Path) -> tuple[list[dict], list[Scene]]:
    rows = [json.loads(line) for line in (run / "raw" / LED).read_text().splitlines()]
    return rows, [Scene.from_json(json.dumps(row["scene"])) for row in rows]


def draw(folder: Path, rows: list[dict], scenes: list[Scene]) -> None:
    """Write samples as `make sample` does."""
    folder.mkdir(parents=True)
    table = []
    for row, scene in zip(rows, scenes, strict=True):
        render(scene, 64, 64, rng=np.random.default_rng(0)).save(folder / f"{row['key']}.png")
        table.append({"key": row["key"], "prompt": row["prompt"], "file": f"{row['key']}.png"})
    pq.write_table(pa.Table.from_pylist(table), folder / "samples.parquet")


def changed(scene: Scene, **others: str) -> Scene:
    """The scene with another first object."""
    fields = {**scene.objects[0].__dict__, **others}
    return Scene((SceneObject(**fields), *scene.objects[1:]), scene.background, scene.pattern)


def another(known: tuple[str, ...], word: str) -> str:
    return next(other for other in known if other != word)


def test_shapes_and_places_count_by_the_edges_and_colours_by_the_prompts(run: Path) -> None:
    rows, scenes = scenes_of(run)
    count = sum(len(scene.objects) for scene in scenes)
    drawn = list(scenes)
    drawn[0] = changed(scenes[0], shape=another(SHAPES, scenes[0].objects[0].shape))
    drawn[1] = changed(scenes[1], colour=another(COLOURS, scenes[1].objects[0].colour))
    taken = {item.position for item in scenes[2].objects}
    drawn[2] = changed(scenes[2], position=next(place for place in POSITIONS if place not in taken))
    folders = edges_folders(run)
    draw(folders["led"], rows, drawn)
    draw(folders["alone"], rows, [changed(scene, shape=another(SHAPES, scene.objects[0].shape)) for scene in scenes])
    figures = score_edges(folders, run)
    assert figures["shape"] == pytest.approx(1 - 2 / count), "a wrong shape, and one elsewhere"
    assert figures["position"] == pytest.approx(1 - 1 / count)
    assert figures["colour"] == pytest.approx(1 - 2 / count), "a wrong colour, and one elsewhere"
    assert figures["extra"] == pytest.approx(1 / NUM_PROMPTS)
    assert figures["shape_without_control"] == pytest.approx(1 - NUM_PROMPTS / count)
    assert json.loads((run / "summary.json").read_text())["control"] == {
        name: round(value, 4) for name, value in figures.items()
    }
    with Image.open(run / GRID_NAME) as grid:
        assert grid.width > GRID_COLUMNS * CELL_PIXELS and grid.height > 3 * CELL_PIXELS


def test_the_page_has_what_was_followed(run: Path) -> None:
    for name, value in {"position": 1.0, "colour": 0.986, "shape": 0.99, "extra": 0.25}.items():
        update_summary(run, f"control.{name}", value)
    update_summary(run, "control.shape_without_control", 0.045)
    page = write_report(load_recipe(REPOSITORY / "recipes" / "toyworld-control.toml"), run).read_text()
    scores = page[page.index('id="scores"') :]
    assert [scores.count(text) for text in (">100.0%", ">98.6%", ">99.0%", ">0.25<", ">4.5%")] == [1] * 5
    assert "make judge" not in scores and "left: 95.0%" in scores


def test_samples_without_control_are_asked_for(run: Path) -> None:
    rows, scenes = scenes_of(run)
    folders = edges_folders(run)
    draw(folders["led"], rows, scenes)
    with pytest.raises(MissingFileError, match="samples/alone has no samples: `make sample STAGE=alone` draws them"):
        score_edges(folders, run)


def test_samples_of_other_prompts_are_not_scored(run: Path) -> None:
    rows, scenes = scenes_of(run)
    folders = edges_folders(run)
    draw(folders["led"], [row | {"prompt": "another"} if row is rows[3] else row for row in rows], scenes)
    draw(folders["alone"], rows, scenes)
    with pytest.raises(MissingFileError, match=rf"samples/control has {NUM_PROMPTS - 1} of {NUM_PROMPTS} pictures"):
        score_edges(folders, run)
