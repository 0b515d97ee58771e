"""NLTK's averaged perceptron tagger, evaluated by a compiled kernel over arrays built from NLTK's own weights.

NLTK gives every token 14 string features and adds up one dictionary of weights per feature. Thirteen of them depend
on a word (or on a word and a tag) only, so a distinct word is looked up once, in `PerceptronTagger.add_words`,
and tagging a token is 14 row additions. Weights are stored as whole thousandths (NLTK rounds them to three
decimals), which makes the sums exact. Where two labels tie exactly, NLTK's answer hangs on the rounding of its
floating point sum, so the kernel repeats that sum in NLTK's order of features.
"""

# W distinct words, T tags (classes, two start markers, other tags of the tag dictionary), C classes, R weight rows

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from nltk.tag.perceptron import PerceptronTagger as NltkPerceptronTagger
from numba import njit

from dataset_stats.arrays import GrowingArray

START_MARKERS = ("-START-", "-START2-")
END_MARKERS = ("-END-", "-END2-")
# Context markers are words 0 to 3 of every vocabulary; unlike words they are never normalised.
CONTEXT_MARKERS = START_MARKERS + END_MARKERS
THOUSANDTHS = 1000

# Columns of the word table.
(
    SUFFIX,
    PREFIX,
    WORD,
    TAG_WORD,
    PREVIOUS_WORD,
    PREVIOUS_SUFFIX,
    SECOND_PREVIOUS_WORD,
    NEXT_WORD,
    NEXT_SUFFIX,
    SECOND_NEXT_WORD,
    FIXED_TAG,
) = range(11)
NUM_WORD_COLUMNS = 11
NUM_FEATURES = 14
# NLTK's names of the features that depend on one word only, in the order of the columns.
WORD_FEATURES = (
    "i suffix",
    "i pref1",
    "i word",
    "i-1 word",
    "i-1 suffix",
    "i-2 word",
    "i+1 word",
    "i+1 suffix",
    "i+2 word",
)


class PerceptronWeights(NamedTuple):
    """Weights of the perceptron as arrays; row 0 of `rows` is zero and stands for "feature unknown"."""

    rows: np.ndarray  # int32 [R, C], thousandths
    bias: int
    previous_tag: np.ndarray  # int32 [T] -> row
    second_previous_tag: np.ndarray  # int32 [T] -> row
    tag_pair: np.ndarray  # int32 [T previous, T second previous] -> row
    tag_word: np.ndarray  # int32 [words seen with "i-1 tag+i word", T] -> row


class PerceptronTagger:
    """Tags word ids exactly as `nltk.pos_tag` tags the words.

    Args:
        weights: feature -> label -> weight, as in NLTK's `*.weights.json`.
        tag_dictionary: words with one tag, as in NLTK's `*.tagdict.json`.
        classes: the labels.

    Raises:
        ValueError: a weight is not a multiple of 0.001, so the weights are not an averaged perceptron of NLTK's.
    """

    def __init__(
        self,
        weights: Mapping[str, Mapping[str, float]],
        tag_dictionary: Mapping[str, str],
        classes: Iterable[str],
    ) -> None:
        self.classes = sorted(classes)
        extra_tags = sorted(set(tag_dictionary.values()) - set(self.classes))
        self.labels = (*self.classes, *START_MARKERS, *extra_tags)
        self._tag_ids = {label: index for index, label in enumerate(self.labels)}
        self._tag_dictionary = tag_dictionary
        self._rows_of = _rows_by_name(weights)
        self._word_rows = [self._rows_of.get(name, {}) for name in WORD_FEATURES]
        self._normalize = NltkPerceptronTagger(load=False).normalize
        self._tag_word_ids: dict[str, int] = {}
        self._weights = self._build_weights(weights)
        # Most distinct words of a large set are in none of the tables, and one look-up says so.
        named = [self._rows_of.get(name, {}) for name in WORD_FEATURES if name.endswith("word")]
        self._known_words = set(self._tag_word_ids).union(*named)
        self._words = GrowingArray(np.int32, num_columns=NUM_WORD_COLUMNS)
        self.clear()

    def clear(self) -> None:
        """Forget all words but the four context markers."""
        self._words.clear()
        self._words.extend([self._word_columns(marker, marker) for marker in CONTEXT_MARKERS])

    def add_words(self, words: Sequence[str]) -> None:
        """Give the next word ids to `words`; the first word added has id 4, after the context markers."""
        self._words.extend(
            [
                self._word_columns(word, word.lower() if word.isalpha() and word.isascii() else self._normalize(word))
                for word in words
            ]
        )

    def tag(self, words: np.ndarray, sentence_ends: np.ndarray) -> np.ndarray:
        """Tags of a run of sentences.

        Args:
            words: int32 [num_tokens], word ids.
            sentence_ends: int64 [num_sentences], end of each sentence in `words`.

        Returns:
            int16 [num_tokens], indices into `labels`.
        """
        tags = np.empty(len(words), dtype=np.int16)
        start_tags = len(self.classes)
        _tag_sentences(words, sentence_ends, self._words.values, self._weights, start_tags, tags)
        return tags

    def _build_weights(self, weights: Mapping[str, Mapping[str, float]]) -> PerceptronWeights:
        column_of = {label: index for index, label in enumerate(self.classes)}
        rows = np.zeros((len(weights) + 1, len(self.classes)), dtype=np.float64)
        for index, row in enumerate(weights.values(), start=1):
            for label, weight in row.items():
                rows[index, column_of[label]] = weight
        thousandths = np.rint(rows * THOUSANDTHS)
        if not np.allclose(rows * THOUSANDTHS, thousandths, rtol=0, atol=1e-6):
            raise ValueError("perceptron weights are not multiples of 0.001; expected NLTK's averaged weights")
        return PerceptronWeights(
            rows=thousandths.astype(np.int32),
            bias=self._rows_of.get("bias ", {}).get("", 0),
            previous_tag=self._tag_rows("i-1 tag"),
            second_previous_tag=self._tag_rows("i-2 tag"),
            tag_pair=np.stack([self._tag_rows("i tag+i-2", prefix=f"tag {label} ") for label in self.labels]),
            tag_word=self._tag_word_rows(),
        )

    def _tag_rows(self, name: str, *, prefix: str = "") -> np.ndarray:
        rows = self._rows_of.get(name, {})
        return np.array([rows.get(prefix + label, 0) for label in self.labels], dtype=np.int32)

    def _tag_word_rows(self) -> np.ndarray:
        table: list[list[int]] = [[0] * len(self.labels)]  # entry 0: the word was never seen with a tag before it
        for context, row in self._rows_of.get("i-1 tag+i", {}).items():
            _, tag, word = context.split(" ", 2)
            if tag not in self._tag_ids:
                continue
            index = self._tag_word_ids.setdefault(word, len(table))
            if index == len(table):
                table.append([0] * len(self.labels))
            table[index][self._tag_ids[tag]] = row
        return np.array(table, dtype=np.int32)

    def _word_columns(self, word: str, normalized: str) -> tuple[int, ...]:
        suffix, prefix, itself, previous, previous_suffix, second_previous, after, after_suffix, second_after = (
            self._word_rows
        )
        normalized_suffix = normalized[-3:]
        fixed_tag = self._tag_dictionary.get(word)
        is_known = normalized in self._known_words
        return (
            suffix.get(word[-3:], 0),
            prefix.get(word[:1], 0),
            itself.get(normalized, 0) if is_known else 0,
            self._tag_word_ids.get(normalized, 0) if is_known else 0,
            previous.get(normalized, 0) if is_known else 0,
            previous_suffix.get(normalized_suffix, 0),
            second_previous.get(normalized, 0) if is_known else 0,
            after.get(normalized, 0) if is_known else 0,
            after_suffix.get(normalized_suffix, 0),
            second_after.get(normalized, 0) if is_known else 0,
            self._tag_ids[fixed_tag] if fixed_tag else -1,
        )


