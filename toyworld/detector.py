"""Finds the subject of `toyworld.subject` in a picture, and says on which background it is; it has no weights.

The background is that of 24 which fits the pixels away from all anchors best. A pixel near an anchor is the subject's
if its colour is nearer to the subject's than to the background's; the subject is there if these pixels overlap with a
crescent of some size and place near the anchor by more than `MIN_OVERLAP` (intersection over union). Yellow shapes of
the world have 0.60 at most.
"""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from toyworld.render import ANCHORS, BACKGROUND_RGB, OBJECT_RGB, RADIUS_FRACTIONS, background_picture, outline
from toyworld.scenes import PATTERNS, POSITIONS
from toyworld.subject import COLOUR, SHAPE, SIDE_PIXELS

MIN_OVERLAP = 0.61
# P pixels of a crop's side; a crop is cut out around an anchor
CROP_PIXELS = 32
_REACH_PIXELS = 15.5  # from the anchor, beyond which pixels are another object's
_CLEAR_FRACTION = 0.25  # of the side: nearer to an anchor there may be an object
_MAX_COLOUR_DISTANCE = 90.0  # RGB; orange is 91 away
_SIZES = (0.9, 1.0, 1.1)  # of the two radii
_SHIFTS_PIXELS = (-3.0, -1.5, 0.0, 1.5, 3.0)
_SUPERSAMPLE = 3


@dataclass(frozen=True)
class Sighting:
    """What the detector sees: where the subject is, and the background's colour and pattern."""

    positions: tuple[str, ...]
    background: str
    pattern: str


def detect(image: Image.Image) -> Sighting:
    """Look at a square picture; others than of 64 pixels are made as large."""
    if image.width != image.height:
        raise ValueError(f"the picture is {image.width}x{image.height}, not square")
    small = image.convert("RGB").resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.float64)
    errors = np.square(pixels[_clear()] - _grounds()[:, _clear()]).mean(axis=(1, 2))  # [24]
    number = int(errors.argmin())
    background, pattern = list(BACKGROUND_RGB)[number // len(PATTERNS)], PATTERNS[number % len(PATTERNS)]
    found = [name for name in POSITIONS if overlap(pixels, _grounds()[number], name) > MIN_OVERLAP]
    return Sighting(tuple(found), background, pattern)


def overlap(pixels: np.ndarray, ground: np.ndarray, position: str) -> float:
    """Return the largest intersection over union of the subject's pixels at an anchor with a crescent, 0 to 1."""
    crop, behind = _crop(pixels, position), _crop(ground, position)
    to_subject = np.linalg.norm(crop - np.array(OBJECT_RGB[COLOUR]), axis=2)
    is_subject = (to_subject < np.linalg.norm(crop - behind, axis=2)) & (to_subject < _MAX_COLOUR_DISTANCE) & _near()
    both, either = (_crescents() & is_subject).sum(axis=(1, 2)), (_crescents() | is_subject).sum(axis=(1, 2))
    return float((both / either).max())


def _crop(pixels: np.ndarray, position: str) -> np.ndarray:
    x, y = (round(fraction * SIDE_PIXELS) for fraction in ANCHORS[position])
    padded = np.pad(pixels, ((CROP_PIXELS // 2,) * 2, (CROP_PIXELS // 2,) * 2, (0, 0)), mode="edge")
    return padded[y : y + CROP_PIXELS, x : x + CROP_PIXELS]


@functools.cache
def _grounds() -> np.ndarray:
    """Backgrounds without jitter, by colour and pattern, [24, 64, 64, 3]."""
    pictures = [background_picture(name, pattern, SIDE_PIXELS) for name in BACKGROUND_RGB for pattern in PATTERNS]
    return np.stack([np.asarray(picture, dtype=np.float64) for picture in pictures])


@functools.cache
def _clear() -> np.ndarray:
    rows, columns = np.mgrid[0:SIDE_PIXELS, 0:SIDE_PIXELS] + 0.5
    reach = _CLEAR_FRACTION * SIDE_PIXELS
    distances = [np.hypot(columns - x * SIDE_PIXELS, rows - y * SIDE_PIXELS) for x, y in ANCHORS.values()]
    return np.min(distances, axis=0) > reach


@functools.cache
def _near() -> np.ndarray:
    rows, columns = np.mgrid[0:CROP_PIXELS, 0:CROP_PIXELS] + 0.5
    return np.hypot(columns - CROP_PIXELS / 2, rows - CROP_PIXELS / 2) < _REACH_PIXELS


@functools.cache
def _crescents() -> np.ndarray:
    """Crescents of all sizes and places that count, bool [150, P, P]."""
    masks = []
    for radius in (fraction * size * SIDE_PIXELS for fraction in RADIUS_FRACTIONS.values() for size in _SIZES):
        for x in _SHIFTS_PIXELS:
            for y in _SHIFTS_PIXELS:
                mask = Image.new("L", (CROP_PIXELS * _SUPERSAMPLE, CROP_PIXELS * _SUPERSAMPLE), 0)
                middle = CROP_PIXELS / 2
                points = [
                    ((middle + x + dx * radius) * _SUPERSAMPLE, (middle + y + dy * radius) * _SUPERSAMPLE)
                    for dx, dy in outline(SHAPE)
                ]
                ImageDraw.Draw(mask).polygon(points, fill=255)
                masks.append((np.asarray(mask.reduce(_SUPERSAMPLE)) > 127) & _near())
    return np.stack(masks)
