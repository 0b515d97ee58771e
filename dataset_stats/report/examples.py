"""Captions that the report quotes: one for each frequent noun, and those that occur most often."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dataset_stats.captions import Address, RawOpening, read_rows, read_rows_at
from dataset_stats.example_places import ROW_BITS, noun_masks, places
from dataset_stats.measures import SetMeasures
from dataset_stats.set_rows import SetRows
from pipelines.engine.pieces import Source

EXAMPLE_CHARACTERS = 240
MAX_SCANNED_ROWS = 16_384  # of a set, for nouns that drew the caption of another
WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Quotes:
    """Captions, cut to the length of an example.

    Attributes:
        by_noun: one for each noun of the report's table.
        repeated: by set, the captions that occur most often: how often, and the text as it occurs first.
        unread: by set, some captions with words that the text encoder cannot read.
    """

    by_noun: list[str]
    repeated: dict[str, list[tuple[int, str]]]
    unread: dict[str, list[str]]


@dataclass(frozen=True)
class _SetTexts:
    """The texts of all sets: sources and rows of each by its name, and how raw shards are opened."""

    sources: Mapping[str, Sequence[Source]]
    rows: Mapping[str, SetRows]
    opening: RawOpening

    def at(self, wanted: Sequence[tuple[str, int]]) -> list[str]:
        """Return texts by set and place; each shard is read once."""
        by_shard: dict[tuple[str, int], dict[int, list[int]]] = {}
        for index, (name, place) in enumerate(wanted):
            shard, row = divmod(place, 1 << ROW_BITS)
            by_shard.setdefault((name, shard), {}).setdefault(row, []).append(index)
        texts = [""] * len(wanted)
        for (name, shard), rows in by_shard.items():
            numbers = np.array(sorted(rows), dtype=np.int64)
            found = read_rows_at(Address.parse(self.sources[name][shard].path), numbers, opening=self.opening)
            for number, row in zip(numbers.tolist(), found, strict=True):
                for index in rows[number]:
                    texts[index] = row.text or ""
        return texts

    def others(self, name: str, nouns: Mapping[str, int], used: set[frozenset[str]]) -> dict[int, str]:
        """Captions of a set with these nouns whose words are not yet `used`, which grows, by index of the noun."""
        found: dict[int, str] = {}
        pending, left = dict(nouns), MAX_SCANNED_ROWS
        for shard, source in enumerate(self.sources[name]):
            if not pending or not left:
                break
            chosen = self.rows[name].chosen
            is_own = iter(np.ones(source.num_samples, bool) if chosen is None else chosen(shard))
            num_rows = min(source.num_samples, left)
            for block in read_rows(Address.parse(source.path), 0, num_rows, opening=self.opening):
                left -= len(block)
                for row in itertools.compress(block, is_own):
                    words = _words(row.text or "") if row.reject is None else frozenset()
                    present = pending.keys() & words
                    if present and words not in used:
                        noun = min(present, key=pending.__getitem__)
                        found[pending.pop(noun)] = row.text or ""
                        used.add(words)
        return found


def quote_captions(
    top: pd.DataFrame,
    measures: Mapping[str, SetMeasures],
    *,
    sources: Mapping[str, Sequence[Source]],
    rows: Mapping[str, SetRows],
    opening: RawOpening,
) -> Quotes:
    """Find what the report quotes; `top` is that of the noun table, `sources` and `rows` by set."""
    texts = _SetTexts(sources, rows, opening)
    return Quotes(_example_captions(top, texts), _repeated_texts(measures, texts), _unread_texts(measures, texts))


def _example_captions(top: pd.DataFrame, of_sets: _SetTexts) -> list[str]:
    """One caption for each noun of `top`, drawn from those of the set in which the noun is most frequent.

    A noun whose caption has the same words as that of a more frequent noun gets another one, where there is another.
    """
    names = list(of_sets.sources)
    best = [names[number] for number in top[names].to_numpy().argmax(axis=1)]
    masks = noun_masks(top["noun"].to_numpy())
    wanted = [
        (name, int(places(example, mask)))
        for name, example, mask in zip(
            best, (top[f"{name} example"].iloc[index] for index, name in enumerate(best)), masks, strict=True
        )
    ]
    texts = of_sets.at(wanted)
    used: set[frozenset[str]] = set()
    again: dict[str, dict[str, int]] = {}  # by set, index of the noun
    for index, (name, noun) in enumerate(zip(best, top["noun"], strict=True)):
        words = _words(texts[index])
        if words in used:
            again.setdefault(name, {})[noun] = index
        used.add(words)
    for name, nouns in again.items():
        for index, text in of_sets.others(name, nouns, used).items():
            texts[index] = text
    return [_excerpt(text, noun) for text, noun in zip(texts, top["noun"], strict=True)]


def _repeated_texts(measures: Mapping[str, SetMeasures], of_sets: _SetTexts) -> dict[str, list[tuple[int, str]]]:
    found = {}
    for name, measure in measures.items():
        most = measure.duplicates.most_frequent
        texts = of_sets.at([(name, repeated.place) for repeated in most])
        found[name] = [(repeated.count, _shorten(text)) for repeated, text in zip(most, texts, strict=True)]
    return found


def _unread_texts(measures: Mapping[str, SetMeasures], of_sets: _SetTexts) -> dict[str, list[str]]:
    return {
        name: [_shorten(text) for text in of_sets.at([(name, place) for place in measure.unread_places])]
        for name, measure in measures.items()
    }


def _words(text: str) -> frozenset[str]:
    return frozenset(WORD.findall(text.casefold()))


def _excerpt(text: str, noun: str) -> str:
    """The part of a caption that has the noun: its beginning, unless the noun comes later."""
    text = " ".join(text.split())
    letters = re.escape(noun)
    found = re.search(rf"(?<!\w){letters}(?!\w)", text, re.IGNORECASE) or re.search(letters, text, re.IGNORECASE)
    if found is None or found.end() < EXAMPLE_CHARACTERS:
        return _shorten(text)
    # From a word on, with about as much before the noun as behind it.
    start = found.end() - (EXAMPLE_CHARACTERS + len(noun)) // 2
    return "…" + _shorten(text[start:].partition(" ")[2] if " " in text[start : found.start()] else text[start:])


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…"
