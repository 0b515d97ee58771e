"""What a choice does to the samples of a run, shard by shard: two passes over their columns, in bounded memory.

The first counts, finds what lies nearest to each cut and draws some values by lot; the second fills histograms, whose
bars the first has laid out, and sums up weights.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from curation.choose.draws import Draws
from curation.choose.histograms import Histogram, empty_histogram
from curation.choose.measures import Measure, measures_of, shown
from curation.choose.picks import Example, Picks, Sample, lots_of
from curation.choose.tables import ChoosingTable
from pipelines.columns.choice_counts import ChoiceCounts, sum_counts
from pipelines.columns.choices import NUM_READERS, ShardChoice
from pipelines.columns.expressions import Expression
from pipelines.engine.progress import progress_bar

# What becomes of a sample, as one clause sees it.
CHOSEN, LOST, LOST_TO_OTHERS = range(3)
NUM_EXAMPLES, NUM_DRAWN = 8, 20_000
# Of a measure that is no number; further ones are counted together.
MAX_VALUES = 1_000


@dataclass(frozen=True, kw_only=True)
class ShardLook:
    """A shard's choice, the lots of its samples, and the values of each measure of each clause."""

    found: ShardChoice
    lots: np.ndarray
    values: Sequence[Sequence[np.ndarray | pa.Array]]

    @cached_property
    def keys(self) -> list[str]:
        """Of its samples."""
        return self.found.keys.to_pylist()

    def fates(self, clause: int) -> np.ndarray:
        """Return what becomes of each sample as a clause sees it, int [n]."""
        is_true = self.found.clauses[clause][1]
        return np.where(self.found.chosen, CHOSEN, np.where(is_true, LOST_TO_OTHERS, LOST))

    def example(self, row: int, value: float | None = None) -> Example:
        """Return one of its samples."""
        failed = tuple(number for number, (_, is_true, _) in enumerate(self.found.clauses) if not is_true[row])
        return Example(
            shard=self.found.shard,
            key=self.keys[row],
            value=value,
            failed=failed,
            is_chosen=bool(self.found.chosen[row]),
        )


@dataclass
class NumberSurvey:
    """What is found of a measure that is a number.

    Attributes:
        lower, upper: by cut, the samples nearest to it on either side.
        num_unknown: samples of which it is not known.
        histogram: of the others by fate, after the second pass.
    """

    measure: Measure
    drawn: Sample = field(default_factory=lambda: Sample(NUM_DRAWN))
    lower: list[Picks] = field(init=False)
    upper: list[Picks] = field(init=False)
    num_unknown: int = 0
    histogram: Histogram | None = None

    def __post_init__(self) -> None:
        self.lower, self.upper = ([Picks(NUM_EXAMPLES) for _ in self.measure.cuts] for _ in range(2))

    def look(self, values: np.ndarray, look: ShardLook) -> None:
        """Take part of the first pass."""
        is_finite, is_known = np.isfinite(values), ~np.isnan(values)
        self.num_unknown += int((~is_known).sum())
        self.drawn.offer(values[is_finite], look.lots[is_finite])
        for cut, lower, upper in zip(self.measure.cuts, self.lower, self.upper, strict=True):
            is_above = cut.is_above(values)
            for picks, side in ((lower, is_known & ~is_above), (upper, is_above)):
                rows = np.flatnonzero(side)
                distances = np.abs(values[rows] - cut.value)
                picks.offer(rows, distances, look.lots[rows], lambda row: look.example(row, float(values[row])))

    def count(self, values: np.ndarray, fates: np.ndarray) -> None:
        """Take part of the second pass."""
        if self.histogram is None:
            is_integer, cuts = self.measure.is_integer, self.measure.cuts
            self.histogram = empty_histogram(self.drawn.values, cuts, is_integer=is_integer, num_groups=3)
        is_known = ~np.isnan(values)
        self.histogram.add(values[is_known], fates[is_known])


@dataclass
class ValueSurvey:
    """What is found of a measure that is a text, or true or false: counts by value (None: unknown) and fate."""

    measure: Measure
    counts: dict[str | None, Counter[int]] = field(default_factory=dict)
    others: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.counts |= {name: Counter() for name in self.measure.named}

    def look(self, values: pa.Array, fates: np.ndarray) -> None:
        """Take part of the first pass."""
        table = pa.table({"value": values, "fate": fates})
        for row in table.group_by(["value", "fate"]).aggregate([([], "count_all")]).to_pylist():
            value = None if row["value"] is None else shown(row["value"])
            if value is None or value in self.counts or len(self.counts) < MAX_VALUES:
                self.counts.setdefault(value, Counter())[row["fate"]] += row["count_all"]
            else:
                self.others[row["fate"]] += row["count_all"]


