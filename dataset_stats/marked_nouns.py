"""Nouns of sentences that the images do not support: what captioners most often say that is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dataset_stats.captions import Address, RawOpening, read_rows_at
from dataset_stats.counting import NounCounter
from pipelines.text.sentences import split_sentences

MAX_CAPTIONS = 20_000  # of a set, with marked sentences, that are read; spread over its shards
NUM_NOUNS = 15
MIN_OCCURRENCES = 3
PER_NOUNS = 1000


def count_marked(
    marked: Iterable[tuple[Address, dict[int, list[int]]]],
    counter: NounCounter,
    *,
    num_shards: int,
    opening: RawOpening,
) -> Counter[str]:
    """Count the nouns of a set's unsupported sentences, by number of the row; of some captions where there are many."""
    most = max(MAX_CAPTIONS // max(num_shards, 1), 1)
    for address, sentences in marked:
        rows = np.array(sorted(sentences)[:most], dtype=np.int64)
        texts = []
        for row, found in zip(rows.tolist(), read_rows_at(address, rows, opening=opening), strict=True):
            parts = split_sentences(found.text or "")
            texts += [parts[number] for number in sentences[row] if number < len(parts)]
        counter.count(texts)
    table = counter.take()
    return Counter(dict(zip(table["noun"].to_pylist(), table["count"].to_pylist(), strict=True)))


def more_often(
    marked: Counter[str], nouns: Path, name: str, *, total_nouns: int
) -> list[tuple[str, int, float, float]]:
    """Return the nouns that marked sentences have more often than all captions of a set: see `Claims.marked_nouns`.

    Args:
        nouns: nouns.parquet.
        total_nouns: of the set.
    """
    total, found = marked.total(), []
    with pq.ParquetFile(nouns) as file:
        for batch in file.iter_batches(columns=["noun", name]):
            for noun, count in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                if marked[noun] >= MIN_OCCURRENCES:
                    rates = PER_NOUNS * marked[noun] / total, PER_NOUNS * count / max(total_nouns, 1)
                    found.append((noun, marked[noun], *rates))
    found = [each for each in found if each[2] > each[3]]
    return sorted(found, key=lambda each: (each[3] - each[2], each[0]))[:NUM_NOUNS]
