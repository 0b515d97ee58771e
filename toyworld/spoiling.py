"""Ways to spoil a picture or a caption of the toy world, as the web and a captioner spoil theirs, with the truth known.

What is spoilt on purpose shows whether a score finds it, and what a model pays for having learnt from it.
"""

import io
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter

from errors import UserError
from toyworld.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, random_scene
from toyworld.wording import PLACES, SHAPE_NOUNS, dense_caption, describe

# H W pixels

_BLACK, _GREY, _WHITE = 0, 128, 255
_JPEG_PIXELS = 48  # of the shorter side, whatever the picture's size: its blocks must be seen at every one


def spoil_picture(pixels: np.ndarray, kind: str, *, rng: np.random.Generator) -> np.ndarray:
    """Return a picture, uint8 [H, W, 3], spoilt in one of `PICTURE_KINDS`; its size stays.

    Raises:
        UserError: there is no such kind.
    """
    _require_kind(kind, PICTURE_KINDS, noun="picture")
    return _PICTURES[kind](pixels, rng)


def spoil_caption(caption: str, kind: str, *, scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of a scene spoilt in one of `CAPTION_KINDS`; its words are of `dense_caption` or `describe`.

    `swapped` is true of another scene; the wrong ones say one thing of one object that is not so, and `false_object`
    says everything and one object more; `loop`, `refusal` and `boilerplate` are what captioners write when they fail.

    Raises:
        UserError: there is no such kind, or the caption names nothing that could be made wrong.
    """
    _require_kind(kind, CAPTION_KINDS, noun="caption")
    return _CAPTIONS[kind](caption, scene, rng)


def _require_kind(kind: str, known: Sequence[str], *, noun: str) -> None:
    if kind not in known:
        raise UserError(f"{kind!r} is no way to spoil a {noun}: those are {', '.join(known)}")


# Pictures


def _add_noise(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = pixels + rng.normal(scale=rng.uniform(40, 80), size=pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _blur(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    radius = min(pixels.shape[:2]) * rng.uniform(0.07, 0.12)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _break_into_blocks(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compress far too much: JPEG at the lowest qualities."""
    image = Image.fromarray(pixels)
    scale = _JPEG_PIXELS / min(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=int(rng.integers(1, 4)))
    return np.asarray(Image.open(buffer).resize(image.size, Image.Resampling.NEAREST))


def _lay_stripes(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay slanted half-transparent stripes over everything, as a watermark."""
    height, width = pixels.shape[:2]
    period = min(height, width) * rng.uniform(0.16, 0.28)
    rows, columns = np.ogrid[:height, :width]
    slope = rng.choice((-1, 1)) * rng.uniform(0.7, 1.4)
    is_striped = (rows + slope * columns + rng.uniform(0, period)) % period < 0.35 * period
    share = np.where(is_striped, rng.uniform(0.45, 0.65), 0.0)[..., None]
    return (pixels * (1 - share) + share * _unlike(pixels, _BLACK, _WHITE)).round().astype(np.uint8)


def _letterbox(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put bars over two opposite edges."""
    spoilt = pixels.copy()
    along = spoilt if rng.random() < 0.5 else spoilt.transpose(1, 0, 2)
    num_lines = round(len(along) * rng.uniform(0.14, 0.24))
    along[:num_lines] = along[-num_lines:] = _unlike(pixels, _BLACK, _WHITE)
    return spoilt


def _cut_off(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lose the lower part, as of a file that was cut short and opened all the same."""
    spoilt = pixels.copy()
    spoilt[round(len(pixels) * rng.uniform(0.35, 0.65)) :] = _unlike(pixels, _GREY, _BLACK)
    return spoilt


def _unlike(pixels: np.ndarray, one: int, other: int) -> int:
    """Of two shades of grey the one that is farther from the picture's own: what cannot be seen spoils nothing."""
    shade = float(np.median(pixels.mean(axis=-1)))
    return one if abs(shade - one) >= abs(shade - other) else other


# Captions

_SHAPE_OF_NOUN = {noun: shape for shape, nouns in SHAPE_NOUNS.items() for noun in nouns}
_POSITION_OF_PLACE = {place: position for position, places in PLACES.items() for place in places}
_LONGEST_FIRST = sorted(_POSITION_OF_PLACE, key=len, reverse=True)  # "on the left side" begins with "on the left"
_OBJECT_WORDS = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(_SHAPE_OF_NOUN)})\b", re.IGNORECASE)
_PLACE_WORDS = re.compile(rf"\b({'|'.join(_LONGEST_FIRST)})\b", re.IGNORECASE)
_REFUSALS = (
    "I'm sorry, but I can't assist with that request.",
    "I am unable to view or describe this image.",
    "As an AI language model, I cannot see images.",
    "Sorry, I can't provide a description of this picture.",
)
_BOILERPLATE = (
    "The image features.",
    "This is an image.",
    "The image shows a scene with various objects in it.",
    "Here is a detailed description of the image:",
)


def _swap_scenes(caption: str, scene: Scene, rng: np.random.Generator) -> str:
    other = random_scene(rng)
    while describe(other) == describe(scene):
        other = random_scene(rng)
    return dense_caption(other, rng)


def _say_wrong_colour(caption: str, scene: Scene, rng: np.random.Generator) -> str:
    match = _one_of(_OBJECT_WORDS, caption, rng)
    others = [colour for colour in COLOURS if colour != match[1].lower()]
    return _put(caption, match.span(1), others[rng.integers(len(others))])


def _say_wrong_shape(caption: str, scene: Scene, rng: np.random.Generator) -> str:
    match = _one_of(_OBJECT_WORDS, caption, rng)
    others = [shape for shape in SHAPES if shape != _SHAPE_OF_NOUN[match[2].lower()]]
    return _put(caption, match.span(2), others[rng.integers(len(others))])


def _say_wrong_place(caption: str, scene: Scene, rng: np.random.Generator) -> str:
    """Move one object to where nothing is."""
    match = _one_of(_PLACE_WORDS, caption, rng)
    places = PLACES[_free_position(scene, rng)]
    return _put(caption, match.span(1), places[rng.integers(len(places))])


def _plant_object(caption: str, scene: Scene, rng: np.random.Generator) -> str:
    """Add a sentence about an object where nothing is; it may come after any sentence."""
    place = PLACES[_free_position(scene, rng)][0]
    words = [str(rng.choice(options)) for options in (SIZES, COLOURS, SHAPES)]
    planted = f"There is a {' '.join(words)} {place}."
    sentences = re.split(r"(?<=\.)\s+", caption.strip())
    sentences.insert(int(rng.integers(1, len(sentences) + 1)), planted)
    return " ".join(sentences)


def _loop(caption: str, scene: Scene, rng: np.random.Generator) -> str:
    """Say the last sentence again and again, until the tokens are used up."""
    last = re.split(r"(?<=\.)\s+", caption.strip())[-1]
    return " ".join([caption.strip(), *[last] * int(rng.integers(5, 10))])


def _refuse(caption: str, scene: Scene, rng: np.random.Generator) -> str:
    return _REFUSALS[rng.integers(len(_REFUSALS))]


def _say_nothing(caption: str, scene: Scene, rng: np.random.Generator) -> str:
    return _BOILERPLATE[rng.integers(len(_BOILERPLATE))]


def _one_of(pattern: re.Pattern[str], caption: str, rng: np.random.Generator) -> re.Match[str]:
    matches = list(pattern.finditer(caption))
    if not matches:
        raise UserError(f"the caption {caption!r} names no object of the toy world that could be made a wrong one")
    return matches[rng.integers(len(matches))]


def _put(caption: str, span: tuple[int, int], words: str) -> str:
    start, stop = span
    is_capital = caption[start].isupper()
    return caption[:start] + (words[0].upper() if is_capital else words[0]) + words[1:] + caption[stop:]


def _free_position(scene: Scene, rng: np.random.Generator) -> str:
    free = sorted(set(POSITIONS) - {item.position for item in scene.objects})
    return free[rng.integers(len(free))]


_PICTURES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise": _add_noise,
    "blur": _blur,
    "blocks": _break_into_blocks,
    "stripes": _lay_stripes,
    "letterbox": _letterbox,
    "cut_off": _cut_off,
}
_CAPTIONS: dict[str, Callable[[str, Scene, np.random.Generator], str]] = {
    "swapped": _swap_scenes,
    "wrong_colour": _say_wrong_colour,
    "wrong_shape": _say_wrong_shape,
    "wrong_place": _say_wrong_place,
    "false_object": _plant_object,
    "loop": _loop,
    "refusal": _refuse,
    "boilerplate": _say_nothing,
}
PICTURE_KINDS = tuple(_PICTURES)
CAPTION_KINDS = tuple(_CAPTIONS)
