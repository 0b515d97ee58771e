"""Captions to noun counts: fold case, tokenise, tag, count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numba import njit

from dataset_stats.example_places import ROW_MASK, noun_masks
from dataset_stats.languages import LANGUAGES, LanguageTable, score_languages
from dataset_stats.tagging.chunk_kernels import Tokens
from dataset_stats.tagging.chunks import ChunkTokenizer, Vocabulary
from dataset_stats.tagging.perceptron import CONTEXT_MARKERS
from dataset_stats.tagging.taggers import Tagger

# The compiled tables are rebuilt when they reach this many distinct words, which bounds memory (about 0.5 GB).
MAX_WORDS = 1_000_000
CAPTIONS_PER_BATCH = 2048
NOUN_PREFIX = "NN"

NOUN_SCHEMA = pa.schema(
    [
        pa.field("noun", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("example", pa.int64(), nullable=False),  # a row, renumbered as `example_places` does
    ]
)
# As Parquet gives it back: the parts of a shard are read, and joined to the bytes of a shard that was never cut.
TEXT_LISTS = pa.list_(pa.field("element", pa.string()))


@dataclass(frozen=True)
class CaptionLengths:
    """Tokens (NLTK's, punctuation included) and nouns of each caption, int32 [num_captions].

    Attributes:
        language_scores: int32 [num_captions, num_languages], all zero where the counter was given no languages.
        nouns: the nouns of each caption, lists of texts; None where they were not asked for.
    """

    num_tokens: np.ndarray
    num_nouns: np.ndarray
    language_scores: np.ndarray
    nouns: pa.ChunkedArray | None = None


class NounCounter:
    """Counts the nouns of captions; a noun is a case-folded token that the tagger gives a tag of the NN family.

    Captions are case-folded before anything else (`str.casefold`), so re-casing a caption changes nothing. With
    `languages` their words are weighed for languages in the same pass.
    """

    def __init__(self, tagger: Tagger, *, languages: LanguageTable | None = None) -> None:
        self._tagger = tagger
        self._languages = languages
        self._nouns = pa.Table.from_batches([], schema=NOUN_SCHEMA)
        self._start_tables()

    def count(self, captions: Sequence[str], *, first_row: int = 0) -> CaptionLengths:
        """Add the captions' nouns to the counts; `first_row` is the row number of the first caption."""
        rows = np.arange(first_row, first_row + len(captions), dtype=np.int64)
        return self.count_rows(captions, rows)

    def count_rows(self, captions: Sequence[str], rows: np.ndarray, *, keeps_nouns: bool = False) -> CaptionLengths:
        """Add the captions' nouns to the counts; `rows` int64 [num_captions] says which rows they are.

        With `keeps_nouns` those of each caption are returned, too.
        """
        nouns: list[pa.Array] | None = [] if keeps_nouns else None
        lengths = self._each_batch(captions, rows, is_counted=True, nouns=nouns)
        return lengths if nouns is None else replace(lengths, nouns=pa.chunked_array(nouns, type=TEXT_LISTS))

    def measure(self, captions: Sequence[str]) -> CaptionLengths:
        """Tokens and nouns of captions without counting them."""
        return self._each_batch(captions, np.zeros(len(captions), dtype=np.int64), is_counted=False)

    def tags(self, caption: str) -> list[list[tuple[str, str]]]:
        """Tokens and tags of a caption, sentence by sentence."""
        return [pairs for _, pairs in self._tagged_sentences([caption])]

    def _tagged_sentences(self, captions: Sequence[str]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
        tokens = self._tokenize([caption.casefold() for caption in captions])
        tags = self._tagger.tag(tokens.words, tokens.sentence_ends)
        labels = [self._tagger.labels[int(tag)] for tag in tags]
        words = [self._vocabulary.words[word - len(CONTEXT_MARKERS)] for word in tokens.words.tolist()]
        bounds = itertools.pairwise([0, *tokens.sentence_ends.tolist()])
        for caption, (begin, end) in zip(tokens.sentence_captions.tolist(), bounds, strict=True):
            yield caption, list(zip(words[begin:end], labels[begin:end], strict=True))

    def take(self) -> pa.Table:
        """Give the counts so far, sorted by noun (`NOUN_SCHEMA`), and start again from zero."""
        self._flush()
        nouns = sum_nouns([self._nouns])
        self._nouns = pa.Table.from_batches([], schema=NOUN_SCHEMA)
        return nouns

    def _start_tables(self) -> None:
        self._tagger.clear()
        self._vocabulary = Vocabulary(len(CONTEXT_MARKERS))
        self._tokenizer = ChunkTokenizer(self._vocabulary)
        self._num_known_words = 0
        self._counts = np.zeros(0, dtype=np.int64)
        self._examples = np.zeros(0, dtype=np.int64)
        self._masks = np.zeros(0, dtype=np.int64)
        self._language_rows = np.zeros(0, dtype=np.int16)

    def _flush(self) -> None:
        found = np.flatnonzero(self._counts)
        words = self._vocabulary.words
        nouns = [words[word - len(CONTEXT_MARKERS)] for word in found]
        table = pa.table([nouns, self._counts[found], self._examples[found]], schema=NOUN_SCHEMA)
        self._nouns = pa.concat_tables([self._nouns, table])
        self._counts[:] = 0

    def _each_batch(
        self, captions: Sequence[str], rows: np.ndarray, *, is_counted: bool, nouns: list[pa.Array] | None = None
    ) -> CaptionLengths:
        num_tokens = np.zeros(len(captions), dtype=np.int32)
        num_nouns = np.zeros(len(captions), dtype=np.int32)
        scores = np.zeros((len(captions), len(LANGUAGES)), dtype=np.int32)
        for begin in range(0, len(captions), CAPTIONS_PER_BATCH):
            batch = slice(begin, begin + CAPTIONS_PER_BATCH)
            if self._vocabulary.num_ids > MAX_WORDS:
                self._flush()
                self._start_tables()
            tokens = self._tokenize([caption.casefold() for caption in captions[batch]])
            tags = self._tagger.tag(tokens.words, tokens.sentence_ends)
            is_noun_label = np.array([label.startswith(NOUN_PREFIX) for label in self._tagger.labels], dtype=np.bool_)
            is_noun = is_noun_label[tags] if len(tags) else np.zeros(0, dtype=np.bool_)
            _count_nouns(
                tokens,
                is_noun,
                rows[batch],
                (self._counts, self._examples, self._masks),
                (num_tokens[batch], num_nouns[batch]),
                is_counted,
            )
            if is_counted and self._languages is not None:
                score_languages(tokens, self._language_rows, self._languages.weights, scores[batch])
            if nouns is not None:
                nouns.append(self._noun_lists(tokens, is_noun, num_captions=len(num_nouns[batch])))
        return CaptionLengths(num_tokens, num_nouns, scores)

    def _noun_lists(self, tokens: Tokens, is_noun: np.ndarray, *, num_captions: int) -> pa.Array:
        """The nouns of each caption of a batch."""
        lengths = np.diff(tokens.sentence_ends, prepend=0)
        owners = np.repeat(tokens.sentence_captions, lengths)[is_noun]
        # Captions that NLTK itself has cut come last.
        order = np.argsort(owners, kind="stable")
        words, codes = np.unique(tokens.words[is_noun][order], return_inverse=True)
        texts = [self._vocabulary.words[word - len(CONTEXT_MARKERS)] for word in words.tolist()]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=num_captions))])
        values = pa.array(texts, pa.string()).take(pa.array(codes))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=TEXT_LISTS)

    def _tokenize(self, captions: list[str]) -> Tokens:
        column = pa.array(captions, type=pa.large_string())
        _, offsets, data = column.buffers()
        tokens = self._tokenizer.tokenize(
            np.frombuffer(data, dtype=np.uint8) if data else np.zeros(0, dtype=np.uint8),
            np.frombuffer(offsets, dtype=np.int64)[: len(captions) + 1],
        )
        if len(tokens.slow_captions):
            tokens = self._add_slow_captions(tokens, captions)
        self._learn_words()
        return tokens

    def _learn_words(self) -> None:
        """Give the tagger and the tables the words that the vocabulary has gained."""
        new = self._vocabulary.words[self._num_known_words :]
        self._num_known_words = len(self._vocabulary.words)
        self._tagger.add_words(new)
        missing = self._vocabulary.num_ids - len(self._counts)
        if missing > 0:
            # Room for as many again, so that growing stays cheap.
            room = np.zeros(missing + len(self._counts), dtype=np.int64)
            self._counts = np.concatenate([self._counts, room])
            self._examples = np.concatenate([self._examples, room])
            self._masks = np.concatenate([self._masks, room])
            self._language_rows = np.concatenate([self._language_rows, room.astype(np.int16)])
        if new:
            known = slice(self._vocabulary.num_ids - len(new), self._vocabulary.num_ids)
            self._masks[known] = noun_masks(new) & ROW_MASK
            if self._languages is not None:
                self._language_rows[known] = self._languages.rows_of(new)

    def _add_slow_captions(self, tokens: Tokens, captions: list[str]) -> Tokens:
        words, ends, owners = [], [], []
        num_words = len(tokens.words)
        for caption in tokens.slow_captions.tolist():
            for sentence in self._tokenizer.tokenize_with_nltk(captions[caption]):
                words += sentence
                ends.append(num_words + len(words))
                owners.append(caption)
        return Tokens(
            np.concatenate([tokens.words, np.array(words, dtype=np.int32)]),
            np.concatenate([tokens.sentence_ends, np.array(ends, dtype=np.int64)]),
            np.concatenate([tokens.sentence_captions, np.array(owners, dtype=np.int64)]),
            tokens.slow_captions,
        )


