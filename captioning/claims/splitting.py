"""What a caption claims: its sentences, as all rooms number them, and the clauses of English ones.

A sentence is cut where a comma or `and` is followed by a word with which a new thing begins ("a red hat and a blue
coat"), but not inside "between … and …". A part that only says where ("On the left, …") goes with the next one.
"""

import re
from dataclasses import dataclass
from typing import Literal

from pipelines.text.sentences import count_words, split_sentences

# Raised when texts are cut into other claims.
CLAIMS_VERSION = 1
# Words of which a third of English prose consists; of other languages some have one or two of them.
ENGLISH = frozenset(
    ("a", "an", "the", "is", "are", "of", "on", "in", "with", "and", "at", "to", "it", "its", "there", "this", "that")
)
MIN_ENGLISH_SHARE = 0.2
WORD = re.compile(r"[^\W\d_]+")
# What a new thing begins with; no pronoun, which alone says nothing.
BEGIN = (
    *("a", "an", "the", "this", "that", "these", "those", "another", "some", "several", "many", "no", "his", "her"),
    *("its", "their", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "there"),
)
SEAM = re.compile(
    rf"(?:\s*[,;]\s*(?:and\s+|while\s+|but\s+|as\s+well\s+as\s+)?|\s+(?:and|while|but|as\s+well\s+as)\s+)"
    rf"(?=(?:{'|'.join(BEGIN)})\b)",
    re.IGNORECASE,
)
# `and` inside of what these begin joins no clauses.
PAIRS = re.compile(r"\b(?:between|both)\b", re.IGNORECASE)
PLACE = re.compile(
    r"(?:in|on|at|near|to|behind|above|below|under|beneath|beside|next|between|around|over|from|within|along|across|"
    r"inside|outside|against|towards?)\b",
    re.IGNORECASE,
)
ENDS = " \t\n.,;:!。，；！"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim, and the number of the sentence that it is from."""

    sentence: int
    text: str


def split_claims(text: str, *, split: Literal["clauses", "sentences"]) -> list[Claim]:
    """Return the claims of a caption, in order; none of a caption without words."""
    is_cut = split == "clauses" and is_english(text)
    claims: list[Claim] = []
    for number, sentence in enumerate(split_sentences(text)):
        parts = _clauses(sentence) if is_cut else [sentence]
        said = [part.strip(ENDS) for part in parts]
        claims += [Claim(sentence=number, text=part) for part in said if re.search(r"\w", part)]
    return claims


def is_english(text: str) -> bool:
    """Whether enough of a text's words are the commonest ones of English."""
    words = WORD.findall(text.casefold())
    # Of scripts without spaces each letter counts, as a word does.
    return sum(word in ENGLISH for word in words) >= MIN_ENGLISH_SHARE * max(1, count_words(text))


def _clauses(sentence: str) -> list[str]:
    clauses: list[str] = []
    begin = 0
    for seam in SEAM.finditer(sentence):
        part = sentence[begin : seam.start()]
        is_pair = PAIRS.search(part) is not None and not {",", ";"} & set(seam.group())
        is_place = PLACE.match(part) is not None and "," not in part
        if is_pair or is_place or not part.strip():
            continue
        clauses.append(part)
        begin = seam.end()
    return [*clauses, sentence[begin:]]
