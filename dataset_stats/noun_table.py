"""One pass over the merged nouns: DN and VN, the files for analysts, and what the report shows of them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_stats.measures import SetMeasures
from pipelines.store.files import atomic_file

ROWS_PER_BATCH = 65_536
NUM_CHANGES = 15  # nouns shown as gained and as lost
NUM_ZIPF_POINTS = 200
TOTAL = " total"  # column of all sets together; no set can be called so, since no name begins with a space
PER_CAPTIONS = 1000
# A spreadsheet takes a cell that starts with one of these for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass
class NounTable:
    """What the report shows of the nouns.

    Attributes:
        top: the most frequent nouns over all sets: noun, one count column per set, `<set> example`.
        gained: by set, the nouns whose rate rose most against the first set, or of a set with `where`, against the one
            that it chooses from: noun, before, after (per 1000 captions), kept (the share of the occurrences before).
        lost: by set, the nouns whose rate fell most.
        zipf: by set, (rank, occurrences) at about evenly spaced logarithms of the rank.
    """

    top: pd.DataFrame
    gained: dict[str, pd.DataFrame] = field(default_factory=dict)
    lost: dict[str, pd.DataFrame] = field(default_factory=dict)
    zipf: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


def write_noun_table(
    merged: Path,
    folder: Path,
    *,
    measures: Mapping[str, SetMeasures],
    valid_threshold: int,
    num_top: int,
    singular: Callable[[str], str] | None,
) -> NounTable:
    """Write nouns.parquet and nouns.csv, fill in DN and VN of `measures`, and give what the report shows.

    Args:
        merged: file of `merge_counts`.
        folder: RUN/stats.
        singular: folds plurals; gives both files a column `singular` and `measures` the folded DN and VN.
    """
    names = list(measures)
    collector = _Collector(names, measures, num_top=num_top)
    columns = ["noun", *(["singular"] if singular else []), *names]
    schema = pa.schema([pa.field(name, pa.int64() if name in measures else pa.string()) for name in columns])
    with (
        pq.ParquetFile(merged) as source,
        atomic_file(folder / "nouns.parquet") as parquet_path,
        pq.ParquetWriter(parquet_path, schema, compression="zstd") as parquet,
        atomic_file(folder / "nouns.csv") as csv_path,
        csv_path.open("w", newline="", encoding="utf-8") as csv_file,
    ):
        rows = csv.writer(csv_file)
        rows.writerow(columns)
        for batch in source.iter_batches(batch_size=ROWS_PER_BATCH):
            # Filled before pandas, which would make floats of the columns, and lose places by rounding.
            columns_filled = [pc.fill_null(column, 0) for column in batch.columns[1:]]
            frame = pa.table([batch.columns[0], *columns_filled], names=batch.schema.names).to_pandas()
            if singular:
                frame["singular"] = [singular(noun) for noun in frame["noun"]]
            parquet.write_table(pa.Table.from_pandas(frame[columns], schema=schema, preserve_index=False))
            rows.writerows(
                [safe_cell(value) if isinstance(value, str) else value for value in row]
                for row in frame[columns].itertuples(index=False)
            )
            collector.add(frame)
    table = collector.finish(valid_threshold=valid_threshold)
    if singular:
        _fold(folder / "nouns.parquet", collector.plurals, measures, valid_threshold=valid_threshold)
    return table


def _fold(
    nouns: Path, plurals: Mapping[str, str], measures: Mapping[str, SetMeasures], *, valid_threshold: int
) -> None:
    """Fill in the folded DN and VN: what the plurals and their singulars count for apart, and what they do together."""
    wanted = plurals.keys() | plurals.values()
    singulars: list[str] = []
    rows: list[tuple[int, ...]] = []
    with pq.ParquetFile(nouns) as source:
        for batch in source.iter_batches(batch_size=ROWS_PER_BATCH, columns=["noun", *measures]):
            for noun, *counts in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if noun in wanted:
                    singulars.append(plurals.get(noun, noun))
                    rows.append(tuple(counts))
    groups = np.unique(singulars, return_inverse=True)[1]
    for name, apart in zip(measures, np.array(rows, dtype=np.int64).reshape(-1, len(measures)).T, strict=True):
        together = np.bincount(groups, weights=apart) if len(groups) else apart
        measure = measures[name]
        fewer = np.count_nonzero(apart) - np.count_nonzero(together)
        more = np.count_nonzero(together > valid_threshold) - np.count_nonzero(apart > valid_threshold)
        measure.folded_distinct_nouns = measure.distinct_nouns - int(fewer)
        measure.folded_valid_distinct_nouns = measure.valid_distinct_nouns + int(more)


def safe_cell(text: str) -> str:
    """`text` as a CSV cell that no spreadsheet runs as a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


