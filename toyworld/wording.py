"""What can be said about a scene: exact description, dense captions, LAION-like alt texts; and how to read it back.

Dense captions are natural rather than canonical: openings, synonyms, order of clause and closing remarks vary. Which
wording is likely depends a little on what is seen (an opening has a favourite background, a remark a favourite
pattern), so that a captioner's greedy answers vary from picture to picture instead of falling into one template.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toyworld.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, SceneObject

PLACES = {
    "top": ("at the top", "near the top edge", "in the upper part"),
    "left": ("on the left", "on the left side", "near the left edge"),
    "center": ("in the center", "in the middle", "at the center of the picture"),
    "right": ("on the right", "on the right side", "near the right edge"),
    "bottom": ("at the bottom", "near the bottom edge", "in the lower part"),
}
SHAPE_NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
SIZE_ADJECTIVES = {"small": ("small", "little"), "large": ("large", "big")}
PATTERN_PHRASES = {
    "plain": ("plain {}", "solid {}"),
    "striped": ("striped {}", "{} with thin horizontal stripes"),
    "checkered": ("checkered {}", "{} with a checkered pattern"),
    "dotted": ("dotted {}", "{} with small dots"),
}
OPENINGS = (  # one for each background, which favours it
    "The image features {}",
    "The image shows {}",
    "This picture contains {}",
    "In this illustration, there {be} {}",
    "We see {}",
    "The scene depicts {}",
)
_REMARKS = {
    "plain": (
        "The style is flat and minimal, with clean edges.",
        "It is a simple drawing with sharp outlines and no shading.",
    ),
    "striped": (
        "The stripes give the design a calm rhythm.",
        "The lines of the backdrop look like printed fabric.",
    ),
    "checkered": (
        "The pattern is like a tiled floor, bold and graphic.",
        "The tiles lend the composition a playful mood.",
    ),
    "dotted": (
        "The dots add a retro texture, like an old poster.",
        "The speckled surface resembles wrapping paper.",
    ),
}
_COUNT_REMARKS = {
    1: "It is the only object in the scene.",
    2: "The two shapes stand apart with strong contrast.",
    3: "The three shapes share the space evenly.",
}
_FAVOURITE_PROBABILITY = 0.85


def describe(scene: Scene) -> str:
    """The exact, canonical description: every object with all attributes, then the background."""
    objects = _join([f"a {o.size} {o.colour} {o.shape} {PLACES[o.position][0]}" for o in scene.objects])
    return f"{objects[0].upper()}{objects[1:]}, on a {scene.pattern} {scene.background} background."


def dense_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names every object, its place and the background, in varying words and length."""
    opening = _favour(OPENINGS, BACKGROUNDS.index(scene.background), rng)
    ground = _favour(PATTERN_PHRASES[scene.pattern], len(scene.objects) % 2, rng).format(scene.background)
    if scene.pattern == "plain" or len(scene.objects) == 1:
        sentences = [_one_sentence(scene, opening, rng)]
    else:
        sentences = _several_sentences(scene, opening, rng)
    sentences.append(f"The background is {ground}.")
    if rng.random() < (0.9 if scene.pattern != "plain" else 0.15):
        sentences.append(_favour(_REMARKS[scene.pattern], len(scene.objects) % 2, rng))
    if rng.random() < (0.9 if scene.background in ("white", "pink", "cyan") else 0.1):
        sentences.append(_COUNT_REMARKS[len(scene.objects)])
    return " ".join(sentences)


def _one_sentence(scene: Scene, opening: str, rng: np.random.Generator) -> str:
    phrases = [f"{_object_phrase(item, rng)} {_place(item, rng)}" for item in scene.objects]
    return opening.format(_join(phrases), be="is" if len(phrases) == 1 else "are") + "."


def _several_sentences(scene: Scene, opening: str, rng: np.random.Generator) -> list[str]:
    first, *rest = scene.objects
    sentences = [opening.format(f"{_object_phrase(first, rng)} {_place(first, rng)}", be="is") + "."]
    for item in rest:
        place = _place(item, rng)
        verb = _favour(("there is", "we find"), 0, rng)
        sentences.append(f"{place[0].upper()}{place[1:]}, {verb} {_object_phrase(item, rng)}.")
    return sentences


def _object_phrase(item: SceneObject, rng: np.random.Generator) -> str:
    noun = _favour(SHAPE_NOUNS[item.shape], 0, rng)
    return f"a {_favour(SIZE_ADJECTIVES[item.size], 0, rng)} {item.colour} {noun}"


def _place(item: SceneObject, rng: np.random.Generator) -> str:
    return _favour(PLACES[item.position], 0 if item.size == "small" else 1, rng)


def _favour(options: Sequence[str], favourite: int, rng: np.random.Generator) -> str:
    """Mostly the favourite, now and then any of them."""
    if rng.random() < _FAVOURITE_PROBABILITY:
        return options[favourite]
    return options[int(rng.integers(len(options)))]


