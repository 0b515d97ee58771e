"""The judge: looks at a picture and says which objects of a scene are in it, with right place, colour and shape.

It cuts a crop around each of the five anchors and lets a small trained network say what is there; so it works at any
resolution and aspect ratio, and its scores mean the same for all of them. Objects away from the anchors are not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from toyworld.scenes import COLOURS, POSITIONS, SHAPES, Scene, SceneObject
from toyworld.zoo.judge_net import EMPTY, JudgeNet, anchor_crops, crops_to_tensor

WEIGHTS = Path(__file__).parent / "weights" / "judge"

_BATCH_SIZE = 100


@dataclass(frozen=True)
class ObjectHit:
    """What the judge finds of one object of a scene."""

    item: SceneObject
    has_position: bool  # something is at its anchor
    has_colour: bool  # and it has the right colour
    has_shape: bool  # and it has the right shape

    @property
    def is_right(self) -> bool:
        """Right colour and shape at the right place."""
        return self.has_colour and self.has_shape


@dataclass(frozen=True)
class Verdict:
    """One picture against its scene."""

    hits: tuple[ObjectHit, ...]
    num_extra: int  # anchors that should be empty and are not
    seen: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # position to (shape, colour) in the picture

    @property
    def is_right(self) -> bool:
        """Every object right and nothing extra."""
        return self.num_extra == 0 and all(hit.is_right for hit in self.hits)


@dataclass(frozen=True)
class Score:
    """Fractions over all objects of many pictures, as they go into summary.json."""

    position: float
    colour: float
    shape: float
    all: float
    extra: float  # extra objects per picture

    @staticmethod
    def of(verdicts: Sequence[Verdict]) -> "Score":
        """The mean of these verdicts; ValueError when there are none."""
        hits = [hit for verdict in verdicts for hit in verdict.hits]
        if not hits:
            raise ValueError("no objects to score")
        return Score(
            position=float(np.mean([hit.has_position for hit in hits])),
            colour=float(np.mean([hit.has_colour for hit in hits])),
            shape=float(np.mean([hit.has_shape for hit in hits])),
            all=float(np.mean([hit.is_right for hit in hits])),
            extra=float(np.mean([verdict.num_extra for verdict in verdicts])),
        )


class Judge:
    """Scores pictures against scenes."""

    def __init__(self, net: JudgeNet) -> None:
        self._net = net.eval()

    @staticmethod
    def load(path: Path | str = WEIGHTS) -> "Judge":
        """The judge whose weights lie in this folder."""
        net = JudgeNet()
        net.load_state_dict({k: v.float() for k, v in load_file(Path(path) / "model.safetensors").items()})
        return Judge(net)

    def score(self, image: Image.Image, scene: Scene) -> Verdict:
        """Judge one picture."""
        return self.score_batch([image], [scene])[0]

    def score_batch(self, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> list[Verdict]:
        """Judge many pictures; their sizes may differ."""
        if len(images) != len(scenes):
            raise ValueError(f"{len(images)} images but {len(scenes)} scenes")
        return [_verdict(scene, seen) for scene, seen in zip(scenes, self.look(images), strict=True)]

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> list[dict[str, tuple[str, str]]]:
        """What is in each picture, whatever it should show: position to (shape, colour), empty anchors left out."""
        return [
            seen for start in range(0, len(images), _BATCH_SIZE) for seen in self._look(images[start:][:_BATCH_SIZE])
        ]

    def _look(self, images: Sequence[Image.Image]) -> list[dict[str, tuple[str, str]]]:
        crops = [crop for image in images for crop in anchor_crops(image)]
        shape_logits, colour_logits = self._net(crops_to_tensor(crops))
        by_image = (len(images), len(POSITIONS))
        shapes = shape_logits.argmax(dim=1).view(by_image).tolist()
        colours = colour_logits.argmax(dim=1).view(by_image).tolist()
        return [
            {
                position: (SHAPES[shape], COLOURS[colour])
                for position, shape, colour in zip(POSITIONS, shapes[i], colours[i], strict=True)
                if shape != EMPTY
            }
            for i in range(len(images))
        ]


def _verdict(scene: Scene, seen: dict[str, tuple[str, str]]) -> Verdict:
    hits = []
    for item in scene.objects:
        shape, colour = seen.get(item.position, (None, None))
        hits.append(
            ObjectHit(
                item=item,
                has_position=shape is not None,
                has_colour=colour == item.colour,
                has_shape=shape == item.shape,
            )
        )
    wanted = {item.position for item in scene.objects}
    return Verdict(tuple(hits), num_extra=len(seen.keys() - wanted), seen=seen)
