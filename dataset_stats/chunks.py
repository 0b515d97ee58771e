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
_PLAIN_WORD = re.compile(r"[A-Za-z]{2,}")
_PLAIN_SENTENCE_END = re.compile(r"[A-Za-z]{2,}[.?!]")
# Joins chunks so that NLTK tokenises many at once; a private-use character that no rule of NLTK's knows.
_DIVIDER = "\ue000"


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
        described = [self._flags_and_breaks(chunk) for chunk in chunks]
        flags = [flag for flag, _ in described]
        self._flags.extend(flags)
        self._breaks.extend([breaks for _, breaks in described])
        self._follower.extend([self._follower_kind(chunk) for chunk in chunks])
        self._add_tokens(chunks, flags)

    def _flags_and_breaks(self, chunk: str) -> tuple[int, int]:
        if _PLAIN_WORD.fullmatch(chunk):
            return 0, NO_BREAKS
        if _PLAIN_SENTENCE_END.fullmatch(chunk):
            return ENDS_WITH_PERIOD, ALL_BREAKS
        if self._is_exotic(chunk):
            return IS_SLOW, NO_BREAKS
        flags = HAS_OUTER_QUOTE * (chunk[0] in "\"'" or chunk[-1] == "'")
        if not any(character in chunk for character in ".?!"):
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
            or any(character.isspace() or character == _DIVIDER for character in chunk)
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
        if _PLAIN_WORD.fullmatch(chunk):
            return LOWER if chunk[0].islower() else UPPER
        token = next(iter(self._sentences._lang_vars.word_tokenize(chunk)), "(")
        if token in self._sentences.PUNCTUATION:
            return PUNCTUATION
        if token[0].islower():
            return LOWER
        return UPPER if token[0].isupper() else OTHER

    def _add_tokens(self, chunks: Sequence[str], flags: Sequence[int]) -> None:
        # Only these may be tokenised differently at the ends of a sentence.
        is_single = [
            not flag & IS_SLOW
            and (flag & HAS_OUTER_QUOTE or ("." in chunk and not _PLAIN_SENTENCE_END.fullmatch(chunk)))
            for chunk, flag in zip(chunks, flags, strict=True)
        ]
        joined = [
            "" if single or flag & IS_SLOW else chunk
            for chunk, flag, single in zip(chunks, flags, is_single, strict=True)
        ]
        stems = [chunk[:-1] if _PLAIN_SENTENCE_END.fullmatch(chunk) else "" for chunk in chunks]
        inside_tokens, stem_tokens = self._tokenize_joined(joined), self._tokenize_joined(stems)
        spans = []
        for index, chunk in enumerate(chunks):
            inside = inside_tokens[index]
            if is_single[index]:
                positions = self._tokenize_at_every_position(chunk)
            elif stems[index]:
                last = [*stem_tokens[index], chunk[-1]]
                positions = [inside, inside, last, last]
            else:
                positions = [inside] * NUM_POSITIONS
            spans.append(self._store_positions(positions))
        self._spans.extend(spans)

    def _store_positions(self, positions: Sequence[Sequence[str]]) -> list[int]:
        spans: list[int] = []
        for index, words in enumerate(positions):
            if index and words == positions[index - 1]:
                spans += spans[-2:]
                continue
            begin = len(self._tokens)
            self._tokens.extend(self.vocabulary.ids(words))
            spans += [begin, len(self._tokens)]
        return spans

    def _tokenize_joined(self, chunks: Sequence[str]) -> list[list[str]]:
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

    def _tokenize_at_every_position(self, chunk: str) -> list[list[str]]:
        tokenize = self._word_tokenizer.tokenize
        return [
            tokenize(f"{_DIVIDER} {chunk} {_DIVIDER}")[1:-1],
            tokenize(f"{chunk} {_DIVIDER}")[:-1],
            tokenize(f"{_DIVIDER} {chunk}")[1:],
            tokenize(chunk),
        ]
