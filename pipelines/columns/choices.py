"""Which samples of a run a table of features chooses, and how often each is drawn: looked at, and nothing written.

`written_choices` keeps it on the disk, for features and training to read.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.columns.caption_columns import RunCaptions
from pipelines.columns.choice_counts import ChoiceCounts, ClauseCounts, WeightCounts, describe_counts, sum_counts
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.columns.expressions import Expression
from pipelines.columns.sample_columns import SampleColumns
from pipelines.engine.progress import get_logger

MAX_FLOAT32 = float(np.finfo(np.float32).max)
NUM_READERS = 8
SHARDS_AT_ONCE = 64

log = get_logger("choices")


@dataclass(frozen=True, kw_only=True)
class ShardChoice:
    """What a choice makes of a shard's samples, in raw order, n of them.

    Attributes:
        keys: of the samples.
        clauses: of `where`, in written order; for each whether it is true, and whether it is unknown, bool [n] both.
        chosen: bool [n].
        weight: as `weight` says, before a temperature; NaN where it is unknown, float64 [n]. None where there is none.
        caption_weights: the same of each caption whose weight is an expression.
        counts: of all this.
    """

    shard: str
    keys: pa.ChunkedArray
    clauses: Sequence[tuple[Expression, np.ndarray, np.ndarray]]
    chosen: np.ndarray
    weight: np.ndarray | None
    caption_weights: Mapping[str, np.ndarray]
    counts: ChoiceCounts


class Choice:
    """The choice of one table of the recipe in a run; `columns` are the run's, where they have been looked for."""

    def __init__(self, run: Path, settings: ChoiceSettings, *, columns: SampleColumns | None = None) -> None:
        self.run = run
        self.settings = settings
        self.columns = SampleColumns(run) if columns is None else columns
        # Of shards that were looked at, eight samples a byte.
        self._chosen: dict[str, tuple[np.ndarray, int]] = {}

    def check(self, shards: Iterable[str]) -> None:
        """Find out, before anything runs, what is wrong with the expressions, or missing for some of the shards.

        Raises:
            UserError, MissingFileError: as `SampleColumns.check`, and as `RunCaptions.find` for captions with weights.
        """
        names, settings = sorted(shards), self.settings
        if settings.where_expression is not None:
            self.columns.check(settings.where_expression, "bool", shards=names)
        if settings.weight_expression is not None:
            self.columns.check(settings.weight_expression, "number", shards=names)
        captions = RunCaptions(self.run)
        for column, expression in settings.caption_expressions.items():
            captions.find(column, key=expression.key)
            self.columns.check(expression, "number", shards=names, caption=column)

    def hashes(self, shard: str) -> dict[str, str]:
        """Return the SHA-256 of each file of columns that the shard's choice is made of, by the name of its folder."""
        settings = self.settings
        found = self.columns.hashes(shard, self._own_names)
        for column, expression in settings.caption_expressions.items():
            found |= self.columns.hashes(shard, expression.names, caption=column)
        return dict(sorted(found.items()))

    @cached_property
    def _own_names(self) -> list[str]:
        expressions = [self.settings.where_expression, self.settings.weight_expression]
        return list(dict.fromkeys(name for each in expressions if each is not None for name in each.names))

    def evaluate(self, shard: str) -> ShardChoice:
        """Return what is chosen of a shard.

        Raises:
            UserError: a weight is negative or infinite; names the sample. Or as `SampleColumns.read`.
        """
        settings = self.settings
        table = self.columns.read(shard, self._own_names)
        num_samples = table.num_rows
        where = settings.where_expression
        clauses = [(clause, *_truth(clause, table)) for clause in (where.clauses if where is not None else ())]
        chosen = np.ones(num_samples, bool)
        clause_counts = []
        for clause, is_true, is_unknown in clauses:
            clause_counts.append(
                ClauseCounts(
                    text=clause.text,
                    removes_alone=int((~is_true).sum()),
                    removes_after=int((chosen & ~is_true).sum()),
                    unknown=int(is_unknown.sum()),
                )
            )
            chosen &= is_true
        weight = weight_counts = None
        if settings.weight_expression is not None:
            weight = _numbers(settings.weight_expression, table)
            is_any_sign = settings.weight_temperature is not None
            _require_weights(weight, chosen, table["key"], settings.weight_expression, shard, is_any_sign=is_any_sign)
            weight_counts = _count_weight(settings.weight_expression, weight, chosen, is_any_sign=is_any_sign)
            chosen &= ~np.isnan(weight)
        captions = {
            column: self._caption_weight(column, shard, table["key"], chosen) for column in settings.caption_weights
        }
        self._chosen[shard] = np.packbits(chosen), num_samples
        return ShardChoice(
            shard=shard,
            keys=table["key"],
            clauses=clauses,
            chosen=chosen,
            weight=weight,
            caption_weights=captions,
            counts=ChoiceCounts(
                num_samples=num_samples,
                num_chosen=int(chosen.sum()),
                clauses=clause_counts,
                weight=weight_counts,
                caption_weights={
                    column: _count_weight(settings.caption_expressions[column], values, chosen, is_any_sign=False)
                    for column, values in captions.items()
                },
            ),
        )

    def chosen(self, shard: str) -> np.ndarray:
        """Return which samples of a shard are chosen, bool [n]; raises as `evaluate`."""
        if shard not in self._chosen:
            self.evaluate(shard)
        bits, num_samples = self._chosen[shard]
        return np.unpackbits(bits, count=num_samples).astype(bool)

    def command_of(self, shard: str) -> str:
        """Return the commands that make the columns of a shard's choice."""
        folders = self.hashes(shard)
        return " and ".join(dict.fromkeys(each.command for each in self.columns.folders if each.name in folders))

    def _caption_weight(self, column: str, shard: str, keys: pa.ChunkedArray, chosen: np.ndarray) -> np.ndarray:
        expression = self.settings.caption_expressions[column]
        table = self.columns.read(shard, expression.names, caption=column)
        if not keys.equals(table["key"]):
            where = self.settings.key("where")
            raise UserError(
                f"{expression.key}: its columns of {shard} are not of the same samples as those of {where}: "
                f"`{typed_command('verify', {'run': self.run})}` tells which are old"
            )
        values = _numbers(expression, table)
        _require_weights(values, chosen, keys, expression, shard, is_any_sign=False)
        return values

    def evaluate_each(self, shards: Sequence[str]) -> Iterator[ShardChoice]:
        """Yield what `evaluate` returns of each shard, in order; several are read at once."""
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for start in range(0, len(shards), SHARDS_AT_ONCE):
                yield from pool.map(self.evaluate, shards[start : start + SHARDS_AT_ONCE])

    def count(self, shards: Sequence[str]) -> dict[str, ChoiceCounts]:
        """Return the counts of each shard, without writing anything; raises as `check` and `evaluate`."""
        self.check(shards)
        return {found.shard: found.counts for found in self.evaluate_each(shards)}


