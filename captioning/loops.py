"""How much of a text is said again: n-grams, sentences and lines, and characters on end, in any script."""

import re
from collections import Counter

from pipelines.text.sentences import FULL_STOPS, UNSPACED

SPACED_WORD = re.compile(r"\w+")
# Vowel signs and other marks, which `\w` leaves out, belong to the letters before them.
MARKS = (
    "\u0300-\u036f\u064b-\u065f\u0900-\u0903\u093a-\u094f\u0981-\u0983\u09bc-\u09cd\u0b82-\u0bcd\u0c00-\u0c04\u0c3e-\u0c56"
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b4-\u17d3"
)
# In scripts without spaces each letter is a word.
WORD = re.compile(rf"{UNSPACED.pattern}[{MARKS}]*|(?:[^\W{UNSPACED.pattern[1:-1]}]|[{MARKS}])+")
# A sentence ends at a full stop, or with its line; a list's number or bullet is none of its words.
SENTENCE_END = re.compile(rf"[.!?]+(?=\s|$)|[{FULL_STOPS}]+|\n+")
ITEM_MARK = re.compile(r"^\s*(?:[-*•·–#]+|\(?\d{1,3}[.)]|\d{1,3}:)\s*", re.MULTILINE)
MIN_WORDS_OF_SENTENCE = 2
# Longest unit of a loop of characters.
MAX_UNIT = 8


def repeated_ngram_ratio(text: str, ngram_words: int, *, by_script: bool = False) -> float:
    """Return the share of word n-grams that occurred before in the caption: 0 for prose, near 1 for a loop.

    Words are what stands between spaces and marks; `by_script`, each letter is one in scripts without spaces. Texts in
    Latin, Greek or Cyrillic letters have the same words either way.
    """
    words = _words(text) if by_script else SPACED_WORD.findall(text.casefold())
    ngrams = [tuple(words[start : start + ngram_words]) for start in range(len(words) - ngram_words + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def count_same_sentence(text: str) -> int:
    """Return how often the sentence, line or list item is said that is said most, of those of two words and more."""
    sentences = SENTENCE_END.split(ITEM_MARK.sub("", text) if "\n" in text else text)
    for sentence, count in Counter(part.strip().casefold() for part in sentences).most_common():
        if count == 1 or len(_words(sentence)) >= MIN_WORDS_OF_SENTENCE:
            return count
    return 0


def has_characters_on_end(text: str, most: int) -> bool:
    """Whether up to `MAX_UNIT` characters are said on end more than `most` times; any white space is one space."""
    data = " ".join(text.split()).encode("utf-32-le", errors="surrogatepass")
    number = int.from_bytes(data, "little")
    for unit in range(1, MAX_UNIT + 1):
        # Where a text and the text a unit further on are alike, there are zeros.
        alike = (number ^ (number >> 32 * unit)).to_bytes(len(data), "little")
        if alike.find(bytes(4 * unit * most), 0, len(data) - 4 * unit) >= 0:
            return True
    return False


def _words(text: str) -> list[str]:
    return (SPACED_WORD if text.isascii() else WORD).findall(text.casefold())
