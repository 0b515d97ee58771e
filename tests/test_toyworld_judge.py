"""The judge: right on clean pictures and through the VAE, at every size, and not fooled by a wrong scene."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from toyworld.judge import WEIGHTS, Judge, Score, Verdict
from toyworld.render import render
from toyworld.scenes import COLOURS, POSITIONS, SHAPES, Scene, random_scene
from toyworld.zoo import vae as zoo_vae

VAE_WEIGHTS = WEIGHTS.parent / "vae"
NUM_SCENES = 150


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def pictures(count: int, *, width: int, height: int, seed: int) -> tuple[list[Scene], list[Image.Image]]:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    return scenes, [render(scene, width, height, rng=rng) for scene in scenes]


def through_vae(images: list[Image.Image]) -> list[Image.Image]:
    vae = zoo_vae.load(VAE_WEIGHTS)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with torch.no_grad():
        decoded = zoo_vae.decode(vae, zoo_vae.encode(vae, pixels.float() / 127.5 - 1).mode()).clamp(-1, 1)
    return [Image.fromarray(p) for p in ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]


def assert_at_least(score: Score, bar: float) -> None:
    assert min(score.position, score.colour, score.shape) >= bar, score
    assert score.extra <= 1 - bar, score


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 96), (128, 64), (72, 144), (256, 256)])
def test_clean_pictures_reach_99_percent(judge: Judge, width: int, height: int):
    scenes, images = pictures(NUM_SCENES, width=width, height=height, seed=11)
    assert_at_least(Score.of(judge.score_batch(images, scenes)), 0.99)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 128), (64, 128)])
def test_pictures_through_the_vae_reach_97_percent(judge: Judge, width: int, height: int):
    scenes, images = pictures(NUM_SCENES, width=width, height=height, seed=12)
    assert_at_least(Score.of(judge.score_batch(through_vae(images), scenes)), 0.97)


def other(word: str, words: tuple[str, ...]) -> str:
    return words[(words.index(word) + 1) % len(words)]


def test_a_wrong_scene_is_found_out(judge: Judge):
    scenes, images = pictures(40, width=64, height=64, seed=13)
    for scene, image in zip(scenes, images, strict=True):
        item, *rest = scene.objects
        wrong_colour = Scene((replace(item, colour=other(item.colour, COLOURS)), *rest), "white", "plain")
        hit = judge.score(image, wrong_colour).hits[0]
        assert (hit.has_position, hit.has_colour, hit.has_shape, hit.is_right) == (True, False, True, False)
        wrong_shape = Scene((replace(item, shape=other(item.shape, SHAPES)), *rest), "white", "plain")
        hit = judge.score(image, wrong_shape).hits[0]
        assert (hit.has_position, hit.has_colour, hit.has_shape, hit.is_right) == (True, True, False, False)


def test_missing_and_extra_objects_are_counted(judge: Judge):
    scenes, images = pictures(40, width=64, height=64, seed=14)
    for scene, image in zip(scenes, images, strict=True):
        free = next(p for p in POSITIONS if p not in {o.position for o in scene.objects})
        moved = Scene((replace(scene.objects[0], position=free), *scene.objects[1:]), "white", "plain")
        verdict = judge.score(image, moved)
        assert not verdict.hits[0].has_position
        assert verdict.num_extra == 1
        assert not verdict.is_right


def test_noise_is_no_scene(judge: Judge):
    rng = np.random.default_rng(15)
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    assert judge.score(gray, Scene((), "gray", "plain")) == Verdict((), num_extra=0)
    scenes, _ = pictures(50, width=64, height=64, seed=16)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in scenes]
    assert Score.of(judge.score_batch(noise, scenes)).all < 0.25


def test_batches_equal_single_pictures_and_must_match(judge: Judge):
    scenes, images = pictures(6, width=80, height=64, seed=17)
    assert judge.score_batch(images, scenes) == [judge.score(i, s) for i, s in zip(images, scenes, strict=True)]
    with pytest.raises(ValueError, match="6 images but 5 scenes"):
        judge.score_batch(images, scenes[:5])
    with pytest.raises(ValueError, match="no objects"):
        Score.of([])