def sum_nouns(tables: Sequence[pa.Table]) -> pa.Table:
    """Add up tables of `NOUN_SCHEMA`: one row per noun, sorted by its UTF-8 bytes."""
    table = pa.concat_tables(tables)
    summed = table.group_by("noun", use_threads=False).aggregate([("count", "sum"), ("example", "min")])
    summed = summed.select(["noun", "count_sum", "example_min"]).rename_columns(NOUN_SCHEMA.names)
    return summed.sort_by("noun").cast(NOUN_SCHEMA).combine_chunks()


@njit(cache=True, nogil=True)
def _count_nouns(
    tokens: Tokens,
    is_noun: np.ndarray,
    rows: np.ndarray,
    totals: tuple[np.ndarray, np.ndarray, np.ndarray],
    lengths: tuple[np.ndarray, np.ndarray],
    is_counted: bool,
) -> None:
    counts, examples, masks = totals
    num_tokens, num_nouns = lengths
    begin = 0
    for sentence in range(len(tokens.sentence_ends)):
        end = tokens.sentence_ends[sentence]
        caption = tokens.sentence_captions[sentence]
        num_tokens[caption] += end - begin
        for i in range(begin, end):
            if is_noun[i]:
                num_nouns[caption] += 1
                if is_counted:
                    word = tokens.words[i]
                    example = rows[caption] ^ masks[word]
                    if counts[word] == 0 or example < examples[word]:
                        examples[word] = example
                    counts[word] += 1
        begin = end
