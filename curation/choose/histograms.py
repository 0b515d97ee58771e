"""Histograms whose bars do not cross a cut: it is an edge between two of them, and what lies on it is on its side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from curation.choose.measures import Cut

# A histogram shows all but so much at each end; what lies beyond is in the first and the last bar.
END_SHARE = 0.005
NUM_BARS = 40
# Where the values are above 0 and the largest is so many times the middle one, or the middle one the least, equal bars
# would hold all in one.
LOG_RATIO = 30.0


@dataclass(kw_only=True)
class Histogram:
    """Counts by bar and group.

    Attributes:
        edges: of the bars, rising, float64 [bars + 1].
        is_log: whether the bars are as wide as each other by their logarithm.
        is_right_closed: whether a value on an edge is in the bar below it; else in that above.
        counts: float64 [bars, groups].
        num_below, num_above: how many values lie beyond the ends, and are counted in the first and the last bar.
    """

    edges: np.ndarray
    is_log: bool
    is_right_closed: bool
    counts: np.ndarray
    num_below: int = field(default=0)
    num_above: int = field(default=0)

    def add(self, values: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count values that are not NaN, each in its group; infinite ones are in the first or the last bar."""
        side = "left" if self.is_right_closed else "right"
        places = np.searchsorted(self.edges, values, side=side) - 1
        num_bars, num_groups = self.counts.shape
        # The edge at either end is of its bar, whatever the side.
        self.num_below += int((values < self.edges[0]).sum())
        self.num_above += int((values > self.edges[-1]).sum())
        flat = np.clip(places, 0, num_bars - 1) * num_groups + groups
        self.counts += np.bincount(flat, weights, minlength=num_bars * num_groups).reshape(self.counts.shape)


def empty_histogram(drawn: np.ndarray, cuts: Sequence[Cut], *, is_integer: bool, num_groups: int) -> Histogram:
    """Return a histogram for values like some that were drawn, with nothing counted.

    Args:
        drawn: values, finite, in rising order, [n].
        cuts: are edges of bars, as nearly as a bar of one width allows.
        is_integer: whether all values are whole numbers.
        num_groups: that are told apart.
    """
    at = [cut.value for cut in cuts if math.isfinite(cut.value)]
    low, high = _range(drawn, at)
    middle = float(drawn[len(drawn) // 2]) if len(drawn) else low
    is_log = low > 0 and all(value > 0 for value in at) and max(high / middle, middle / low) > LOG_RATIO
    if is_log:
        edges = np.exp(_edges(math.log(low), math.log(high), [math.log(value) for value in at], is_integer=False))
    else:
        edges = _edges(low, high, at, is_integer=is_integer)
    for value in reversed(at):  # what rounding has done to it; the first has the last word
        nearest = int(np.abs(edges - value).argmin())
        width = edges[min(nearest + 1, len(edges) - 1)] - edges[max(nearest - 1, 0)]
        if abs(edges[nearest] - value) < 1e-6 * width:
            edges[nearest] = value
    is_right_closed = bool(cuts) and cuts[0].is_at_cut_lower
    counts = np.zeros((len(edges) - 1, num_groups))
    return Histogram(edges=edges, is_log=is_log, is_right_closed=is_right_closed, counts=counts)


def _range(drawn: np.ndarray, cuts: Sequence[float]) -> tuple[float, float]:
    if len(drawn):
        reach = int(END_SHARE * len(drawn))
        ends = [float(drawn[reach]), float(drawn[len(drawn) - 1 - reach])]
    else:
        ends = []
    ends += cuts
    return (min(ends), max(ends)) if ends else (0.0, 1.0)


def _edges(low: float, high: float, cuts: Sequence[float], *, is_integer: bool) -> np.ndarray:
    """Return edges of equal bars around low to high, of which the first cut is one, and the second where it can be."""
    if high <= low:
        # Of one value alone, and of numbers so large that their neighbours are far.
        reach = max(1.0 if is_integer else 0.5, 4 * abs(math.ulp(low)))
        low, high = low - reach, high + reach
    width = (high - low) / NUM_BARS
    if is_integer:
        width = float(max(1, math.ceil(width)))
    elif len(cuts) > 1 and (num_between := round((cuts[1] - cuts[0]) / width)) > 0:
        width = (cuts[1] - cuts[0]) / num_between
    anchor = cuts[0] if cuts else low
    if cuts:  # a bar on either side, as values beyond the ends are in the first and the last one
        low, high = min(low, min(cuts) - width), max(high, max(cuts) + width)
    first, last = math.floor((low - anchor) / width), math.ceil((high - anchor) / width)
    if anchor + last * width <= high:  # the largest value is on the last edge, which is of the bar above
        last += 1
    return anchor + width * np.arange(first, max(last, first + 1) + 1)
