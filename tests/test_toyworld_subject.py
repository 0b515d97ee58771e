"""The subject of DreamBooth in the toy world: its pictures, its detector against the truth, and the figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encoders.opening import open_codec
from toyworld.config import ToyworldConfig
from toyworld.detector import Sighting, detect
from toyworld.render import render
from toyworld.scenes import BACKGROUNDS, POSITIONS, SHAPES, Scene, SceneObject, random_scene
from toyworld.subject import COLOUR, SHAPE, TOKEN, subject_caption, subject_scenes, write_subject

NUM_PICTURES = 200
BAR = 0.97


def scenes_with_the_subject(rng: np.random.Generator) -> list[tuple[Scene, str]]:
    """Scenes of one to three objects, of which one is the subject; and where."""
    found = []
    for _ in range(NUM_PICTURES):
        scene = random_scene(rng)
        number = int(rng.integers(len(scene.objects)))
        item = scene.objects[number]
        objects = list(scene.objects)
        objects[number] = SceneObject(SHAPE, COLOUR, item.size, item.position)
        found.append((Scene(tuple(objects), scene.background, scene.pattern), item.position))
    return found


def scenes_in_its_colour(rng: np.random.Generator) -> list[Scene]:
    """What is most easily taken for the subject: half of the objects have its colour."""
    found = []
    for _ in range(NUM_PICTURES):
        scene = random_scene(rng)
        objects = [
            SceneObject(item.shape, COLOUR if rng.random() < 0.5 else item.colour, item.size, item.position)
            for item in scene.objects
        ]
        found.append(Scene(tuple(objects), scene.background, scene.pattern))
    return found


def through_vae(pictures: list[Image.Image]) -> list[Image.Image]:
    codec = open_codec("toyworld/weights/vae")
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    means, _ = codec.encode(pixels)
    return codec.decode(means)


@pytest.mark.parametrize("is_reconstructed", [False, True], ids=["rendered", "vae"])
def test_the_detector_finds_the_subject_and_nothing_else(is_reconstructed: bool) -> None:
    rng = np.random.default_rng(0)
    with_subject, without = scenes_with_the_subject(rng), scenes_in_its_colour(rng)
    pictures = [render(scene, 64, 64, rng=rng) for scene in (*(scene for scene, _ in with_subject), *without)]
    seen = [detect(picture) for picture in (through_vae(pictures) if is_reconstructed else pictures)]
    right = [place in sighting.positions for sighting, (_, place) in zip(seen, with_subject, strict=False)]
    wrong = [
        len(set(sighting.positions) - {place}) for sighting, (_, place) in zip(seen, with_subject, strict=False)
    ] + [len(sighting.positions) for sighting in seen[NUM_PICTURES:]]
    assert sum(right) / NUM_PICTURES >= BAR, "recall"
    assert sum(right) / (sum(right) + sum(wrong)) >= BAR, "precision"
    scenes = [*(scene for scene, _ in with_subject), *without]
    grounds = [
        (sighting.background, sighting.pattern) == (scene.background, scene.pattern)
        for sighting, scene in zip(seen, scenes, strict=True)
    ]
    assert sum(grounds) / len(grounds) >= BAR


def test_a_picture_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="64x48"):
        detect(Image.new("RGB", (64, 48)))


def test_few_images_have_every_place_and_background_and_a_caption_each(tmp_path: Path) -> None:
    config = ToyworldConfig(num_subject_images=6, num_subject_prompts=10, num_other_prompts=5, num_prior_prompts=4)
    counts = {
        "num_images": config.num_subject_images,
        "num_prompts": config.num_subject_prompts,
        "num_others": config.num_other_prompts,
        "num_prior": config.num_prior_prompts,
    }
    write_subject(tmp_path, seed=0, **counts)
    folder = tmp_path / "raw" / "subject"
    scenes = subject_scenes(6, np.random.default_rng([0, 0]))
    assert {scene.objects[0].position for scene in scenes} == set(POSITIONS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    for number, scene in enumerate(scenes):
        with Image.open(folder / f"{number:03d}.png") as picture:
            item = scene.objects[0]
            assert detect(picture) == Sighting((item.position,), scene.background, "plain")
        caption = (folder / f"{number:03d}.txt").read_text()
        assert TOKEN in caption and item.position in caption.replace("middle", "center") and scene.background in caption
    rows = [json.loads(line) for line in (tmp_path / "raw" / "prompts.jsonl").read_text().splitlines()]
    assert [row["key"].split("_")[0] for row in rows] == ["subject"] * 10 + ["other"] * 5
    assert all(TOKEN in row["prompt"] for row in rows[:10]) and not any(TOKEN in row["prompt"] for row in rows[10:])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_subject(tmp_path, seed=0, **counts)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_world_does_not_know_the_subject() -> None:
    assert SHAPE not in SHAPES
    caption = subject_caption(subject_scenes(1, np.random.default_rng(0))[0], np.random.default_rng(0))
    assert "star" not in caption and "blue" not in caption and "small" not in caption
