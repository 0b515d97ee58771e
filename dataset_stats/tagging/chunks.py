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

from dataset_stats.tagging.arrays import GrowingArray
from dataset_stats.tagging.chunk_kernels import (
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
# Plain chunks: a word, a number, or several joined by single marks, with at most one mark on each side. NLTK makes the
# word and the marks of them, and a full stop stays with its word inside a sentence. They are most of any text, so NLTK
# is asked only about the others; a test compares both ways.
_PLAIN = re.compile(
    r"([(\"]?)([A-Za-z0-9]+(?:[-_/][A-Za-z0-9]+)*)('s|[,;:?!)\"]|)"  # (1984  white-red,  dog's  "sale
    r"|()((?![A-Za-z]\.)[A-Za-z]+(?:-[A-Za-z]+)*)(\.)"  # bench. but not A. or 5., which Punkt looks at more closely
    r"|()([A-Za-z0-9_]+\.[A-Za-z0-9]+)([,;:]|)"  # img_1234.jpg
)
_SPLIT_WORDS = frozenset({"cannot", "gimme", "gonna", "gotta", "lemme", "wanna"})  # NLTK makes two tokens of them
_PARTS = re.compile(r"[^a-z0-9]")
_FINAL_PERIOD = re.compile(r"[^.]\.[\])}>\"'»”’]*\Z")
_ANY_PERIOD = re.compile(r"[.?!]")
_QUOTES = ("'", '"')
# Joins chunks so that NLTK tokenises many at once; a private-use character that no rule of NLTK's knows.
_DIVIDER = "\ue000"


# Tokens inside, at the start, at the end and as the whole of a sentence.
_Positions = tuple[list[str], list[str], list[str], list[str]]
_PERIODS = frozenset(".?!")


class Vocabulary(dict[str, int]):
    """Ids of words, which start after `first_id` reserved ones; asking for a new word gives it the next id.

    Attributes:
        words: the words in the order of their ids.
    """

    def __init__(self, first_id: int) -> None:
        super().__init__()
        self.first_id = first_id
        self.words: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = self.num_ids
        self.words.append(word)
        return number

    @property
    def num_ids(self) -> int:
        """Ids given so far, the reserved ones included."""
        return self.first_id + len(self.words)

    def ids(self, words: Sequence[str]) -> list[int]:
        """Ids of `words`; new words are added."""
        return [self[word] for word in words]


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
        self._most_tokens = GrowingArray(np.int64)  # at the position with most
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
        words = np.empty(int(self._most_tokens.values[chunks].sum()), dtype=np.int32)
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
        new = _NewChunks(self.vocabulary, len(self._tokens))
        asked: list[tuple[int, str]] = []
        for index, (begin, end) in enumerate(itertools.pairwise(ends)):
            chunk = new_bytes[begin:end].decode()
            plain = _PLAIN.fullmatch(chunk)
            if plain is not None:
                last = plain.lastindex or 0
                opening, word, closing = plain[last - 2], plain[last - 1], plain[last]
                if not _is_split(word):
                    new.add_plain(opening, word, closing)
                    continue
            flags, breaks = self._flags_and_breaks(chunk)
            new.add(flags, breaks, self._follower_kind(chunk))
            if not flags & IS_SLOW:
                asked.append((index, chunk))
        for (index, _), positions in zip(asked, self._ask_positions([chunk for _, chunk in asked]), strict=True):
            new.set_positions(index, positions)
        rows = np.array(new.rows, dtype=np.int32).reshape(-1, _NewChunks.ROW_LENGTH)
        for column, table in enumerate((self._flags, self._breaks, self._follower)):
            table.extend(rows[:, column])
        spans = rows[:, 3:]
        self._spans.extend(spans)
        self._most_tokens.extend((spans[:, 1::2] - spans[:, ::2]).max(axis=1))
        self._tokens.extend(new.tokens)

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


def _is_split(word: str) -> bool:
    word = word.lower()
    if word.isalnum():
        return word in _SPLIT_WORDS
    return not _SPLIT_WORDS.isdisjoint(_PARTS.split(word))


class _NewChunks:
    """Properties of chunks met for the first time.

    Attributes:
        rows: one row of `ROW_LENGTH` numbers per chunk, end to end: flags, breaks, follower, spans.
        tokens: word ids that the spans are slices of.
    """

    ROW_LENGTH = 3 + 2 * NUM_POSITIONS

    def __init__(self, vocabulary: Vocabulary, num_stored_tokens: int) -> None:
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self._vocabulary = vocabulary
        self._num_stored = num_stored_tokens

    def add(self, flags: int, breaks: int, follower: int) -> None:
        """A chunk without tokens; `set_positions` gives it some."""
        self.rows += (flags, breaks, follower, *((self._num_stored,) * (2 * NUM_POSITIONS)))

    def add_plain(self, opening: str, word: str, closing: str) -> None:
        """A word between two marks, each of which may be empty."""
        vocabulary, tokens = self._vocabulary, self.tokens
        begin = last = self._num_stored + len(tokens)
        follower = LOWER if word[0].islower() else UPPER if word[0].isupper() else OTHER
        flags, breaks = 0, NO_BREAKS
        if opening:
            flags, follower = HAS_OUTER_QUOTE * (opening == '"'), OTHER
            tokens.append(vocabulary["``" if opening == '"' else opening])
        elif closing == ".":
            tokens.append(vocabulary[word + closing])  # the one token it is inside a sentence
            last += 1
        tokens.append(vocabulary[word])
        if closing:
            tokens.append(vocabulary["''" if closing == '"' else closing])
            if closing in _PERIODS:
                flags, breaks = flags | ENDS_WITH_PERIOD, ALL_BREAKS
        end = self._num_stored + len(tokens)
        inside_end = end if last == begin else last
        self.rows += (flags, breaks, follower, begin, inside_end, begin, inside_end, last, end, last, end)

    def set_positions(self, index: int, positions: _Positions) -> None:
        """Tokens of chunk `index` at the four positions; lists that are the same object are stored once."""
        stored: dict[int, tuple[int, int]] = {}
        spans: list[int] = []
        for words in positions:
            if id(words) not in stored:
                begin = self._num_stored + len(self.tokens)
                self.tokens += self._vocabulary.ids(words)
                stored[id(words)] = (begin, begin + len(words))
            spans += stored[id(words)]
        stop = (index + 1) * self.ROW_LENGTH
        self.rows[stop - len(spans) : stop] = spans