@dataclass
class ClauseSurvey:
    """What is found of a clause; `lost` are some of the samples that it removes, where no cut shows them."""

    clause: Expression
    measures: list[NumberSurvey | ValueSurvey]
    lost: Picks = field(default_factory=lambda: Picks(NUM_EXAMPLES))

    @property
    def has_cuts(self) -> bool:
        """Whether some number is compared with another."""
        return any(each.measure.cuts for each in self.measures)


class Survey:
    """What a table's choice does to the samples of its shards.

    Attributes:
        counts: by shard.
        clauses: of `where`.
        kept, lost: some samples that are chosen, and some that are not.
        draws: how often those that are chosen are drawn.
    """

    def __init__(self, table: ChoosingTable, shards: Sequence[str]) -> None:
        self.table = table
        self.counts: dict[str, ChoiceCounts] = {}
        self.kept, self.lost = Picks(NUM_EXAMPLES), Picks(NUM_EXAMPLES)
        self.draws = Draws(table, num_examples=NUM_EXAMPLES, num_drawn=NUM_DRAWN)
        choice = table.choice
        choice.check(shards)
        where, schema = choice.settings.where_expression, choice.columns.schema()
        clauses = where.clauses if where is not None else ()
        self.clauses = [
            ClauseSurvey(
                clause,
                [NumberSurvey(each) if each.is_number else ValueSurvey(each) for each in measures_of(clause, schema)],
            )
            for clause in clauses
        ]
        with progress_bar("choose", 2 * len(shards), unit="shards") as progress:
            for look in self._looks(shards):
                self._first(look)
                progress.advance(1, note=look.found.shard)
            self.draws.begin(self.total)
            for look in self._looks(shards):
                self._second(look)
                progress.advance(1, note=look.found.shard)

    @cached_property
    def total(self) -> ChoiceCounts:
        """The counts of all shards."""
        return sum_counts(self.counts.values())

    def examples(self) -> list[Example]:
        """Return all samples that were picked."""
        picks = [self.kept, self.lost, self.draws.most_drawn, *(each.lost for each in self.clauses)]
        numbers = [each for clause in self.clauses for each in clause.measures if isinstance(each, NumberSurvey)]
        picks += [side for each in numbers for side in (*each.lower, *each.upper)]
        return [example for each in picks for example in each.examples]

    def _looks(self, shards: Sequence[str]) -> Iterator[ShardLook]:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for start in range(0, len(shards), NUM_READERS):
                yield from pool.map(self._look, shards[start : start + NUM_READERS])

    def _look(self, shard: str) -> ShardLook:
        found = self.table.choice.evaluate(shard)
        measures = [[each.measure for each in clause.measures] for clause in self.clauses]
        names = dict.fromkeys(name for own in measures for each in own for name in each.expression.names)
        columns = self.table.choice.columns.read(shard, list(names))
        return ShardLook(
            found=found,
            lots=lots_of(shard, found.keys.to_pylist()),
            values=[
                [each.numbers(columns) if each.is_number else each.values(columns) for each in own] for own in measures
            ],
        )

    def _first(self, look: ShardLook) -> None:
        found = look.found
        self.counts[found.shard] = found.counts
        for number, (clause, values) in enumerate(zip(self.clauses, look.values, strict=True)):
            fates = look.fates(number)
            for each, own in zip(clause.measures, values, strict=True):
                if isinstance(each, NumberSurvey):
                    assert isinstance(own, np.ndarray)
                    each.look(own, look)
                else:
                    each.look(own, fates)
            if not clause.has_cuts:
                _draw(clause.lost, fates == LOST, look)
        self.draws.look(found, look.lots, look.example)
        _draw(self.kept, found.chosen, look)
        _draw(self.lost, ~found.chosen, look)

    def _second(self, look: ShardLook) -> None:
        for number, (clause, values) in enumerate(zip(self.clauses, look.values, strict=True)):
            fates = look.fates(number)
            for each, own in zip(clause.measures, values, strict=True):
                if isinstance(each, NumberSurvey):
                    assert isinstance(own, np.ndarray)
                    each.count(own, fates)
        self.draws.count(look.found)


def _draw(picks: Picks, mask: np.ndarray, look: ShardLook) -> None:
    """Draw by lot from the samples of a mask."""
    rows = np.flatnonzero(mask)
    picks.offer(rows, np.zeros(len(rows)), look.lots[rows], look.example)