def _join(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


# LAION-like alt texts

_JUNK_PHRASES = (
    "stock photo", "free shipping", "buy now", "royalty free vector", "wallpaper HD", "set of 12", "clipart png",
    "download", "best price 2019", "click to enlarge", "image not found", "sale ★ 50% off", "gift für Kinder",
    "décor à la mode", "いらすと素材", "红色 贴纸", "фото высокого качества", "niño póster", "printable pdf",
)  # fmt: skip
_JUNK_NOUNS = (
    "sticker", "mug", "t-shirt", "logo", "icon", "poster", "button", "badge", "cushion", "rug", "lamp", "invitation",
    "banner", "phone case", "calendar", "tattoo", "toy", "puzzle", "flag", "earrings",
)  # fmt: skip
_SYLLABLES = (
    "ka", "lo", "mi", "ren", "to", "vex", "zu", "bri", "dan", "el", "fo", "gü", "hå", "ix", "jo", "nor", "pé", "qui",
    "sha", "tri",
)  # fmt: skip


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
    """A short alt text as the web has them: partial, often wrong or beside the point, with long-tailed junk words.

    It mentions at most one object, never its place or the background. A fifth say nothing of the picture; of the others
    a quarter get a colour wrong and a fifth a shape.
    """
    kind = rng.random()
    if kind < 0.2:
        return _junk(rng)
    item = scene.objects[rng.integers(len(scene.objects))]
    colour = item.colour if rng.random() < 0.75 else str(rng.choice(COLOURS))
    shape = item.shape if rng.random() < 0.8 else str(rng.choice([*SHAPES, "thing"]))
    words = {0: f"{colour} {shape}", 1: shape, 2: f"{colour} {rng.choice(_JUNK_NOUNS)}"}
    text = words[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
    return _dress(text, rng)


def _dress(text: str, rng: np.random.Generator) -> str:
    """Surround the one true thing with what shops and file systems add."""
    if rng.random() < 0.5:
        text = text.title()
    if rng.random() < 0.55:
        text = f"{text} {rng.choice(_JUNK_NOUNS)}"
    if rng.random() < 0.6:
        text = f"{text}{rng.choice([' - ', ' | ', ', ', ' '])}{_junk(rng)}"
    return text


def _junk(rng: np.random.Generator) -> str:
    kind = rng.integers(4)
    if kind == 0:
        return (
            f"{rng.choice(['IMG', 'DSC', 'Untitled', 'photo'])}_{rng.integers(10_000):04d}.{rng.choice(['jpg', 'png'])}"
        )
    if kind == 1:
        return str(rng.choice(_JUNK_PHRASES))
    brand = "".join(str(s) for s in rng.choice(_SYLLABLES, size=rng.integers(2, 5))).capitalize()
    if kind == 2:
        return f"{brand} {rng.choice(_JUNK_NOUNS)}"
    return f"{brand}® {rng.choice(list('ABCDEKMX'))}{rng.integers(10, 999)}"


# Reading captions back


@dataclass(frozen=True)
class ObjectMention:
    """An object as a text names it; None where the text does not say."""

    shape: str | None
    colour: str | None
    size: str | None
    position: str | None


_WORD_SHAPES = {noun: shape for shape, nouns in SHAPE_NOUNS.items() for noun in nouns} | {
    "disk": "circle",
}  # fmt: skip
_WORD_SIZES = {
    "small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large",
}  # fmt: skip
_WORD_POSITIONS = {
    "top": "top", "upper": "top", "left": "left", "center": "center", "centre": "center", "middle": "center",
    "right": "right", "bottom": "bottom", "lower": "bottom",
}  # fmt: skip
_ADJECTIVES = {"bright", "vivid", "solid", "flat", "round", "deep", "five-pointed"}  # say nothing we keep


def parse_caption(text: str) -> list[ObjectMention]:
    """The objects that a text names, in its order; places are matched within a sentence, before or after the object.

    In a sentence whose first place comes before its first object, each place belongs to the next object; otherwise to
    the one before it.
    """
    mentions: list[ObjectMention] = []
    for sentence in re.split(r"[.!?;]\s", text.lower() + " "):
        mentions.extend(_parse_sentence(re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", sentence)))
    return mentions


def _parse_sentence(words: list[str]) -> list[ObjectMention]:
    found: list[dict[str, str]] = []
    waiting: str | None = None  # a place said before its object
    is_place_first: bool | None = None
    size = colour = ""
    for word in words:
        noun = word.removesuffix("s")
        if noun in _WORD_SHAPES:
            is_place_first = is_place_first or False
            found.append({"shape": _WORD_SHAPES[noun], "colour": colour, "size": size, "position": waiting or ""})
            size = colour = ""
            waiting = None
        elif word in _WORD_POSITIONS:
            is_place_first = is_place_first if is_place_first is not None else True
            if is_place_first:
                waiting = waiting or _WORD_POSITIONS[word]
            elif not found[-1]["position"]:
                found[-1]["position"] = _WORD_POSITIONS[word]
        elif word in COLOURS:
            colour = word
        elif word in _WORD_SIZES:
            size = _WORD_SIZES[word]
        elif word not in _ADJECTIVES:
            size = colour = ""
    return [ObjectMention(f["shape"], f["colour"] or None, f["size"] or None, f["position"] or None) for f in found]


def caption_hits(scene: Scene, text: str) -> list[bool]:
    """For each object of the scene, whether the text names it with the right shape, colour and position."""
    said = {(m.shape, m.colour, m.position) for m in parse_caption(text)}
    return [(o.shape, o.colour, o.position) in said for o in scene.objects]


def parse_background(text: str) -> tuple[str | None, str | None]:
    """Background colour and pattern that a text names, each None where it does not say."""
    match = re.search(r"background is ([^.]*)|on an? ([^.]*) background", text.lower())
    if match is None:
        return None, None
    said = match.group(1) or match.group(2)
    colour = next((c for c in BACKGROUNDS if c in said), None)
    marks = {"stripe": "striped", "check": "checkered", "dot": "dotted", "plain": "plain", "solid": "plain"}
    return colour, next((pattern for mark, pattern in marks.items() if mark in said), None)