def _rows_by_name(weights: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, int]]:
    """Row of each feature, by the feature's name (its first two words) and what follows the name."""
    rows: dict[str, dict[str, int]] = {}
    for row, feature in enumerate(weights, start=1):
        kind, _, rest = feature.partition(" ")
        what, _, context = rest.partition(" ")
        rows.setdefault(f"{kind} {what}", {})[context] = row
    return rows


@njit(cache=True, nogil=True)
def _tag_sentences(
    words: np.ndarray,
    sentence_ends: np.ndarray,
    table: np.ndarray,
    weights: PerceptronWeights,
    start_tags: int,
    tags: np.ndarray,
) -> None:
    num_classes = weights.rows.shape[1]
    scores = np.empty(num_classes, dtype=np.int32)
    features = np.empty(NUM_FEATURES, dtype=np.int32)
    begin = 0
    for sentence in range(len(sentence_ends)):
        end = sentence_ends[sentence]
        previous, second_previous = start_tags, start_tags + 1
        for i in range(begin, end):
            tag = table[words[i], FIXED_TAG]
            if tag < 0:
                # The contexts before the first word run -START-, -START2-; the tags run -START2-, -START-.
                before = words[i - 1] if i > begin else 1
                before_that = words[i - 2] if i > begin + 1 else (1 if i > begin else 0)
                after = words[i + 1] if i + 1 < end else 2
                after_that = words[i + 2] if i + 2 < end else (2 if i + 1 < end else 3)
                word = words[i]
                features[0] = weights.bias
                features[1] = table[word, SUFFIX]
                features[2] = table[word, PREFIX]
                features[3] = weights.previous_tag[previous]
                features[4] = weights.second_previous_tag[second_previous]
                features[5] = weights.tag_pair[previous, second_previous]
                features[6] = table[word, WORD]
                features[7] = weights.tag_word[table[word, TAG_WORD], previous]
                features[8] = table[before, PREVIOUS_WORD]
                features[9] = table[before, PREVIOUS_SUFFIX]
                features[10] = table[before_that, SECOND_PREVIOUS_WORD]
                features[11] = table[after, NEXT_WORD]
                features[12] = table[after, NEXT_SUFFIX]
                features[13] = table[after_that, SECOND_NEXT_WORD]
                tag = _best_label(features, weights.rows, scores)
            tags[i] = tag
            second_previous = previous
            previous = tag
        begin = end


@njit(cache=True, nogil=True)
def _best_label(features: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> int:
    scores[:] = 0
    for index in range(NUM_FEATURES):
        row = features[index]
        if row > 0:
            for label in range(len(scores)):
                scores[label] += rows[row, label]
    best, is_tied = 0, False
    for label in range(1, len(scores)):
        if scores[label] > scores[best]:
            best, is_tied = label, False
        elif scores[label] == scores[best]:
            best, is_tied = label, True  # the later label in the alphabet wins, as in NLTK
    return _best_tied_label(features, rows, scores, best) if is_tied else best


@njit(cache=True, nogil=True)
def _best_tied_label(features: np.ndarray, rows: np.ndarray, scores: np.ndarray, tied: int) -> int:
    best, best_score = -1, 0.0
    for label in range(len(scores)):
        if scores[label] != scores[tied]:
            continue
        score = 0.0
        for index in range(NUM_FEATURES):
            score += rows[features[index], label] / THOUSANDTHS
        if best < 0 or score >= best_score:
            best, best_score = label, score
    return best
