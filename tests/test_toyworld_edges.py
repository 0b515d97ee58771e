"""What the demo of control learns from and is led by: texts of colours alone, and edges without any."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.recipe import load_recipe
from toyworld.edges import ALONE, CANNY, LED, SAMPLES_PER_SHARD, colours_caption, edges_scene, write_edges
from toyworld.scenes import COLOURS, Scene, SceneObject
from toyworld.wording import dense_caption
from toyworld.world import is_held_out

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "toyworld-control.toml"
# What dense captions say and these may not: words of shapes, sizes and places.
SAID_OF_SHAPE = {"circle", "disc", "square", "box", "triangle", "star", "small", "little", "large", "big"}
SAID_OF_PLACE = {"top", "upper", "left", "center", "middle", "right", "bottom", "lower", "edge"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("edges")
    write_edges(run, seed=0, num_images=SAMPLES_PER_SHARD + 10, num_prompts=20)
    return run / "raw"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pictures_of(raw: Path) -> dict[str, tuple[Image.Image, str]]:
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted((raw / "scenes").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[suffix] = file.read()
    return {key: (Image.open(io.BytesIO(of["jpg"])), of["txt"].decode()) for key, of in found.items()}


def test_a_caption_says_how_many_and_their_colour_and_nothing_of_shape_or_place() -> None:
    rng = np.random.default_rng(0)
    for number in range(200):
        scene = edges_scene(rng, held_out=number % 2 == 0)
        words = set(colours_caption(scene).lower().replace(".", "").split())
        assert not words & (SAID_OF_SHAPE | SAID_OF_PLACE)
        assert words & set(COLOURS) == {item.colour for item in scene.objects}
        assert scene.background in words
        assert set(dense_caption(scene, rng).lower().replace(".", "").split()) & SAID_OF_SHAPE, "as the words are known"
    items = [SceneObject("star", "red", "small", place) for place in ("top", "left")]
    assert colours_caption(Scene((items[0],), "pink", "plain")) == (
        "The image features a red shape. The background is plain pink."
    )
    assert colours_caption(Scene(tuple(items), "cyan", "plain")).startswith("The image features two red shapes.")


def test_edges_are_of_arrangements_that_no_picture_to_learn_from_has(raw: Path) -> None:
    for row in rows_of(raw / LED):
        scene = Scene.from_json(json.dumps(row["scene"]))
        assert is_held_out(scene) and scene.pattern == "plain" and row["prompt"] == colours_caption(scene)
    rng = np.random.default_rng(1)
    assert not any(is_held_out(edges_scene(rng, held_out=False)) for _ in range(50))


def test_edges_are_white_on_black_and_prompts_alone_lack_them_and_nothing_else(raw: Path) -> None:
    led, alone = rows_of(raw / LED), rows_of(raw / ALONE)
    assert [row | {"control": at["control"]} for row, at in zip(alone, led, strict=True)] == led
    assert not any("control" in row for row in alone)
    for row in led:
        with Image.open(raw / row["control"]) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (64, 64, 3) and set(np.unique(pixels)) == {0, 255}
        assert (pixels == pixels[..., :1]).all(), "no colours"


def test_shards_have_a_text_beside_each_picture_and_stay_as_they_are(raw: Path) -> None:
    pictures = pictures_of(raw)
    assert len(pictures) == SAMPLES_PER_SHARD + 10 and sorted(pictures) == list(pictures)
    for picture, text in list(pictures.values())[::50]:
        assert picture.size == (64, 64) and text.startswith("The image features")
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    write_edges(raw.parent, seed=0, num_images=SAMPLES_PER_SHARD + 10, num_prompts=20)
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == before


def test_edges_to_draw_by_are_those_that_the_recipe_learns_from() -> None:
    features = load_recipe(RECIPE).tables["features"]
    assert features["control"]["families"] == {"control-canny": CANNY}
