"""How the judge's scores rise while a stage trains, from samples drawn with several of its checkpoints."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from toyworld.charts import score_chart
from toyworld.few_steps import STEPS_NAMED

# What samples of a checkpoint are called: a stage, and the step.
NAMED = re.compile(r"(.+)-([0-9]+)")
MIN_POINTS = 3


@dataclass(frozen=True)
class ScoreCurve:
    """The share of objects that are all right, by the stage's step."""

    name: str
    points: list[tuple[int, float]]

    @property
    def chart(self) -> Markup:
        """It as an SVG."""
        step, share = self.points[-1]
        return score_chart(self.points, label=f"Objects all right, samples of {self.name}: {share:.1%} at step {step}")


def score_curves(judged: Mapping[str, Mapping[str, Any]], *, stages: Collection[str]) -> list[ScoreCurve]:
    """Return a curve of each stage that at least three steps of were judged, of `stage-step`: figures with `all`.

    Names that are stages of their own, as those of resolutions, are no steps of one, and steps of drawing none of
    training.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for name, figures in judged.items():
        if name not in stages and not STEPS_NAMED.fullmatch(name) and (match := NAMED.fullmatch(name)):
            found.setdefault(match[1], []).append((int(match[2]), figures["all"]))
    return [ScoreCurve(name, sorted(points)) for name, points in sorted(found.items()) if len(points) >= MIN_POINTS]


def in_order_of_steps(name: str) -> tuple[str, int]:
    """Return what sorts names of samples by stage and step, a stage without one first."""
    match = NAMED.fullmatch(name)
    return (name, -1) if match is None else (match[1], int(match[2]))
