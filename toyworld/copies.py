"""Toy pictures, pictures somewhat like photographs, and copies of them as they spread: what duplicates are tried on."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image, ImageOps

from toyworld.render import render
from toyworld.scenes import POSITIONS, Scene, random_scene

MAX_CROP = 0.05  # of a side


@dataclass(frozen=True, kw_only=True)
class Planted:
    """An image file, the number of the original that it shows, and how it was made: `original`, or the copy's kind."""

    data: bytes
    original: int
    kind: str


def photo_likes(num: int, *, seed: int = 0, side: int = 192) -> Iterator[Image.Image]:
    """Yield pictures of noise on many scales, about 1/f, over a gradient, with soft blobs in front, of some colours."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        width = int(side * rng.choice([0.75, 1.0, 1.33, 1.5]))
        palette = rng.uniform(0, 255, (4, 3)).astype(np.float32)
        down, right = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, width), indexing="ij")
        slopes = rng.uniform(-1, 1, 2)
        ramp = slopes[0] * down + slopes[1] * right
        ramp = ((ramp - ramp.min()) / (np.ptp(ramp) + 1e-6)).astype(np.float32)[..., None]
        noise = _noise(side, width, rng)[..., None]
        picture = palette[0] + ramp * (palette[1] - palette[0])
        picture += noise * rng.uniform(0.25, 1.5) * (palette[2] - palette[3])
        for _ in range(rng.integers(2, 9)):
            blob = _blob(side, width, rng)[..., None]
            colour = rng.uniform(0, 255, 3).astype(np.float32)
            picture += blob * (colour + noise * rng.uniform(0, 60) - picture)
        yield Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _noise(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise whose octaves halve, float32 [height, width]."""
    total = np.zeros((height, width), np.float32)
    for octave in range(2, 8):
        cells = rng.standard_normal((2**octave, 2**octave), np.float32) / 2**octave
        total += cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
    return total


def _blob(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return how far an ellipse with a soft edge covers each pixel, float32 [height, width]."""
    middle = rng.uniform(0, 1, 2) * (width, height)
    axes = rng.uniform(0.04, 0.3, 2) * height
    shape = (middle.tolist(), (2 * axes).tolist(), float(rng.uniform(0, 180)))
    covered = cv2.ellipse(np.zeros((height, width), np.float32), shape, 1.0, cv2.FILLED)
    return cv2.GaussianBlur(covered, (0, 0), float(rng.uniform(0.5, 5)))


def toy_pictures(num: int, *, seed: int = 0, side: int = 128) -> Iterator[Image.Image]:
    """Yield pictures of scenes of the toy world that all differ, also as a mirror shows them."""
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    while len(seen) < num:
        scene = random_scene(rng)
        told = min(scene.to_json(), _mirrored_scene(scene).to_json())
        if told not in seen:
            seen.add(told)
            yield render(scene, side, side, rng=rng)


def _mirrored_scene(scene: Scene) -> Scene:
    there = {"left": "right", "right": "left"}
    moved = [replace(item, position=there.get(item.position, item.position)) for item in scene.objects]
    return replace(scene, objects=tuple(sorted(moved, key=lambda item: POSITIONS.index(item.position))))


def as_file(image: Image.Image, kind: str, *, quality: int = 90) -> bytes:
    """Return the bytes of an image as JPEG, WEBP or PNG."""
    data = io.BytesIO()
    image.save(data, kind, **({} if kind == "PNG" else {"quality": quality}))
    return data.getvalue()


def reencoded(image: Image.Image, rng: np.random.Generator) -> bytes:
    """Return it in another format or quality."""
    kind = str(rng.choice(["JPEG", "WEBP", "PNG"]))
    return as_file(image, kind, quality=int(rng.integers(50, 95)))


def resized(image: Image.Image, rng: np.random.Generator) -> bytes:
    """Return it smaller, by a filter of several."""
    part = rng.uniform(0.4, 0.95)
    size = (max(64, round(image.width * part)), max(64, round(image.height * part)))
    filters = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]
    return as_file(image.resize(size, filters[rng.integers(3)]), "JPEG", quality=int(rng.integers(70, 95)))


def cropped(image: Image.Image, rng: np.random.Generator) -> bytes:
    """Return it with up to `MAX_CROP` cut off each side."""
    left, top, right, bottom = rng.uniform(0, MAX_CROP, 4) * np.tile(image.size, 2)
    part = image.crop((round(left), round(top), image.width - round(right), image.height - round(bottom)))
    return as_file(part, "JPEG", quality=int(rng.integers(70, 95)))


def mirrored(image: Image.Image, rng: np.random.Generator) -> bytes:
    """Return it as a mirror shows it."""
    return as_file(ImageOps.mirror(image), "JPEG", quality=int(rng.integers(70, 95)))


COPIES: dict[str, Callable[[Image.Image, np.random.Generator], bytes]] = {
    "reencoded": reencoded,
    "resized": resized,
    "cropped": cropped,
    "mirrored": mirrored,
}


def plant(originals: Iterable[Image.Image], *, kinds: Sequence[str], seed: int = 0) -> list[Planted]:
    """Return originals as PNG, every other one with a copy of each kind, in an order drawn by chance."""
    rng = np.random.default_rng(seed)
    planted = []
    for number, image in enumerate(originals):
        planted.append(Planted(data=as_file(image, "PNG"), original=number, kind="original"))
        if number % 2 == 0:
            planted += [Planted(data=COPIES[kind](image, rng), original=number, kind=kind) for kind in kinds]
    return [planted[place] for place in rng.permutation(len(planted))]
