"""NLTK's averaged perceptron tagger, evaluated by a compiled kernel over arrays built from NLTK's own weights.

NLTK gives every token 14 string features and adds up one dictionary of weights per feature. Most of them depend on a
word only, so a distinct word is looked up once, in `PerceptronTagger.add_words`: words with the same features share a
profile, and the weights of a profile's features are added up once for each place it can take beside the word that is
tagged. The three features of the tags before are added up once for every pair of tags. Tagging a token is then seven
row additions. Weights are stored as whole thousandths (NLTK rounds them to three decimals), which makes the sums exact.
Where two labels tie exactly, NLTK's answer hangs on the rounding of its floating point sum, so the kernel repeats that
sum in NLTK's order of features.
"""

# P profiles, S sums, T tags (classes, two start markers, other tags of the tag dictionary), C classes, R weight rows

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from nltk.tag.perceptron import PerceptronTagger as NltkPerceptronTagger
from numba import njit

from dataset_stats.tagging.arrays import GrowingArray
from errors import UserError

START_MARKERS = ("-START-", "-START2-")
END_MARKERS = ("-END-", "-END2-")
# Context markers are words 0 to 3 of every vocabulary; unlike words they are never normalised.
CONTEXT_MARKERS = START_MARKERS + END_MARKERS
THOUSANDTHS = 1000

# Columns of the profile table: rows of weights, and sums of such rows.
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
    SUM_HERE,
    SUM_BEFORE,
    SUM_AFTER,
) = range(14)
NUM_PROFILE_COLUMNS = 14
NO_TAG = -1
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
    tag_sums: np.ndarray  # int32 [T previous, T second previous, C], the three above added up
    tag_word: np.ndarray  # int32 [words seen with "i-1 tag+i word", T] -> row


class Profiles(NamedTuple):
    """The words met so far as the features they have in common."""

    of_word: np.ndarray  # int32 [num_words] -> profile
    columns: np.ndarray  # int32 [P, NUM_PROFILE_COLUMNS]
    sums: np.ndarray  # int32 [S, C], thousandths