class _Collector:
    def __init__(self, names: Sequence[str], measures: Mapping[str, SetMeasures], *, num_top: int) -> None:
        self._names = list(names)
        self._measures = measures
        self._num_top = num_top
        self._baselines = {name: m.before or names[0] for name, m in measures.items() if m.before or name != names[0]}
        self._tops = pd.DataFrame(columns=["noun", *names, *(f"{name} example" for name in names), TOTAL])
        self.plurals: dict[str, str] = {}
        self._changes: dict[str, pd.DataFrame] = {}
        self._counts: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def add(self, frame: pd.DataFrame) -> None:
        if "singular" in frame:
            # Only words of the lexicon are folded, so these stay few.
            folded = zip(frame["noun"], frame["singular"], strict=True)
            self.plurals.update((noun, singular) for noun, singular in folded if noun != singular)
        totalled = frame.assign(**{TOTAL: frame[self._names].sum(axis=1)})
        both = [self._tops, totalled] if len(self._tops) else [totalled]
        # Ties go to the noun that comes first, so that the same counts give the same report.
        self._tops = pd.concat(both).sort_values([TOTAL, "noun"], ascending=[False, True]).head(self._num_top)
        for name, baseline in self._baselines.items():
            before, after = self._rate(frame, baseline), self._rate(frame, name)
            kept = frame[name].to_numpy() / np.maximum(frame[baseline].to_numpy(), 1)
            columns = {"noun": frame["noun"], "before": before, "after": after, "kept": kept}
            new = pd.DataFrame({**columns, "change": after - before})
            both = [self._changes.get(name, pd.DataFrame()), new]
            change = pd.concat(both).sort_values(["change", "noun"])
            keep = min(NUM_CHANGES, len(change) // 2 + 1)
            self._changes[name] = pd.concat([change.head(keep), change.tail(keep)]).drop_duplicates("noun")
        for name in self._names:
            counts = frame[name].to_numpy()
            self._counts[name].append(counts[counts > 0])

    def finish(self, *, valid_threshold: int) -> NounTable:
        table = NounTable(top=self._tops.reset_index(drop=True))
        for name, measure in self._measures.items():
            counts = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *self._counts[name]]))[::-1]
            measure.distinct_nouns = len(counts)
            measure.valid_distinct_nouns = int((counts > valid_threshold).sum())
            assert int(counts.sum()) == measure.total_nouns, f"{name}: merged nouns do not add up to the captions'"
            if len(counts):
                ranks = np.unique(np.geomspace(1, len(counts), NUM_ZIPF_POINTS).astype(int))
                table.zipf[name] = [(int(rank), int(counts[rank - 1])) for rank in ranks]
        for name, change in self._changes.items():
            gained = change.query("change > 0").sort_values(["change", "noun"], ascending=[False, True])
            lost = change.query("change < 0").sort_values(["change", "noun"])
            table.gained[name] = gained.head(NUM_CHANGES)
            table.lost[name] = lost.head(NUM_CHANGES)
        return table

    def _rate(self, frame: pd.DataFrame, name: str) -> np.ndarray:
        return frame[name].to_numpy() * (PER_CAPTIONS / max(self._measures[name].num_captions, 1))