def require_some(counts: Iterable[ChoiceCounts], choice: Choice) -> ChoiceCounts:
    """Return the sum of counts that can be trained on; a choice that chooses all is said to be one, in a warning.

    Raises:
        UserError: it chooses nothing, or all of its weights are zero; with the counts of each clause, and what makes a
            column that is known of no sample.
    """
    total, settings = sum_counts(counts), choice.settings
    told = "; ".join(describe_counts(total))
    if not total.num_chosen:
        key = settings.key("weight" if settings.where is None else "where")
        raise UserError(
            f"{key} = {settings.where or settings.weight!r} keeps nothing: {told}{_what_to_make(total, choice)}"
        )
    if total.weight is not None and total.weight.zero == total.num_chosen:
        raise UserError(f"{settings.key('weight')} = {settings.weight!r} is 0 for every sample that is chosen: {told}")
    if settings.where is not None and total.num_chosen == total.num_samples:
        log.warning(f"{settings.key('where')} = {settings.where!r} keeps everything: {told}")
    return total


def _what_to_make(total: ChoiceCounts, choice: Choice) -> str:
    """Return the commands that make columns of scores which captions have the names of, and no values."""
    where = choice.settings.where_expression
    clauses = zip(where.clauses if where is not None else (), total.clauses, strict=True)
    names = [name for clause, found in clauses if found.unknown == total.num_samples for name in clause.names]
    made = {name: choice.columns.what_would_make(name) for name in dict.fromkeys(names)}
    return "".join(f"; {name} is known of no sample: {command} makes it" for name, command in made.items() if command)


def _truth(clause: Expression, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    values = clause.evaluate(table)
    is_unknown = np.asarray(values.is_null())
    return np.asarray(values.fill_null(False)), is_unknown


def _numbers(expression: Expression, table: pa.Table) -> np.ndarray:
    return np.asarray(expression.evaluate(table).fill_null(math.nan), np.float64)


def _require_weights(
    values: np.ndarray,
    chosen: np.ndarray,
    keys: pa.ChunkedArray,
    expression: Expression,
    shard: str,
    *,
    is_any_sign: bool,
) -> None:
    """Refuse a weight that cannot be drawn by, of a sample that is chosen."""
    largest = math.inf if is_any_sign else MAX_FLOAT32
    is_wrong = np.isinf(values) | (~np.isnan(values) & (np.abs(values) > largest))
    if not is_any_sign:
        is_wrong |= values < 0
    wrong = np.flatnonzero(is_wrong & chosen)
    if len(wrong):
        first = int(wrong[0])
        needed = "a finite number" if is_any_sign else f"0 or more, and at most {MAX_FLOAT32:.0e}"
        more = f", and for {len(wrong) - 1:,} more of its samples" if len(wrong) > 1 else ""
        raise UserError(
            f"{expression.key}: {expression.text} is {values[first]:g} for {keys[first].as_py()!r} of {shard}{more}; "
            f"a weight is {needed}: write max(…, 0), coalesce, or leave such samples out by where"
        )


def _count_weight(expression: Expression, values: np.ndarray, chosen: np.ndarray, *, is_any_sign: bool) -> WeightCounts:
    own = values[chosen]
    known = own[~np.isnan(own)]
    return WeightCounts(
        text=expression.text,
        unknown=len(own) - len(known),
        # As it is written, which may be too small a number for float32.
        zero=0 if is_any_sign else int((known.astype(np.float32) == 0).sum()),
        least=float(known.min()) if len(known) else None,
        most=float(known.max()) if len(known) else None,
    )