class PerceptronTagger:
    """Tags word ids exactly as `nltk.pos_tag` tags the words.

    Args:
        weights: feature -> label -> weight, as in NLTK's `*.weights.json`.
        tag_dictionary: words with one tag, as in NLTK's `*.tagdict.json`.
        classes: the labels.

    Raises:
        UserError: a weight is not a multiple of 0.001, so the weights are not an averaged perceptron of NLTK's.
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
        self._profile_of_word = GrowingArray(np.int32)
        self._profiles = GrowingArray(np.int32, num_columns=NUM_PROFILE_COLUMNS)
        self._sums = GrowingArray(np.int32, num_columns=len(self.classes))
        self._profile_ids: dict[tuple[str, ...], int] = {}
        self._sum_ids: dict[tuple[int, ...], int] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all words but the four context markers."""
        for table in (self._profile_of_word, self._profiles, self._sums, self._profile_ids, self._sum_ids):
            table.clear()
        self._add_profiled([(marker, marker) for marker in CONTEXT_MARKERS])

    def add_words(self, words: Sequence[str]) -> None:
        """Give the next word ids to `words`; the first word added has id 4, after the context markers."""
        normalize = self._normalize
        # What NLTK's `normalize` does to most words, without the call.
        self._add_profiled([(word, word if word.isalpha() and word.islower() else normalize(word)) for word in words])

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
        profiles = Profiles(self._profile_of_word.values, self._profiles.values, self._sums.values)
        _tag_sentences(words, sentence_ends, profiles, self._weights, start_tags, tags)
        return tags

    def _build_weights(self, weights: Mapping[str, Mapping[str, float]]) -> PerceptronWeights:
        column_of = {label: index for index, label in enumerate(self.classes)}
        rows = np.zeros((len(weights) + 1, len(self.classes)), dtype=np.float64)
        for index, row in enumerate(weights.values(), start=1):
            for label, weight in row.items():
                rows[index, column_of[label]] = weight
        thousandths = np.rint(rows * THOUSANDTHS)
        if not np.allclose(rows * THOUSANDTHS, thousandths, rtol=0, atol=1e-6):
            raise UserError("perceptron weights are not multiples of 0.001; expected NLTK's averaged weights")
        rows = thousandths.astype(np.int32)
        previous_tag, second_previous_tag = self._tag_rows("i-1 tag"), self._tag_rows("i-2 tag")
        tag_pair = np.stack([self._tag_rows("i tag+i-2", prefix=f"tag {label} ") for label in self.labels])
        return PerceptronWeights(
            rows=rows,
            bias=self._rows_of.get("bias ", {}).get("", 0),
            previous_tag=previous_tag,
            second_previous_tag=second_previous_tag,
            tag_pair=tag_pair,
            tag_sums=rows[previous_tag][:, None] + rows[second_previous_tag][None] + rows[tag_pair],
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

    def _add_profiled(self, words: Sequence[tuple[str, str]]) -> None:
        """Add words given as (word, normalised word)."""
        ids, profiles, new_sums = self._profile_ids, [], []
        new_profiles: list[tuple[int, ...]] = []
        for word, normalized in words:
            # Of a word that no table names, only these ends matter.
            named = normalized if normalized in self._known_words else ""
            key = (word[-3:], word[:1], normalized[-3:], named, self._tag_dictionary.get(word, ""))
            number = ids.get(key)
            if number is None:
                number = ids[key] = len(ids)
                new_profiles.append(self._profile_columns(*key, new_sums=new_sums))
            profiles.append(number)
        self._profile_of_word.extend(profiles)
        self._profiles.extend(new_profiles)
        if new_sums:
            self._sums.extend(self._weights.rows[np.array(new_sums)].sum(axis=1, dtype=np.int32))

    def _profile_columns(
        self, end: str, start: str, normalized_end: str, named: str, fixed_tag: str, *, new_sums: list[tuple[int, ...]]
    ) -> tuple[int, ...]:
        suffix, prefix, itself, previous, previous_suffix, second_previous, after, after_suffix, second_after = (
            self._word_rows
        )
        rows = (
            suffix.get(end, 0),
            prefix.get(start, 0),
            itself.get(named, 0) if named else 0,
            self._tag_word_ids.get(named, 0) if named else 0,
            previous.get(named, 0) if named else 0,
            previous_suffix.get(normalized_end, 0),
            second_previous.get(named, 0) if named else 0,
            after.get(named, 0) if named else 0,
            after_suffix.get(normalized_end, 0),
            second_after.get(named, 0) if named else 0,
        )
        here = (self._weights.bias, rows[SUFFIX], rows[PREFIX], rows[WORD])
        before = (rows[PREVIOUS_WORD], rows[PREVIOUS_SUFFIX], 0, 0)
        beyond = (rows[NEXT_WORD], rows[NEXT_SUFFIX], 0, 0)
        sums = []
        for key in (here, before, beyond):
            number = self._sum_ids.get(key)
            if number is None:
                number = self._sum_ids[key] = len(self._sum_ids)
                new_sums.append(key)
            sums.append(number)
        return (*rows, self._tag_ids[fixed_tag] if fixed_tag else NO_TAG, *sums)


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
    profiles: Profiles,
    weights: PerceptronWeights,
    start_tags: int,
    tags: np.ndarray,
) -> None:
    table, sums, rows = profiles.columns, profiles.sums, weights.rows
    scores = np.empty(rows.shape[1], dtype=np.int32)
    begin = 0
    for sentence in range(len(sentence_ends)):
        end = sentence_ends[sentence]
        previous, second_previous = start_tags, start_tags + 1
        for i in range(begin, end):
            word = profiles.of_word[words[i]]
            tag = table[word, FIXED_TAG]
            if tag == NO_TAG:
                # The contexts before the first word run -START-, -START2-; the tags run -START2-, -START-.
                before = profiles.of_word[words[i - 1] if i > begin else 1]
                before_that = profiles.of_word[words[i - 2] if i > begin + 1 else (1 if i > begin else 0)]
                after = profiles.of_word[words[i + 1] if i + 1 < end else 2]
                after_that = profiles.of_word[words[i + 2] if i + 2 < end else (2 if i + 1 < end else 3)]
                _add_rows(
                    sums[table[word, SUM_HERE]],
                    sums[table[before, SUM_BEFORE]],
                    sums[table[after, SUM_AFTER]],
                    rows[table[before_that, SECOND_PREVIOUS_WORD]],
                    rows[table[after_that, SECOND_NEXT_WORD]],
                    weights.tag_sums[previous, second_previous],
                    rows[weights.tag_word[table[word, TAG_WORD], previous]],
                    scores,
                )
                tag, is_tied = _best_label(scores)
                if is_tied:
                    context = (before, before_that, after, after_that)
                    features = _features(word, context, previous, second_previous, table, weights)
                    tag = _best_tied_label(features, rows, scores, tag)
            tags[i] = tag
            second_previous = previous
            previous = tag
        begin = end


@njit(cache=True, nogil=True)
def _add_rows(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    d: np.ndarray,
    e: np.ndarray,
    f: np.ndarray,
    g: np.ndarray,
    scores: np.ndarray,
) -> None:
    for label in range(len(scores)):
        scores[label] = a[label] + b[label] + c[label] + d[label] + e[label] + f[label] + g[label]


@njit(cache=True, nogil=True)
def _best_label(scores: np.ndarray) -> tuple[int, bool]:
    top = scores[0]
    for label in range(1, len(scores)):
        top = max(top, scores[label])
    best, num_best = 0, 0
    for label in range(len(scores)):
        if scores[label] == top:
            best = label
            num_best += 1
    return best, num_best > 1


@njit(cache=True, nogil=True)
def _features(
    word: Any,
    context: tuple[Any, Any, Any, Any],
    previous: int,
    second_previous: int,
    table: np.ndarray,
    weights: PerceptronWeights,
) -> np.ndarray:
    """The rows of a token's features in NLTK's order."""
    before, before_that, after, after_that = context
    features = np.empty(NUM_FEATURES, dtype=np.int32)
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
    return features


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
