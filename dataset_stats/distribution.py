"""How a whole number is spread over captions: counted value by value, so that parts add up and nothing is rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QUANTILES = {"5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}


@dataclass
class Distribution:
    """Counts of the values 0, 1, 2, ...; memory grows with the largest value, not with the number of captions."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, values: np.ndarray) -> None:
        """Count more values, integers from 0 on."""
        new = np.bincount(values, minlength=len(self.counts))
        new[: len(self.counts)] += self.counts
        self.counts = new

    @property
    def num(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Sum of the values."""
        return int(self.counts @ np.arange(len(self.counts)))

    @property
    def mean(self) -> float:
        """Mean; 0 without values."""
        return self.total / self.num if self.num else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation over the captions counted; 0 without values."""
        if not self.num:
            return 0.0
        squares = float(self.counts @ np.square(np.arange(len(self.counts), dtype=np.float64)))
        return math.sqrt(max(squares / self.num - self.mean**2, 0.0))

    def quantile(self, fraction: float) -> float:
        """The value below which `fraction` of the values lie, interpolated as NumPy and pandas do by default."""
        if not self.num:
            return 0.0
        ends = np.cumsum(self.counts)
        rank = fraction * (self.num - 1)
        below, above = np.searchsorted(ends, (math.floor(rank), math.ceil(rank)), side="right").tolist()
        return below + (rank - math.floor(rank)) * (above - below)

    def summary(self) -> dict[str, float]:
        """Mean, standard deviation, minimum, quantiles and maximum."""
        return {
            "mean": self.mean,
            "s.d.": self.deviation,
            "min": self.quantile(0),
            **{name: self.quantile(fraction) for name, fraction in QUANTILES.items()},
            "max": self.quantile(1),
        }

    def histogram(self, width: int, num_bars: int) -> list[int]:
        """Counts of `num_bars` bars of `width` values each, the first from 0 on; the last has all beyond it, too."""
        padded = np.zeros(max(width * num_bars, len(self.counts)), dtype=np.int64)
        padded[: len(self.counts)] = self.counts
        bars = padded[: width * num_bars].reshape(num_bars, width).sum(axis=1)
        bars[-1] += padded[width * num_bars :].sum()
        return bars.tolist()

    def as_json(self, num_bars: int) -> dict[str, Any]:
        """Summary and histogram for a manifest."""
        width = bar_width([self], num_bars)
        return {**self.summary(), "histogram": {"width": width, "counts": self.histogram(width, num_bars)}}


def bar_width(distributions: Sequence[Distribution], num_bars: int) -> int:
    """The width of bars, in values, by which none of the distributions needs more than `num_bars`."""
    return max(1, *(-(-len(distribution.counts) // num_bars) for distribution in distributions))
