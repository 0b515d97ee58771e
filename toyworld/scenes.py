"""Scenes of the toy world: what is in a picture, before anything is drawn or said.

A scene holds one to three flat objects at distinct anchors on a coloured, sometimes patterned background. The world is
kept simple where the models that live in it are small: backgrounds are mostly plain, no background has an object's
colour, and objects that share a scene with one in the center are small, so that nothing overlaps.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np

from errors import UserError

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
SIZES = ("small", "large")
POSITIONS = ("top", "left", "center", "right", "bottom")  # reading order
BACKGROUNDS = ("white", "black", "gray", "pink", "brown", "cyan")
PATTERNS = ("plain", "striped", "checkered", "dotted")
NUM_CLASSES = len(SHAPES) * len(COLOURS)

_PATTERN_PROBABILITIES = (0.7, 0.1, 0.1, 0.1)
_MAX_OBJECTS = 3


@dataclass(frozen=True)
class SceneObject:
    """One flat shape at one of the five anchors."""

    shape: str
    colour: str
    size: str
    position: str


@dataclass(frozen=True)
class Scene:
    """Everything that a picture of the toy world shows."""

    objects: tuple[SceneObject, ...]
    background: str
    pattern: str

    def to_json(self) -> str:
        """One line of JSON, the same for equal scenes."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Scene":
        """The scene that `to_json` wrote; ValueError for a word that the world does not know."""
        fields = json.loads(text)
        objects = tuple(SceneObject(**item) for item in fields["objects"])
        scene = Scene(objects, fields["background"], fields["pattern"])
        for item in objects:
            _require_known("shape", item.shape, SHAPES)
            _require_known("colour", item.colour, COLOURS)
            _require_known("size", item.size, SIZES)
            _require_known("position", item.position, POSITIONS)
        _require_known("background", scene.background, BACKGROUNDS)
        _require_known("pattern", scene.pattern, PATTERNS)
        return scene


def _require_known(field: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise UserError(f"scene {field} {word!r} is not one of {', '.join(known)}")


def random_scene(rng: np.random.Generator, *, num_objects: int | None = None) -> Scene:
    """Draw a scene of one to three objects (uniformly, unless `num_objects` says), objects in reading order."""
    if num_objects is None:
        num_objects = int(rng.integers(1, _MAX_OBJECTS + 1))
    if not 1 <= num_objects <= _MAX_OBJECTS:
        raise ValueError(f"num_objects {num_objects} is not between 1 and {_MAX_OBJECTS}")
    places = np.sort(rng.choice(len(POSITIONS), size=num_objects, replace=False))
    is_crowded = num_objects > 1 and POSITIONS.index("center") in places
    objects = tuple(
        SceneObject(
            shape=SHAPES[rng.integers(len(SHAPES))],
            colour=COLOURS[rng.integers(len(COLOURS))],
            size="small" if is_crowded else SIZES[rng.integers(len(SIZES))],
            position=POSITIONS[place],
        )
        for place in places
    )
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    pattern = PATTERNS[rng.choice(len(PATTERNS), p=_PATTERN_PROBABILITIES)]
    return Scene(objects, background, pattern)


def class_label(scene: Scene) -> int:
    """Class of a single-object scene, shape * 6 + colour, 0 to 23; ValueError when it holds more than one."""
    if len(scene.objects) != 1:
        raise ValueError(f"a scene of {len(scene.objects)} objects has no class: only single objects do")
    item = scene.objects[0]
    return SHAPES.index(item.shape) * len(COLOURS) + COLOURS.index(item.colour)


def class_name(label: int) -> str:
    """Colour and shape of a class, as in "red circle"."""
    shape, colour = divmod(label, len(COLOURS))
    return f"{COLOURS[colour]} {SHAPES[shape]}"
