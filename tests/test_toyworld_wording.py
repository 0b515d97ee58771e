"""What is said of a scene: descriptions and dense captions tell all of it, alt texts little and often wrong."""

from collections import Counter

import numpy as np
import pytest

from toyworld.scenes import Scene, SceneObject, random_scene
from toyworld.wording import (
    ObjectMention,
    alt_text,
    caption_hits,
    dense_caption,
    describe,
    parse_background,
    parse_caption,
)


def truth(scene: Scene) -> list[ObjectMention]:
    return [ObjectMention(o.shape, o.colour, o.size, o.position) for o in scene.objects]


def test_descriptions_and_dense_captions_say_everything():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scene = random_scene(rng)
        for text in (describe(scene), dense_caption(scene, rng)):
            assert parse_caption(text) == truth(scene), text
            assert parse_background(text) == (scene.background, scene.pattern), text
            assert all(caption_hits(scene, text))


def test_describe_is_canonical():
    scene = Scene(
        (SceneObject("circle", "red", "large", "left"), SceneObject("star", "orange", "small", "bottom")),
        "white",
        "plain",
    )
    expected = "A large red circle on the left and a small orange star at the bottom, on a plain white background."
    assert describe(scene) == expected


def test_dense_captions_vary_in_words_and_length():
    rng = np.random.default_rng(1)
    scene = random_scene(rng, num_objects=2)
    assert len({dense_caption(scene, rng) for _ in range(50)}) > 15
    texts = [dense_caption(random_scene(rng), rng) for _ in range(1000)]
    num_words = np.array([len(text.split()) for text in texts])
    assert num_words.min() < 16
    assert num_words.max() > 50
    assert num_words.std() > 7
    is_boilerplate = np.mean([text.startswith("The image features") for text in texts])
    assert 0.05 < is_boilerplate < 0.5


def test_alt_texts_are_short_partial_and_often_wrong():
    rng = np.random.default_rng(2)
    scenes = [random_scene(rng) for _ in range(3000)]
    texts = [alt_text(scene, rng) for scene in scenes]
    mentions = [parse_caption(text) for text in texts]
    assert max(len(found) for found in mentions) <= 1
    assert all(m.position is None for found in mentions for m in found)
    assert np.mean([len(text.split()) for text in texts]) < 8
    named = [(s, found[0]) for s, found in zip(scenes, mentions, strict=True) if found and found[0].colour]
    is_true = [(m.shape, m.colour) in {(o.shape, o.colour) for o in s.objects} for s, m in named]
    assert 0.2 < 1 - np.mean(is_true) < 0.6
    assert any(not text.isascii() for text in texts)


def test_alt_texts_have_a_long_tail_of_words():
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(1500)]
    raw = Counter(word for scene in scenes for word in alt_text(scene, rng).lower().split())
    dense = Counter(word.strip(".,") for scene in scenes for word in dense_caption(scene, rng).lower().split())

    def valid(counts: Counter[str]) -> float:
        return float(np.mean([n > 10 for n in counts.values()]))

    assert len(raw) > 5 * len(dense)
    assert valid(dense) > 5 * valid(raw)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("A cactus in the Sahara desert", []),
        ("red circle", [ObjectMention("circle", "red", None, None)]),
        ("two blue stars in the upper part", [ObjectMention("star", "blue", None, "top")]),
        (
            "In the centre sits a tiny bright green box. To the left, a big disc",
            [ObjectMention("square", "green", "small", "center"), ObjectMention("circle", None, "large", "left")],
        ),
        (
            "a star at the bottom and a yellow triangle",
            [ObjectMention("star", None, None, "bottom"), ObjectMention("triangle", "yellow", None, None)],
        ),
        ("On the right is a red star, and at the top a blue star", [
            ObjectMention("star", "red", None, "right"), ObjectMention("star", "blue", None, "top"),
        ]),
    ],
)  # fmt: skip
def test_parse_reads_free_text(text: str, expected: list[ObjectMention]):
    assert parse_caption(text) == expected


def test_caption_hits_need_shape_colour_and_position():
    star, square = SceneObject("star", "red", "small", "top"), SceneObject("square", "blue", "small", "left")
    scene = Scene((star, square), "black", "plain")
    assert caption_hits(scene, "A red star at the top and a blue square on the right.") == [True, False]
    assert caption_hits(scene, "A red square at the top and a blue star on the left.") == [False, False]


def test_background_of_other_texts():
    assert parse_background("a red star") == (None, None)
    assert parse_background("a red star on a pink background") == ("pink", None)
    assert parse_background("The background is brown with small dots.") == ("brown", "dotted")
