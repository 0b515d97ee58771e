"""Pictures of scenes, drawn three times too large and reduced, at any size and aspect ratio.

Anchors are fractions of width and height, radii fractions of the shorter side. The four outlines are chosen to differ
at 64 pixels: a square's corners reach a third beyond a circle of the same radius, a triangle is wide, a star has thin
arms.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from toyworld.scenes import Scene, SceneObject

ANCHORS = {  # position: (fraction of width, fraction of height)
    "top": (0.5, 0.19),
    "left": (0.19, 0.5),
    "center": (0.5, 0.5),
    "right": (0.81, 0.5),
    "bottom": (0.5, 0.81),
}
RADIUS_FRACTIONS = {"small": 0.14, "large": 0.19}  # of the shorter side: 9 and 12 pixels at 64
OBJECT_RGB = {
    "red": (215, 25, 30),
    "green": (30, 155, 55),
    "blue": (35, 60, 215),
    "yellow": (248, 220, 25),
    "orange": (250, 130, 10),
    "purple": (135, 35, 165),
}
BACKGROUND_RGB = {
    "white": (243, 243, 243),
    "black": (14, 14, 14),
    "gray": (135, 135, 135),
    "pink": (250, 185, 200),
    "brown": (92, 58, 34),
    "cyan": (150, 228, 235),
}

_SUPERSAMPLE = 3
_ANCHOR_JITTER = 0.015  # of the shorter side
_SIZE_JITTER = 0.05
_COLOUR_JITTER = 10
_PATTERN_CONTRAST = 0.2
_CRESCENT_CORNERS = 24  # of each of its two arcs
_MARKS_ACROSS = 8  # stripes, checks or dots along the shorter side

Point = tuple[float, float]


def render(scene: Scene, width_pixels: int, height_pixels: int, *, rng: np.random.Generator) -> Image.Image:
    """Draw the scene as an RGB image; `rng` moves anchors, sizes and colours a little."""
    width, height = width_pixels * _SUPERSAMPLE, height_pixels * _SUPERSAMPLE
    ground = _jitter_colour(BACKGROUND_RGB[scene.background], rng)
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    _draw_pattern(draw, scene.pattern, _second_shade(ground), width=width, height=height)
    for item in scene.objects:
        _draw_object(draw, item, width=width, height=height, rng=rng)
    return image.reduce(_SUPERSAMPLE)


def background_picture(background: str, pattern: str, side_pixels: int) -> Image.Image:
    """Draw a background with nothing on it, square, its colour exactly that of the name."""
    side = side_pixels * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), BACKGROUND_RGB[background])
    shade = _second_shade(BACKGROUND_RGB[background])
    _draw_pattern(ImageDraw.Draw(image), pattern, shade, width=side, height=side)
    return image.reduce(_SUPERSAMPLE)


def outline(shape: str) -> list[Point]:
    """Return the corners of a shape that is no circle, in radii around its anchor."""
    return _OUTLINES[shape]()


def _jitter_colour(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    moved = np.clip(np.add(colour, rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)), 0, 255)
    return int(moved[0]), int(moved[1]), int(moved[2])


def _second_shade(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    target = 0 if sum(ground) > 384 else 255
    red, green, blue = (round(c + (target - c) * _PATTERN_CONTRAST) for c in ground)
    return red, green, blue


def _draw_pattern(
    draw: ImageDraw.ImageDraw, pattern: str, shade: tuple[int, int, int], *, width: int, height: int
) -> None:
    if pattern == "plain":
        return
    step = min(width, height) / _MARKS_ACROSS
    for row in range(math.ceil(height / step)):
        if pattern == "striped":
            draw.rectangle((0, row * step, width, (row + 0.5) * step), fill=shade)
            continue
        for column in range(math.ceil(width / step)):
            left, top = column * step, row * step
            if pattern == "checkered" and (row + column) % 2 == 0:
                draw.rectangle((left, top, left + step, top + step), fill=shade)
            elif pattern == "dotted":
                draw.ellipse((left + 0.25 * step, top + 0.25 * step, left + 0.75 * step, top + 0.75 * step), fill=shade)


def _draw_object(
    draw: ImageDraw.ImageDraw, item: SceneObject, *, width: int, height: int, rng: np.random.Generator
) -> None:
    shorter = min(width, height)
    shift_x, shift_y = rng.uniform(-_ANCHOR_JITTER, _ANCHOR_JITTER, size=2) * shorter
    x = ANCHORS[item.position][0] * width + shift_x
    y = ANCHORS[item.position][1] * height + shift_y
    radius = RADIUS_FRACTIONS[item.size] * shorter * rng.uniform(1 - _SIZE_JITTER, 1 + _SIZE_JITTER)
    fill = _jitter_colour(OBJECT_RGB[item.colour], rng)
    if item.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        draw.polygon([(x + dx * radius, y + dy * radius) for dx, dy in _OUTLINES[item.shape]()], fill=fill)


def _square_outline() -> list[Point]:
    return [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)]


def _triangle_outline() -> list[Point]:
    return [(0.0, -1.05), (1.15, 0.95), (-1.15, 0.95)]


def _star_outline() -> list[Point]:
    points = []
    for k in range(10):
        reach = 1.25 if k % 2 == 0 else 0.48
        points.append((reach * math.sin(k * math.pi / 5), -reach * math.cos(k * math.pi / 5) + 0.08))
    return points


def _crescent_outline() -> list[Point]:
    """A disc from which another is cut, open to the right: no shape of the world, see `toyworld.subject`."""
    radius, cut_radius, cut_x = 1.12, 0.82, 0.6
    meet_x = (cut_x**2 + radius**2 - cut_radius**2) / (2 * cut_x)
    meet_y = math.sqrt(radius**2 - meet_x**2)
    outer, inner = math.atan2(meet_y, meet_x), math.atan2(meet_y, meet_x - cut_x)
    points = []
    for k in range(_CRESCENT_CORNERS + 1):
        angle = outer + (2 * math.pi - 2 * outer) * k / _CRESCENT_CORNERS
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    for k in range(_CRESCENT_CORNERS + 1):
        angle = 2 * math.pi - inner - (2 * math.pi - 2 * inner) * k / _CRESCENT_CORNERS
        points.append((cut_x + cut_radius * math.cos(angle), cut_radius * math.sin(angle)))
    return points


_OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "square": _square_outline,
    "triangle": _triangle_outline,
    "star": _star_outline,
    "crescent": _crescent_outline,
}
