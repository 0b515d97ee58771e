"""Histograms as inline SVG, with the cuts drawn in: no script, no own colours, legible in light and dark."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from curation.choose.histograms import Histogram
from curation.choose.measures import Cut

WIDTH, HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 12, 12, 26, 26
NUM_TICKS = 6
# Of characters, of which no browser is asked how wide they are; on phones they are the largest.
CHARACTER_PIXELS = 9.5


def histogram_chart(
    histogram: Histogram, cuts: Sequence[Cut], *, groups: Sequence[str], names: Sequence[str], label: str
) -> Markup:
    """Return an SVG of stacked bars.

    Args:
        groups: classes of the parts of a bar, from the bottom up; they are in the order of the histogram's groups.
        names: what each group is called where one points at a bar.
        label: is read to the blind.
    """
    edges = np.log(histogram.edges) if histogram.is_log else histogram.edges
    span = float(edges[-1] - edges[0])
    xs = [LEFT + (float(edge) - float(edges[0])) / span * (WIDTH - LEFT - RIGHT) for edge in edges]
    highest = max(float(histogram.counts.sum(axis=1).max()), 1e-30)
    base = HEIGHT - BOTTOM
    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for number, counts in enumerate(histogram.counts):
        left, right = xs[number], xs[number + 1]
        said = f"{_interval(histogram, number)}: " + ", ".join(
            f"{count:,.4g} {name}" if count % 1 else f"{int(count):,} {name}"
            for count, name in zip(counts, names, strict=True)
            if count
        )
        bars, top = [], float(base)
        for count, group in zip(counts, groups, strict=True):
            # A bar of one sample among millions is seen, too.
            height = max(float(count) / highest * (base - TOP), 1.0) if count else 0.0
            if height:
                top -= height
                width = max(right - left - 0.8, 0.4)
                bars.append(
                    f'<rect class="{group}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
                )
        if bars:
            parts.append(f"<g><title>{escape(said)}</title>{''.join(bars)}</g>")
    parts += _axis(histogram, edges)
    for cut in cuts:
        if cut.value > 0 or not histogram.is_log:
            parts.append(_cut_line(_place(cut.value, histogram, edges), cut.value))
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def shown_number(value: float) -> str:
    """Return a number as people read it: 512, 0.22, 1,234, 8.9M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size and math.isfinite(value):
            return f"{value / size:.4g}{unit}" if abs(value) < 1e15 else f"{value:.3g}"
    if value == int(value) if math.isfinite(value) else False:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _place(value: float, histogram: Histogram, edges: np.ndarray) -> float:
    at = math.log(value) if histogram.is_log else value
    return LEFT + (at - float(edges[0])) / float(edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)


def _interval(histogram: Histogram, number: int) -> str:
    low, high = (shown_number(float(edge)) for edge in histogram.edges[number : number + 2])
    is_first, is_last = number == 0, number == len(histogram.counts) - 1
    if is_first and histogram.num_below:
        return f"up to {high}"
    if is_last and histogram.num_above:
        return f"{low} and more"
    return f"over {low} to {high}" if histogram.is_right_closed else f"{low} to under {high}"


def _cut_line(at: float, value: float) -> str:
    text = shown_number(value)
    half = len(text) * CHARACTER_PIXELS / 2
    middle = min(max(at, LEFT + half), WIDTH - RIGHT - half)
    return (
        f'<line class="cut" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM + 4}"/>'
        f'<text class="cut" x="{middle:.1f}" y="{TOP - 12}" text-anchor="middle">{escape(text)}</text>'
    )


def _axis(histogram: Histogram, edges: np.ndarray) -> list[str]:
    low, high = float(histogram.edges[0]), float(histogram.edges[-1])
    parts, taken = [], -math.inf
    for value in _log_ticks(low, high) if histogram.is_log else _ticks(low, high):
        at, text = _place(value, histogram, edges), shown_number(value)
        half = len(text) * CHARACTER_PIXELS / 2
        middle = min(max(at, LEFT + half), WIDTH - RIGHT - half)
        if middle - half < taken + 10:
            continue
        taken = middle + half
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(text)}</text>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{step * number:.10g}") for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > NUM_TICKS else (1, 3) if len(powers) > 3 else (1, 2, 5)
    values = [float(f"{factor * 10.0**power:.3g}") for power in powers for factor in factors]
    return [value for value in values if low <= value <= high]
