"""Charts of the page: shares with their intervals in rows, and curves with bands, as inline SVG without own colours."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from toyworld.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, grid_lines, polyline
from toyworld.paper.estimates import Estimate

ROW, NAME_WIDTH, VALUE_WIDTH = 30, 152, 54
DOT = 4


def rows_chart(rows: Mapping[str, Estimate], *, label: str) -> Markup:
    """Return an SVG of a dot with its 95% interval for each named share, and a small dot for each seed."""
    height = ROW * len(rows) + BOTTOM
    highest = min(1.0, max(row.high for row in rows.values()) * 1.04)
    lowest = max(0.0, min(row.low for row in rows.values()) - 0.05)
    x = Scale(100 * lowest, max(100 * highest, 100 * lowest + 5), NAME_WIDTH, WIDTH - VALUE_WIDTH)
    parts = []
    for value in x.ticks():
        at = x.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{height - BOTTOM + 4}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 12}" text-anchor="middle">{value:g}</text>')
    for number, (name, row) in enumerate(rows.items()):
        y = ROW * number + ROW / 2 + 2
        low, high, at = (x.place(100 * min(max(value, lowest), highest)) for value in (row.low, row.high, row.value))
        parts.append(
            f'<text class="name" x="{NAME_WIDTH - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        parts.append(f'<line class="interval" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        if len(row.by_seed) > 1:
            seeds = (x.place(100 * value) for value in row.by_seed.values())
            parts += [f'<circle class="seed" cx="{seed:.1f}" cy="{y}" r="2"/>' for seed in seeds]
        parts.append(f'<circle class="value" cx="{at:.1f}" cy="{y}" r="{DOT}"/>')
        parts.append(f'<text class="name" x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{100 * row.value:.1f}%</text>')
    return _svg(parts, height, label)


def curves_chart(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    label: str,
    is_log: bool = False,
    is_share: bool = True,
    ticks: Sequence[float] | None = None,
) -> Markup:
    """Return an SVG of named curves of (x, share or other figure), a dot at each point; shares are drawn in percent.

    Curves are told apart by their dashes and by their names, in the order of a list above the chart.
    """
    factor = 100.0 if is_share else 1.0
    numbers = [x for points in curves.values() for x, _ in points]
    values = [factor * y for points in curves.values() for _, y in points]
    y = _scale(values, HEIGHT - BOTTOM, TOP) if not is_share else Scale(0.0, 100.0, HEIGHT - BOTTOM, TOP)
    x = _scale([*numbers, 0.0] if is_share and not is_log else numbers, LEFT, WIDTH - RIGHT, is_log=is_log)
    parts = grid_lines(x, y, ticks=ticks)
    key_height = 16 * len(curves) + 4
    key = []
    for number, (name, points) in enumerate(curves.items()):
        style = f"curve curve-{number}"
        placed = [(at, factor * value) for at, value in points]
        parts.append(polyline(placed, x, y, name=style))
        parts += [
            f'<circle class="curve-{number}" cx="{x.place(at):.1f}" cy="{y.place(value):.1f}" r="3"/>'
            for at, value in placed
        ]
        row = 16 * number + 8 - key_height
        key.append(f'<polyline class="{style}" points="{LEFT},{row} {LEFT + 26},{row}"/>')
        key.append(f'<circle class="curve-{number}" cx="{LEFT + 13}" cy="{row}" r="3"/>')
        key.append(f'<text x="{LEFT + 34}" y="{row + 3.5}">{escape(name)}</text>')
    return _svg([*key, *parts], HEIGHT, label, above=key_height)


def _scale(values: Sequence[float], start: float, stop: float, *, is_log: bool = False) -> Scale:
    """An axis from the least to the largest value; one as wide as a value is large where all are the same."""
    low, high = min(values), max(values)
    if high <= low:
        high = low + (abs(low) or 1.0)
    return Scale(low, high, start, stop, is_log=is_log)


def _svg(parts: Sequence[str], height: float, label: str, *, above: int = 0) -> Markup:
    box = f"0 {-above} {WIDTH} {height + above:g}"
    return Markup(f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')
