"""What is spoilt on purpose is spoilt in the way that is named, and in no other."""

import numpy as np
import pytest

from errors import UserError
from toyworld.render import render
from toyworld.scenes import random_scene
from toyworld.spoiling import CAPTION_KINDS, PICTURE_KINDS, spoil_caption, spoil_picture
from toyworld.wording import caption_hits, dense_caption, describe, parse_caption


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_a_spoilt_picture_keeps_its_size_is_seen_to_be_another_and_comes_again(kind: str) -> None:
    rng = np.random.default_rng(31)
    for width, height in ((64, 64), (128, 64), (80, 112)) * 10:
        pixels = np.asarray(render(random_scene(rng), width, height, rng=rng))
        before, seed = pixels.copy(), int(rng.integers(2**32))
        spoilt = spoil_picture(pixels, kind, rng=np.random.default_rng(seed))
        assert spoilt.shape == (height, width, 3) and spoilt.dtype == np.uint8
        assert np.array_equal(pixels, before)
        assert np.array_equal(spoilt, spoil_picture(pixels, kind, rng=np.random.default_rng(seed)))
        assert abs(spoilt.astype(float) - pixels).mean() > 0.5


@pytest.mark.parametrize("kind", CAPTION_KINDS)
@pytest.mark.parametrize("say", ["dense", "canonical"])
def test_a_spoilt_caption_is_wrong_in_one_way(kind: str, say: str) -> None:
    rng = np.random.default_rng(32)
    for _ in range(200):
        scene = random_scene(rng)
        caption = dense_caption(scene, rng) if say == "dense" else describe(scene)
        seed = int(rng.integers(2**32))
        spoilt = spoil_caption(caption, kind, scene=scene, rng=np.random.default_rng(seed))
        assert spoilt == spoil_caption(caption, kind, scene=scene, rng=np.random.default_rng(seed))
        assert spoilt != caption
        hits, num_named = caption_hits(scene, spoilt), len(parse_caption(spoilt))
        if kind.startswith("wrong_"):
            assert sum(hits) == len(hits) - 1 and num_named == len(scene.objects), spoilt
            assert spoilt[0] == caption[0]
        elif kind == "false_object":
            assert all(hits) and num_named == len(hits) + 1, spoilt
        elif kind == "loop":
            last = caption.split(". ")[-1]
            assert spoilt.startswith(caption) and spoilt.count(last) >= 6
        elif kind == "swapped":
            assert parse_caption(spoilt)
        else:
            assert num_named == 0


def test_what_cannot_be_spoilt_so_is_refused() -> None:
    rng = np.random.default_rng(33)
    scene = random_scene(rng)
    with pytest.raises(UserError, match=r"'fog' is no way to spoil a picture: those are noise, blur, "):
        spoil_picture(np.zeros((8, 8, 3), np.uint8), "fog", rng=rng)
    with pytest.raises(UserError, match=r"'noise' is no way to spoil a caption: those are swapped, "):
        spoil_caption(describe(scene), "noise", scene=scene, rng=rng)
    with pytest.raises(UserError, match=r"'sale' names no object of the toy world"):
        spoil_caption("sale", "wrong_place", scene=scene, rng=rng)
