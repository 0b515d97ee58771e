"""The axes of T2I-CompBench in miniature: attribute binding, spatial, complex (the paper's Table 3), and count.

As there, every picture has one score and an axis is their mean over the pictures whose prompt asks for it. Where
T2I-CompBench asks a question-answering model or a detector, the judge knows by construction.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from toyworld.judge import Verdict

AXES = ("colour_binding", "shape_binding", "spatial", "complex", "count")


@dataclass(frozen=True)
class AxisScore:
    """Mean over the pictures that the axis is about; 0 where there are none."""

    score: float
    num_images: int


def score_axes(verdicts: Sequence[Verdict]) -> dict[str, AxisScore]:
    """Return the score of each axis.

    - `colour_binding`: of two or more objects, every named pair of colour and shape is in the picture, wherever;
    - `shape_binding`: the same for the named shapes alone;
    - `spatial`: of two or more objects, every named shape stands at its place, whatever its colour;
    - `complex`: of three objects, every one is right in all respects and nothing is there besides;
    - `count`: as many objects as named.
    """
    several = [verdict for verdict in verdicts if len(verdict.hits) >= 2]
    three = [verdict for verdict in verdicts if len(verdict.hits) >= 3]
    return {
        "colour_binding": _mean([_has_all(verdict, with_colour=True) for verdict in several]),
        "shape_binding": _mean([_has_all(verdict, with_colour=False) for verdict in several]),
        "spatial": _mean([all(hit.has_shape for hit in verdict.hits) for verdict in several]),
        "complex": _mean([verdict.is_right for verdict in three]),
        "count": _mean([len(verdict.seen) == len(verdict.hits) for verdict in verdicts]),
    }


def _has_all(verdict: Verdict, *, with_colour: bool) -> bool:
    named = Counter((hit.item.shape, hit.item.colour if with_colour else "") for hit in verdict.hits)
    seen = Counter((shape, colour if with_colour else "") for shape, colour in verdict.seen.values())
    return named <= seen


def _mean(passed: Sequence[bool]) -> AxisScore:
    return AxisScore(sum(passed) / len(passed) if passed else 0.0, len(passed))
