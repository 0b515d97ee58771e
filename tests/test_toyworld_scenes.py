"""Scenes and their pictures: reproducible, within the world's rules, and drawn where they say."""

import itertools

import numpy as np
import pytest

from errors import UserError
from toyworld.render import ANCHORS, BACKGROUND_RGB, OBJECT_RGB, RADIUS_FRACTIONS, render
from toyworld.scenes import (
    BACKGROUNDS,
    COLOURS,
    NUM_CLASSES,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    class_label,
    class_name,
    random_scene,
)

SIZES_PIXELS = [(64, 64), (96, 64), (64, 128), (128, 128), (200, 120)]


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def test_same_seed_gives_the_same_scenes_and_pixels():
    first, second = (np.random.default_rng(7) for _ in range(2))
    for _ in range(5):
        scene, again = random_scene(first), random_scene(second)
        assert scene == again
        assert render(scene, 64, 64, rng=first).tobytes() == render(again, 64, 64, rng=second).tobytes()


def test_every_attribute_occurs_and_positions_are_distinct():
    drawn = scenes(2000)
    objects = [item for scene in drawn for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.size for item in objects} == set(SIZES)
    assert {item.position for item in objects} == set(POSITIONS)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {scene.pattern for scene in drawn} == set(PATTERNS)
    assert {len(scene.objects) for scene in drawn} == {1, 2, 3}
    for scene in drawn:
        places = [POSITIONS.index(item.position) for item in scene.objects]
        assert places == sorted(set(places))


def test_objects_never_overlap():
    for scene in scenes(2000, seed=1):
        for a, b in itertools.combinations(scene.objects, 2):
            distance = np.hypot(*np.subtract(ANCHORS[a.position], ANCHORS[b.position]))
            assert RADIUS_FRACTIONS[a.size] + RADIUS_FRACTIONS[b.size] < distance


def test_json_round_trips_and_unknown_words_are_named():
    for scene in scenes(50):
        assert Scene.from_json(scene.to_json()) == scene
    text = scenes(1)[0].to_json().replace('"pattern": "', '"pattern": "un')
    with pytest.raises(UserError, match=r"scene pattern 'un.*' is not one of plain"):
        Scene.from_json(text)


def test_num_objects_is_kept_and_bounded():
    rng = np.random.default_rng(0)
    assert {len(random_scene(rng, num_objects=2).objects) for _ in range(20)} == {2}
    with pytest.raises(ValueError, match="num_objects 4 is not between 1 and 3"):
        random_scene(rng, num_objects=4)


def test_classes_number_shape_and_colour():
    def single(shape: str, colour: str) -> Scene:
        return Scene((SceneObject(shape, colour, "small", "top"),), "white", "plain")

    labels = {class_label(single(shape, colour)): f"{colour} {shape}" for shape in SHAPES for colour in COLOURS}
    assert sorted(labels) == list(range(NUM_CLASSES)) == list(range(24))
    assert all(class_name(label) == name for label, name in labels.items())
    with pytest.raises(ValueError, match="2 objects"):
        class_label(Scene(single("star", "red").objects * 2, "white", "plain"))


@pytest.mark.parametrize(("width", "height"), SIZES_PIXELS)
def test_objects_are_drawn_at_their_anchors_in_their_colour(width: int, height: int):
    rng = np.random.default_rng(3)
    for scene in scenes(40, seed=2):
        image = render(scene, width, height, rng=rng)
        assert (image.width, image.height, image.mode) == (width, height, "RGB")
        occupied = {item.position: item.colour for item in scene.objects}
        for position, (x, y) in ANCHORS.items():
            pixel = np.array(image.getpixel((round(x * width), round(y * height))), dtype=float)
            if position in occupied:
                assert np.abs(pixel - OBJECT_RGB[occupied[position]]).max() <= 12
            elif scene.pattern == "plain":
                assert np.abs(pixel - BACKGROUND_RGB[scene.background]).max() <= 12


def test_objects_are_at_least_nine_pixels_in_radius_at_64():
    assert min(RADIUS_FRACTIONS.values()) * 64 >= 8.9
