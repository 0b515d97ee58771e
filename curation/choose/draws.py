"""How often chosen samples are drawn, and which of their captions: by the weights of a table."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.choose.histograms import Histogram, empty_histogram
from curation.choose.picks import Example, Picks, Sample
from curation.choose.tables import ChoosingTable
from pipelines.columns.choice_counts import ChoiceCounts, source_of
from pipelines.columns.choices import ShardChoice
from pipelines.columns.evaluation import kind_of
from pipelines.columns.written_choices import relative_weights

SAMPLES, DRAWS = range(2)


class Draws:
    """What two passes over the shards find of the weights.

    Attributes:
        histogram: of the weight as it is written, before a temperature: group `SAMPLES` counts those that are chosen,
            `DRAWS` sums up what they are drawn by. None where the table has no weight.
        most_drawn: those of the largest weights.
        by_source: the sum of weights of each source.
        captions: by column, the draws that go to it; those of samples without a caption that could be drawn are
            `without`.
    """

    def __init__(self, table: ChoosingTable, *, num_examples: int, num_drawn: int) -> None:
        self._table = table
        self._drawn = Sample(num_drawn)
        self._scale: float | None = None
        self._sum_of_squares = self._largest = 0.0
        self.most_drawn = Picks(num_examples)
        self.histogram: Histogram | None = None
        self.by_source: defaultdict[str, float] = defaultdict(float)
        self.captions: dict[str, float] = dict.fromkeys(table.caption_weights, 0.0)
        self.without = 0.0

    @property
    def sum(self) -> float:
        """The sum of all weights, relative to the largest where there is a temperature."""
        return sum(self.by_source.values())

    @property
    def effective_number(self) -> float:
        """How many samples of equal weight would vary as much: (sum of weights)² / sum of their squares."""
        return self.sum**2 / self._sum_of_squares if self._sum_of_squares else 0.0

    def share_of_largest(self, num_chosen: int) -> float:
        """Return how many times as often as the mean the sample of the largest weight is drawn."""
        return self._largest * num_chosen / self.sum if self.sum else 0.0

    def look(self, found: ShardChoice, lots: np.ndarray, make: Callable[[int, float], Example]) -> None:
        """Take part of the first pass."""
        weight = found.weight
        if weight is None:
            return
        rows = np.flatnonzero(found.chosen)
        self._drawn.offer(weight[rows], lots[rows])
        self.most_drawn.offer(rows, -weight[rows], lots[rows], lambda row: make(row, float(weight[row])))

    def begin(self, total: ChoiceCounts) -> None:
        """Lay out the second pass, when all shards have been counted."""
        if total.weight is not None:
            self._scale = total.weight.most
            self.histogram = empty_histogram(self._drawn.values, (), is_integer=False, num_groups=2)

    def count(self, found: ShardChoice) -> None:
        """Take part of the second pass."""
        temperature = self._table.settings.weight_temperature
        weights = relative_weights(found.weight, self._scale, temperature=temperature)
        own = np.ones(int(found.chosen.sum())) if weights is None else weights[found.chosen]
        self.by_source[source_of(found.shard)] += float(own.sum())
        self._sum_of_squares += float((own**2).sum())
        self._largest = max(self._largest, float(own.max(initial=0.0)))
        if self.histogram is not None and found.weight is not None:
            raw = found.weight[found.chosen]
            self.histogram.add(raw, np.full(len(raw), SAMPLES))
            is_beyond = self.histogram.num_below, self.histogram.num_above
            self.histogram.add(raw, np.full(len(raw), DRAWS), own)
            self.histogram.num_below, self.histogram.num_above = is_beyond
        if len(self.captions) > 1:
            self._count_captions(found, own)

    def _count_captions(self, found: ShardChoice, own: np.ndarray) -> None:
        """Add what each column has of the draws of a shard, by the weights of the captions that a sample has."""
        shares = np.zeros((len(self.captions), len(own)))
        for number, (column, weight) in enumerate(self._table.caption_weights.items()):
            if isinstance(weight, str):
                shares[number] = np.nan_to_num(found.caption_weights[column][found.chosen])
            else:
                shares[number] = np.where(self._has_caption(found, column)[found.chosen], weight, 0.0)
        totals = shares.sum(axis=0)
        has_some = totals > 0
        for number, column in enumerate(self.captions):
            self.captions[column] += float((own[has_some] * shares[number, has_some] / totals[has_some]).sum())
        self.without += float(own[~has_some].sum())

    def _has_caption(self, found: ShardChoice, column: str) -> np.ndarray:
        columns = self._table.choice.columns
        schema = columns.schema()
        if column not in schema.names or kind_of(schema.field(column).type) != "text":
            return np.ones(len(found.chosen), bool)  # a text of another kind, of which columns say nothing
        texts = columns.read(found.shard, [column])[column]
        return np.asarray(pc.call_function("not_equal", [texts, pa.scalar("")]).fill_null(False))
