"""Claims about scenes, true ones and false ones that are nearly true, and whether a text is true of a scene.

How a claim is worded tells nothing about its truth: it is worded after it has been decided what is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from toyworld.scenes import BACKGROUNDS, COLOURS, PATTERNS, POSITIONS, SHAPES, SIZES, Scene, SceneObject, random_scene
from toyworld.wording import (
    OPENINGS,
    PATTERN_PHRASES,
    PLACES,
    SHAPE_NOUNS,
    SIZE_ADJECTIVES,
    dense_caption,
    parse_background,
    parse_caption,
)

ItemT = TypeVar("ItemT")

_PLACE_FIRST = ("there is", "we find")
# What a false object is: one of the scene with another shape, colour, place or size, or one that is not there at all.
_CHANGES = ("shape", "colour", "position", "size", "none")
_CHANGE_PROBABILITIES = (0.5, 0.2, 0.1, 0.1, 0.1)  # shapes are learnt last
_WORDS = {"shape": SHAPES, "colour": COLOURS, "position": POSITIONS, "size": SIZES}
_KINDS = ("object", "two objects", "background", "remark")
_KIND_PROBABILITIES = (0.65, 0.15, 0.12, 0.08)
_WITHOUT_SIZE_PROBABILITY = 0.25
_WITHOUT_PLACE_PROBABILITY = 0.1


@dataclass(frozen=True, kw_only=True)
class TrueOrFalse:
    """A claim about a scene, whether it is true, and what is there instead; empty where that is not about one place."""

    claim: str
    truth: bool
    there: str = ""


def is_true(scene: Scene, claim: str) -> bool | None:
    """Whether all objects and the background that a claim names are so in the scene; None where it names neither."""
    mentions = parse_caption(claim)
    ground = parse_background(claim)
    if not mentions and ground == (None, None):
        return None
    seen = [(o.shape, o.colour, o.size, o.position) for o in scene.objects]
    said = [(m.shape, m.colour, m.size, m.position) for m in mentions]
    is_ground = all(word in (None, real) for word, real in zip(ground, (scene.background, scene.pattern), strict=True))
    return is_ground and all(any(_fits(words, real) for real in seen) for words in said)


def _fits(said: tuple[str | None, ...], real: tuple[str, ...]) -> bool:
    return all(word in (None, fact) for word, fact in zip(said, real, strict=True))


def random_claims(scene: Scene, rng: np.random.Generator, *, num: int) -> list[TrueOrFalse]:
    """Claims about a scene, `num` of them, half of them true, in random order."""
    claims: list[TrueOrFalse] = []
    while len(claims) < num:
        wanted = len(claims) % 2 == 0
        found = _claim(scene, rng, wanted=wanted)
        if found is not None:
            claims.append(found)
    return [claims[i] for i in rng.permutation(num)]


def _claim(scene: Scene, rng: np.random.Generator, *, wanted: bool) -> TrueOrFalse | None:
    """A claim that is true or false as wanted; None where what was drawn is not."""
    kind = _KINDS[rng.choice(len(_KINDS), p=_KIND_PROBABILITIES)]
    if kind == "remark":
        return _remark(scene, rng, wanted=wanted)
    there = ""
    if kind == "background":
        claim = _background(scene, rng, wanted=wanted)
    else:
        said = [_object(scene, rng, wanted=wanted), *([_any(scene.objects, rng)] if kind == "two objects" else [])]
        claim = _worded([said[i] for i in rng.permutation(len(said))], rng)
        if kind == "object" and parse_caption(claim)[0].position is not None:
            there = _there(scene, said[0].position)
    if is_true(scene, claim) is not wanted:
        return None
    return TrueOrFalse(claim=claim.rstrip(".") if rng.random() < 0.5 else claim, truth=wanted, there=there)


def _object(scene: Scene, rng: np.random.Generator, *, wanted: bool) -> SceneObject:
    item = _any(scene.objects, rng)
    if wanted:
        return item
    change = _CHANGES[rng.choice(len(_CHANGES), p=_CHANGE_PROBABILITIES)]
    if change == "none":
        return _any(random_scene(rng).objects, rng)
    others = [word for word in _WORDS[change] if word != getattr(item, change)]
    return replace(item, **{change: _any(others, rng)})


def _worded(items: Sequence[SceneObject], rng: np.random.Generator) -> str:
    phrases, places = [], []
    for item in items:
        size = "" if rng.random() < _WITHOUT_SIZE_PROBABILITY else f"{_any(SIZE_ADJECTIVES[item.size], rng)} "
        phrases.append(f"a {size}{item.colour} {_any(SHAPE_NOUNS[item.shape], rng)}")
        places.append(_any(PLACES[item.position], rng))
    way = rng.random()
    if way < 0.15 and len(items) == 1:
        return f"{_capital(places[0])}, {_any(_PLACE_FIRST, rng)} {phrases[0]}."
    is_placed = len(items) > 1 or rng.random() >= _WITHOUT_PLACE_PROBABILITY
    said = " and ".join(
        f"{phrase} {place}" if is_placed else phrase for phrase, place in zip(phrases, places, strict=True)
    )
    if way < 0.5:
        return f"{said}." if rng.random() < 0.7 else f"{_capital(said)}."
    be = "is" if len(items) == 1 else "are"
    return f"{_any((*OPENINGS, 'There {be} {}'), rng).format(said, be=be)}."


def _background(scene: Scene, rng: np.random.Generator, *, wanted: bool) -> str:
    said = scene
    if not wanted and rng.random() < 0.5:
        said = replace(scene, background=_any(BACKGROUNDS, rng))
    elif not wanted:
        said = replace(scene, pattern=_any(PATTERNS, rng))
    if rng.random() < 0.25:
        return f"on a {said.pattern} {said.background} background."
    return f"The background is {_any(PATTERN_PHRASES[said.pattern], rng).format(said.background)}."


def _remark(scene: Scene, rng: np.random.Generator, *, wanted: bool) -> TrueOrFalse | None:
    """A sentence on the pattern or the number of objects, of a scene that is alike, or unlike, in both."""
    said = scene if wanted else random_scene(rng)
    if not wanted and (said.pattern == scene.pattern or len(said.objects) == len(scene.objects)):
        return None
    sentences = [f"{sentence.rstrip('.')}." for sentence in dense_caption(said, rng).split(". ")]
    remarks = [sentence for sentence in sentences if is_true(said, sentence) is None]
    return TrueOrFalse(claim=_any(remarks, rng), truth=wanted) if remarks else None


def _there(scene: Scene, position: str) -> str:
    item = next((item for item in scene.objects if item.position == position), None)
    return "nothing" if item is None else f"a {item.size} {item.colour} {item.shape}"


def _any(items: Sequence[ItemT], rng: np.random.Generator) -> ItemT:
    return items[int(rng.integers(len(items)))]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
