"""NLTK's sentence and word tokenisers at the speed of a table look-up.

A caption is cut at white space into chunks, and chunks repeat. How NLTK tokenises a chunk depends on the chunk and on
whether it opens or closes its sentence; whether a sentence ends after it depends on the chunk and on the first
character of the next one. So every distinct chunk is asked about once, of NLTK itself, and captions become word ids
by looking chunks up in a compiled hash table. The few chunks through which NLTK looks at more of its neighbours
(a closing bracket or quote standing alone, exotic white space) send their caption to NLTK's own functions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer

from dataset_stats.arrays import GrowingArray
from dataset_stats.chunk_kernels import (
    ENDS_WITH_PERIOD,
    HAS_INNER_BREAK,
    HAS_OUTER_QUOTE,
    IS_SLOW,
    IS_SLOW_AT_END,
    NUM_POSITIONS,
    SPACING_SLOW,
    ChunkProperties,
    Tokens,
    emit_tokens,
    fill_slots,
    find_chunks,
)

# What the first character of a chunk tells Punkt about the period before it, with an example of each kind.
FOLLOWERS = (",", "a", "A", "(")
PUNCTUATION, LOWER, UPPER, OTHER = range(4)
NO_BREAKS, ALL_BREAKS = 0b0000, 0b1111

_LONE_CLOSERS = re.compile(r"[\])}>\"'»”’]+")
# Words and numbers with at most one mark behind them: NLTK makes the word and the mark of them, and a full stop stays
# with its word inside a sentence. They are most of any text, so NLTK is asked only about the words it splits.
_PLAIN_MARKS = frozenset([*",;:.?!", "'s"])
_SPLIT_WORDS = frozenset({"cannot", "gimme", "gonna", "gotta", "lemme", "wanna"})
_FINAL_PERIOD = re.compile(r"[^.]\.[\])}>\"'»”’]*\Z")
_ANY_PERIOD = re.compile(r"[.?!]")
_QUOTES = ("'", '"')
# Joins chunks so that NLTK tokenises many at once; a private-use character that no rule of NLTK's knows.
_DIVIDER = "\ue000"


# Tokens inside, at the start, at the end and as the whole of a sentence.
_Positions = tuple[list[str], list[str], list[str], list[str]]
_PERIODS = (".", "?", "!")


class Vocabulary:
    """Words and their ids, which start after `first_id` reserved ones."""

    def __init__(self, first_id: int) -> None:
        self.first_id = first_id
        self.words: list[str] = []
        self._ids: dict[str, int] = {}

    def __len__(self) -> int:
        return self.first_id + len(self.words)

    def ids(self, words: Sequence[str]) -> list[int]:
        """Ids of `words`; new words are added."""
        ids = []
        for word in words:
            number = self._ids.get(word)
            if number is None:
                number = self._ids[word] = len(self)
                self.words.append(word)
            ids.append(number)
        return ids


class ChunkTokenizer:
    """Turns captions into word ids of `vocabulary`, token for token what NLTK's tokenisers give.

    The reference is `NLTKWordTokenizer().tokenize(s) for s in PunktSentenceTokenizer().tokenize(caption)`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._sentences = PunktSentenceTokenizer()
        self._word_tokenizer = NLTKWordTokenizer()
        self._ends_inside = self._sentences._lang_vars.period_context_re()
        self._opens_with_closers = self._sentences._lang_vars.re_boundary_realignment
        self._slots = np.full(1 << 12, -1, dtype=np.int32)
        self._hashes = GrowingArray(np.uint64)
        self._starts = GrowingArray(np.int64)  # chunk k is bytes starts[k] to starts[k + 1] of the arena
        self._starts.extend([0])
        self._arena = GrowingArray(np.uint8)
        self._flags = GrowingArray(np.uint8)
        self._breaks = GrowingArray(np.uint8)
        self._follower = GrowingArray(np.uint8)
        self._spans = GrowingArray(np.int32, num_columns=NUM_POSITIONS * 2)
        self._tokens = GrowingArray(np.int32)

    @property
    def num_chunks(self) -> int:
        """Distinct chunks met so far."""
        return len(self._hashes)

    def tokenize(self, data: np.ndarray, offsets: np.ndarray) -> Tokens:
        """Word ids of a batch of captions.

        Args:
            data: uint8, the captions' UTF-8 bytes one after the other.
            offsets: int64 [num_captions + 1], where each caption begins and ends in `data`.
        """
        chunks, caption_ends, spacing = self._look_up(data, offsets)
        spans = self._spans.values[chunks]
        num_tokens = int((spans[:, 1::2] - spans[:, ::2]).max(axis=1).sum()) if len(chunks) else 0
        words = np.empty(num_tokens, dtype=np.int32)
        sentence_ends = np.empty(len(chunks), dtype=np.int64)
        sentence_captions = np.empty(len(chunks), dtype=np.int64)
        table = ChunkProperties(
            self._flags.values, self._breaks.values, self._follower.values, self._spans.values, self._tokens.values
        )
        num_words, num_sentences = emit_tokens(
            chunks, caption_ends, spacing, table, words, (sentence_ends, sentence_captions)
        )
        return Tokens(
            words[:num_words],
            sentence_ends[:num_sentences],
            sentence_captions[:num_sentences],
            np.flatnonzero(spacing == SPACING_SLOW),
        )

    def tokenize_with_nltk(self, caption: str) -> list[list[int]]:
        """Word ids per sentence by NLTK's own functions."""
        sentences = self._sentences.tokenize(caption)
        return [self.vocabulary.ids(self._word_tokenizer.tokenize(sentence)) for sentence in sentences]

    def _look_up(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        num_known, num_bytes = self.num_chunks, int(offsets[-1] - offsets[0])
        max_chunks = num_bytes // 2 + len(offsets)
        self._reserve_slots(max_chunks)
        chunks = np.empty(max_chunks, dtype=np.int32)
        caption_ends = np.empty(len(offsets) - 1, dtype=np.int64)
        spacing = np.zeros(len(offsets) - 1, dtype=np.uint8)
        num_chunks, num_all = find_chunks(
            data,
            offsets,
            self._slots,
            num_known,
            (self._hashes.reserve(max_chunks), self._starts.reserve(max_chunks), self._arena.reserve(num_bytes)),
            (chunks, caption_ends, spacing),
        )
        self._hashes.accept(num_all - num_known)
        self._starts.accept(num_all - num_known)
        self._arena.accept(int(self._starts.values[-1]) - len(self._arena))
        if num_all > num_known:
            self._describe_chunks(num_known)
        return chunks[:num_chunks], caption_ends, spacing

    def _reserve_slots(self, num_new: int) -> None:
        needed = 2 * (self.num_chunks + num_new)
        if len(self._slots) < needed:
            self._slots = np.full(1 << needed.bit_length(), -1, dtype=np.int32)
            fill_slots(self._slots, self._hashes.values)

    def _describe_chunks(self, first: int) -> None:
        starts = self._starts.values[first:]
        new_bytes = self._arena.values[starts[0] :].tobytes()
        ends = (starts - starts[0]).tolist()
        chunks = [new_bytes[begin:end].decode("utf-8") for begin, end in itertools.pairwise(ends)]
        flags, breaks, followers, unknown = [], [], [], []
        pool = _TokenPool(len(self._tokens), len(chunks))
        for index, chunk in enumerate(chunks):
            word, mark = _split_mark(chunk)
            if _is_plain(word, mark):
                is_end = mark != "" and mark in _PERIODS
                flags.append(ENDS_WITH_PERIOD if is_end else 0)
                breaks.append(ALL_BREAKS if is_end else NO_BREAKS)
                followers.append(LOWER if chunk[0].islower() else UPPER if chunk[0].isupper() else OTHER)
                pool.add_plain(index, word, mark)
                continue
            flag, chunk_breaks = self._flags_and_breaks(chunk)
            flags.append(flag)
            breaks.append(chunk_breaks)
            followers.append(self._follower_kind(chunk))
            if not flag & IS_SLOW:
                unknown.append(index)
        for index, positions in zip(unknown, self._ask_positions([chunks[index] for index in unknown]), strict=True):
            pool.add(index, positions)
        self._flags.extend(flags)
        self._breaks.extend(breaks)
        self._follower.extend(followers)
        self._tokens.extend(self.vocabulary.ids(pool.tokens))
        self._spans.extend(pool.spans)

    def _flags_and_breaks(self, chunk: str) -> tuple[int, int]:
        if self._is_exotic(chunk):
            return IS_SLOW, NO_BREAKS
        flags = HAS_OUTER_QUOTE * (chunk[0] in _QUOTES or chunk[-1] == "'")
        if _ANY_PERIOD.search(chunk) is None:
            return flags, NO_BREAKS
        flags += HAS_INNER_BREAK * self._sentences.text_contains_sentbreak(chunk)
        flags += ENDS_WITH_PERIOD * (chunk[-1] in ".?!")
        if flags & ENDS_WITH_PERIOD or self._ends_inside.search(chunk):
            more_flags, breaks = self._try_followers(chunk)
            return flags | more_flags, breaks
        return flags, NO_BREAKS

    def _is_exotic(self, chunk: str) -> bool:
        return (
            self._opens_with_closers.match(chunk) is not None
            or _LONE_CLOSERS.fullmatch(chunk) is not None
            or chunk.split() != [chunk]  # white space that is no separator here
            or _DIVIDER in chunk
        )

    def _try_followers(self, chunk: str) -> tuple[int, int]:
        """Let Punkt split the chunk before each kind of follower and at the end of a caption."""
        caption = f"x {chunk}"
        flags = 0 if self._sentences.tokenize(caption) == [caption] else IS_SLOW_AT_END
        breaks = NO_BREAKS
        for kind, follower in enumerate(FOLLOWERS):
            sentences = self._sentences.tokenize(f"{caption} {follower}")
            if sentences == [caption, follower]:
                breaks |= 1 << kind
            elif len(sentences) > 1:
                return IS_SLOW, NO_BREAKS  # a sentence ends inside the chunk
        return flags, breaks

    def _follower_kind(self, chunk: str) -> int:
        if chunk[0].islower():
            return LOWER
        if chunk[0].isupper():
            return UPPER
        marks = self._sentences.PUNCTUATION
        is_mark = chunk[0] in marks and self._sentences._lang_vars.word_tokenize(chunk)[0] in marks
        return PUNCTUATION if is_mark else OTHER

    def _ask_positions(self, chunks: Sequence[str]) -> list[_Positions]:
        """Tokens of chunks inside, at the start, at the end and as the whole of a sentence."""
        stems = [chunk[:-1] if len(chunk) > 1 and chunk[-1] == "." != chunk[-2] else "" for chunk in chunks]
        positions = []
        for chunk, stem, inside, stem_tokens in zip(
            chunks, stems, self._tokenize_joined(chunks), self._tokenize_joined(stems), strict=True
        ):
            if chunk[0] in _QUOTES and chunk[1:2] in _QUOTES:
                positions.append(self._tokenize_at_every_position(chunk))
            elif stem:
                last = [*stem_tokens, "."]
                positions.append((inside, inside, last, last))
            elif chunk[-1] == "'" or _FINAL_PERIOD.search(chunk):
                last = self._word_tokenizer.tokenize(f"{_DIVIDER} {chunk}")[1:]
                positions.append((inside, inside, last, last))
            else:
                positions.append((inside, inside, inside, inside))
        return positions

    def _tokenize_joined(self, chunks: Sequence[str]) -> list[list[str]]:
        if not chunks:
            return []
        divider = f" {_DIVIDER} "
        tokens = self._word_tokenizer.tokenize(f"{_DIVIDER} {divider.join(chunks)} {_DIVIDER}")
        groups: list[list[str]] = []
        for token in tokens[:-1]:
            if token == _DIVIDER:
                groups.append([])
            else:
                groups[-1].append(token)
        assert len(groups) == len(chunks), "the word tokeniser changed the dividers"
        return groups

    def _tokenize_at_every_position(self, chunk: str) -> _Positions:
        tokenize = self._word_tokenizer.tokenize
        return (
            tokenize(f"{_DIVIDER} {chunk} {_DIVIDER}")[1:-1],
            tokenize(f"{chunk} {_DIVIDER}")[:-1],
            tokenize(f"{_DIVIDER} {chunk}")[1:],
            tokenize(chunk),
        )


def _split_mark(chunk: str) -> tuple[str, str]:
    if chunk.isalnum():
        return chunk, ""
    num_marks = 2 if chunk.endswith("'s") else 1
    return chunk[:-num_marks], chunk[-num_marks:]


def _is_plain(word: str, mark: str) -> bool:
    return (
        word.isalnum()
        and word.isascii()
        and (not mark or mark in _PLAIN_MARKS)
        # Before a full stop, Punkt looks at numbers and single letters more closely.
        and (mark != "." or (len(word) > 1 and word.isalpha()))
        and word.lower() not in _SPLIT_WORDS
    )


class _TokenPool:
    """Token lists of new chunks, laid end to end behind `num_stored` earlier tokens, and where each position's are."""

    def __init__(self, num_stored: int, num_chunks: int) -> None:
        self.tokens: list[str] = []
        self.spans: list[tuple[int, ...]] = [(num_stored,) * (2 * NUM_POSITIONS)] * num_chunks
        self._num_stored = num_stored

    def add_plain(self, index: int, word: str, mark: str) -> None:
        """A word and its mark; a full stop stays with its word inside a sentence."""
        span = self._append([word, mark] if mark else [word])
        inside = self._append([word + mark]) if mark == "." else span
        self.spans[index] = inside + inside + span + span

    def add(self, index: int, positions: _Positions) -> None:
        """Tokens of a chunk at the four positions; lists that are the same object are stored once."""
        spans: dict[int, tuple[int, int]] = {}
        row: tuple[int, ...] = ()
        for words in positions:
            if id(words) not in spans:
                spans[id(words)] = self._append(words)
            row += spans[id(words)]
        self.spans[index] = row

    def _append(self, words: Sequence[str]) -> tuple[int, int]:
        begin = self._num_stored + len(self.tokens)
        self.tokens += words
        return begin, begin + len(words)
