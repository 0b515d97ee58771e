"""Counts the nouns of one shard: the map step, run by the engine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_stats.captions import Address, CaptionRow, RawOpening, read_rows
from dataset_stats.counting import TEXT_LISTS, NounCounter, sum_nouns
from dataset_stats.duplicates import EXACT, FOLDED, hash_texts
from dataset_stats.languages import LanguageTable
from dataset_stats.tagging.taggers import TaggerSource, load_tagger
from encoders.text import DEFAULT_CLEANING, clean_text
from encoders.token_kinds import TokenKinds, token_kinds
from encoders.tokens import load_tokenizer
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.store.files import atomic_file
from pipelines.store.tables import MEND_PART, read_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NOUNS, CAPTIONS = ".nouns.parquet", ".captions.parquet"
ROW_GROUP_SIZE = 65_536


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """What a worker needs.

    Attributes:
        text_tokenizer: path of a tokenizer.json, or empty to measure no T5 lengths.
        opening: of raw shards.
        keeps_nouns: whether each caption's row lists its nouns, from which a sample's standard errors are taken; the
            address of a source may ask for them, too.
    """

    tagger: TaggerSource
    text_tokenizer: str
    text_limits: tuple[int, ...]
    boilerplate: tuple[str, ...]
    max_characters: int
    opening: RawOpening
    keeps_nouns: bool = False


class NounCountWorker:
    """Writes a shard's nouns (noun, count, first row) and the figures of each of its captions."""

    suffixes: ClassVar[tuple[str, ...]] = (NOUNS, CAPTIONS)

    def __init__(self, config: CountConfig) -> None:
        self._config = config
        self._languages = LanguageTable()
        self._counter = NounCounter(load_tagger(config.tagger), languages=self._languages)
        self._text_tokenizer = load_tokenizer(Path(config.text_tokenizer)) if config.text_tokenizer else None
        self._kinds: TokenKinds | None = None
        # "the photo" is not how "The photographer ..." opens. ASCII: a word of Chinese goes on without a space.
        openings = "|".join(re.escape(opening.casefold()) for opening in config.boilerplate)
        self._boilerplate = re.compile(rf"(?:{openings})(?!\w)" if config.boilerplate else "(?!)", re.ASCII)

    def __call__(self, piece: Piece) -> PieceReport:
        """Count the rows of a piece."""
        rejected: Counter[str] = Counter()
        tables, row_number = [], piece.start
        address = Address.parse(piece.source.path)
        keeps_nouns = self._config.keeps_nouns or address.keeps_nouns
        for rows in read_rows(address, piece.start, piece.stop, opening=self._config.opening):
            rejects = [self._reject(row) for row in rows]
            rejected.update(reject for reject in rejects if reject)
            tables.append(self._measure(rows, rejects, first_row=row_number, keeps_nouns=keeps_nouns))
            row_number += len(rows)
        num_read, num_rejected = row_number - piece.start, rejected.total()
        if not tables:
            tables = [self._measure([], [], first_row=0, keeps_nouns=keeps_nouns)]
        _write(pa.concat_tables(tables), piece.output(CAPTIONS))
        _write(self._counter.take(), piece.output(NOUNS))
        return PieceReport(num_read=num_read, num_kept=num_read - num_rejected, rejected=dict(rejected))

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Add up the nouns of the parts and put their captions one after the other."""
        _write(sum_nouns([read_table(part[NOUNS], mend=MEND_PART) for part in parts]), outputs[NOUNS])
        _write(pa.concat_tables([read_table(part[CAPTIONS], mend=MEND_PART) for part in parts]), outputs[CAPTIONS])

    def _reject(self, row: CaptionRow) -> str | None:
        if row.reject:
            return row.reject
        if row.text is None:
            return "no_text"
        if not row.text.strip():
            return "blank_text"
        return "too_long" if len(row.text) > self._config.max_characters else None

    def _measure(
        self, rows: Sequence[CaptionRow], rejects: Sequence[str | None], *, first_row: int, keeps_nouns: bool
    ) -> pa.Table:
        kept = [index for index, reject in enumerate(rejects) if reject is None]
        texts = [rows[index].text or "" for index in kept]
        numbers = first_row + np.array(kept, dtype=np.int64)
        lengths = self._counter.count_rows(texts, numbers, keeps_nouns=keeps_nouns)
        exact_hashes, folded_hashes = hash_texts(texts)
        columns: dict[str, tuple[Any, pa.DataType]] = {
            "num_tokens": (lengths.num_tokens, pa.int32()),
            "num_nouns": (lengths.num_nouns, pa.int32()),
            "num_characters": ([len(text) for text in texts], pa.int32()),
            EXACT: (exact_hashes, pa.int64()),
            FOLDED: (folded_hashes, pa.int64()),
            "language": (self._languages.languages(texts, lengths.language_scores), pa.string()),
            "is_boilerplate": ([self._is_boilerplate(text) for text in texts], pa.bool_()),
        }
        if lengths.nouns is not None:
            columns["nouns"] = (lengths.nouns, TEXT_LISTS)
        if self._text_tokenizer is not None:
            columns |= self._measure_truncation(self._text_tokenizer, texts, lengths.num_nouns)
        positions = np.full(len(rows), -1, dtype=np.int64)
        positions[kept] = np.arange(len(kept))
        take = pa.array(positions, mask=positions < 0)
        return pa.table(
            {
                "key": pa.array([row.key for row in rows], pa.string()),
                **{name: _column(values, kind).take(take) for name, (values, kind) in columns.items()},
                "flags": pa.array([row.flags for row in rows], TEXT_LISTS),
                "reject": pa.array(rejects, pa.string()),
            }
        )

    def _is_boilerplate(self, text: str) -> bool:
        return self._boilerplate.match(text.casefold().lstrip()) is not None

    def _measure_truncation(
        self, tokenizer: Tokenizer, texts: Sequence[str], num_nouns: np.ndarray
    ) -> dict[str, tuple[Any, pa.DataType]]:
        if self._kinds is None:
            self._kinds = token_kinds(tokenizer)
        cleaned = [clean_text(text, DEFAULT_CLEANING) for text in texts]
        # With offsets, though they take a little longer: they say where the limits cut, and a second look at each
        # longer caption takes much longer.
        codes = tokenizer.encode_batch(cleaned)
        tokens = [code.ids for code in codes]
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int32)
        columns: dict[str, tuple[Any, pa.DataType]] = {
            "num_text_tokens": (lengths, pa.int32()),
            "num_unread_tokens": ([self._kinds.num_unread(ids) for ids in tokens], pa.int32()),
            "is_unreadable": ([self._kinds.is_unreadable(ids) for ids in tokens], pa.bool_()),
        }
        for limit in self._config.text_limits:
            longer = np.flatnonzero(lengths > limit)
            # The end token takes the last place, so limit - 1 tokens of text are kept.
            ends = [codes[index].offsets[limit - 2][1] for index in longer]
            kept_texts = [cleaned[index][:end] for index, end in zip(longer, ends, strict=True)]
            lost = np.zeros(len(texts), dtype=np.int32)
            lost[longer] = np.maximum(num_nouns[longer] - self._counter.measure(kept_texts).num_nouns, 0)
            columns[f"nouns_lost_{limit}"] = (lost, pa.int32())
        return columns


def _column(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def _write(table: pa.Table, path: Path) -> None:
    with atomic_file(path) as temporary:
        pq.write_table(table.combine_chunks(), temporary, compression="zstd", row_group_size=ROW_GROUP_SIZE)
