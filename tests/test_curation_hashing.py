"""Hashes of images: near for what is cropped, resized or stored anew, far for other colours of one arrangement."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from curation.hashing import THUMBNAIL_BYTES, exact_hash, mirrored, perceptual_hashes, thumbnail, view_hashes
from toyworld.render import render
from toyworld.scenes import Scene, SceneObject

RADIUS = 5


def picture(colour: str = "red", background: str = "cyan", *, side: int = 96, seed: int = 0) -> Image.Image:
    objects = (SceneObject("star", colour, "large", "left"), SceneObject("square", "blue", "small", "bottom"))
    return render(Scene(objects, background, "striped"), side, side, rng=np.random.default_rng(seed))


def hash_of(image: Image.Image) -> int:
    return int(perceptual_hashes(thumbnail(np.asarray(image))[None])[0])


def distance(first: int, second: int) -> int:
    return (first ^ second).bit_count()


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def test_stored_anew_or_resized_is_near_and_another_colour_is_far() -> None:
    whole = hash_of(picture())
    assert distance(whole, hash_of(as_jpeg(picture(), 50))) <= RADIUS
    assert distance(whole, hash_of(picture().resize((61, 61)))) <= RADIUS
    assert distance(whole, hash_of(picture("green"))) > RADIUS


@pytest.mark.parametrize("sides", [(0.05, 0, 0, 0), (0.05, 0.05, 0, 0), (0.05, 0.05, 0.05, 0.05), (0, 0.03, 0.05, 0)])
def test_a_crop_is_near_a_view_of_the_whole_or_a_view_of_it_is(sides: tuple[float, float, float, float]) -> None:
    image = picture(side=320)
    left, top, right, bottom = (round(320 * side) for side in sides)
    both = [image, image.crop((left, top, 320 - right, 320 - bottom))]
    views = view_hashes(np.stack([thumbnail(np.asarray(each)) for each in both]), crops=True)
    assert views.shape == (2, 16) and [int(of_one[0]) for of_one in views] == [hash_of(each) for each in both]
    found = [distance(int(view), int(views[1 - one, 0])) for one in (0, 1) for view in views[one]]
    assert min(found) <= RADIUS


def test_the_mirrored_thumbnail_is_that_of_the_mirrored_image() -> None:
    image = picture()
    expected = thumbnail(np.asarray(ImageOps.mirror(image)))
    found = mirrored(thumbnail(np.asarray(image))[None])[0]
    assert np.abs(expected.astype(int) - found).max() <= 1
    assert distance(hash_of(image), hash_of(ImageOps.mirror(image))) > RADIUS


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (24, 24), (1000, 9)])
def test_any_size_has_a_thumbnail(size: tuple[int, int]) -> None:
    small = thumbnail(np.asarray(Image.new("RGB", size, (250, 128, 3))))
    assert small.shape == (THUMBNAIL_BYTES,) and small.dtype == np.uint8
    assert len(set(small[:576].tolist())) == 1


def test_equal_bytes_alone_have_equal_exact_hashes() -> None:
    assert exact_hash(b"image") == exact_hash(b"image") != exact_hash(b"imagf")
    assert len(exact_hash(b"")) == 16
