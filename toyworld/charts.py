"""Losses on a logarithmic axis and scores as inline SVG: no script, no own colours, legible in light and dark."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 30
KEY_LEFT = 190  # of the list of lines, below curves that rise
MAX_POINTS = 360
SMOOTHING_PARTS = 40  # the smoothed line averages over about a fortieth of the run
MIN_RATIO = 1.2  # of highest to lowest loss on the axis: noise does not look like a trend


@dataclass(frozen=True)
class Scale:
    """Maps values from low..high to SVG units from start..stop, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Position of a value."""
        low, high, at = (math.log(item) if self.is_log else item for item in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Three to six round values between low and high."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                values = [float(f"{factor * 10.0**power:.3g}") for power in powers for factor in factors]
                inside = [value for value in values if self.low <= value <= self.high]
                if len(inside) >= 3:
                    return inside
        return self._linear_ticks()

    def _linear_ticks(self) -> list[float]:
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(step * number, 10) for number in range(first, last + 1)]


def loss_chart(points: Sequence[tuple[int, float]], *, label: str) -> Markup:
    """Return an SVG of (step, loss): each step faintly, and a running mean over it; `label` is read to the blind.

    Losses that are not finite and positive leave no point.

    Raises:
        ValueError: no loss is finite and positive.
    """
    drawn = [(step, loss) for step, loss in points if math.isfinite(loss) and loss > 0]
    if not drawn:
        raise ValueError(f"{label}: no loss is finite and positive")
    low, high = (extreme(loss for _, loss in drawn) for extreme in (min, max))
    if high / low < MIN_RATIO:
        low, high = low / math.sqrt(MIN_RATIO), high * math.sqrt(MIN_RATIO)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, is_log=True)
    x = Scale(drawn[0][0], max(drawn[-1][0], drawn[0][0] + 1), LEFT, WIDTH - RIGHT)
    smooth = _thin(_smoothed(drawn))
    parts = [*grid_lines(x, y), polyline(_thin(drawn), x, y, name="raw"), polyline(smooth, x, y, name="smooth")]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return Markup(svg)


def score_chart(points: Sequence[tuple[int, float]], *, label: str) -> Markup:
    """Return an SVG of (step, share from 0 to 1), a dot at each step, in percent; `label` is read to the blind."""
    y = Scale(0.0, 100.0, HEIGHT - BOTTOM, TOP)
    x = Scale(0.0, max(step for step, _ in points), LEFT, WIDTH - RIGHT)
    percents = [(step, 100 * share) for step, share in points]
    dots = [f'<circle cx="{x.place(step):.1f}" cy="{y.place(value):.1f}" r="3"/>' for step, value in percents]
    parts = [*grid_lines(x, y), polyline(percents, x, y, name="smooth"), *dots]
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def few_steps_chart(
    lines: Mapping[str, Sequence[tuple[int, float]]], *, level: float, level_name: str, label: str
) -> Markup:
    """Return an SVG of lines of (number of steps, share from 0 to 1), by what they are called, in percent.

    The first line is the one that it is about. Steps stand on a logarithmic axis; `level` is a share for all of them.
    """
    numbers = sorted({steps for points in lines.values() for steps, _ in points})
    y = Scale(0.0, 100.0, HEIGHT - BOTTOM, TOP)
    x = Scale(numbers[0], max(numbers[-1], numbers[0] + 1), LEFT, WIDTH - RIGHT, is_log=True)
    parts = grid_lines(x, y, ticks=numbers)
    names = ["smooth", *["other"] * (len(lines) - 1)]
    for (_, points), name in zip(lines.items(), names, strict=True):
        percents = [(steps, 100 * share) for steps, share in points]
        parts.append(polyline(percents, x, y, name=name))
        parts += [
            f'<circle class="{name}" cx="{x.place(at):.1f}" cy="{y.place(value):.1f}" r="3"/>' for at, value in percents
        ]
    parts.append(polyline([(numbers[0], 100 * level), (numbers[-1], 100 * level)], x, y, name="level"))
    for row, (name, text) in enumerate(zip([*names, "level"], [*lines, level_name], strict=True)):
        at = y.place(6.0 + 10.0 * (len(lines) - row))
        parts.append(f'<polyline class="{name}" points="{KEY_LEFT},{at:.1f} {KEY_LEFT + 24},{at:.1f}"/>')
        parts.append(f'<text x="{KEY_LEFT + 32}" y="{at + 3.5:.1f}">{escape(text)}</text>')
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over windows centred on each point, which do not lag behind a falling loss; narrower at the ends."""
    sums = [0.0, *itertools.accumulate(loss for _, loss in points)]
    reach = len(points) // SMOOTHING_PARTS // 2
    smooth = []
    for position, (step, _) in enumerate(points):
        half = min(reach, position, len(points) - 1 - position)
        total = sums[position + half + 1] - sums[position - half]
        smooth.append((step, total / (2 * half + 1)))
    return smooth


def _thin(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    if len(points) <= MAX_POINTS:
        return points
    return [points[round(number * (len(points) - 1) / (MAX_POINTS - 1))] for number in range(MAX_POINTS)]


def polyline(points: Sequence[tuple[float, float]], x: Scale, y: Scale, *, name: str) -> str:
    """Return a line through points, of a class that the page styles."""
    path = " ".join(f"{x.place(step):.1f},{y.place(loss):.1f}" for step, loss in points)
    return f'<polyline class="{name}" points="{path}"/>'


def grid_lines(x: Scale, y: Scale, ticks: Sequence[float] | None = None) -> list[str]:
    """Return the lines and numbers of a chart's axes; `ticks` are values of x, round ones unless given."""
    parts = []
    for value in y.ticks():
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    for value in x.ticks() if ticks is None else ticks:
        at = x.place(value)
        anchor = "end" if at > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">{value:,g}</text>')
    return parts
