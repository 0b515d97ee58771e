"""Signs of a bad caption as columns: measures and flags from the text alone, so that judging anew needs no model."""

import re
from collections.abc import Mapping
from typing import Any

from captioning.config import QualityConfig

# Longest alternatives first; group 1 is what is cut.
BOILERPLATE = re.compile(
    r"^((?:the|this)\s+(?:image|picture|photo|photograph|scene)\s+"
    r"(?:features|depicts|shows|displays|showcases|captures|presents|portrays|contains|is\s+of)\s+)(\S)",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+")
MIN_ALT_WORD_LETTERS = 3
# Raised when the flags mean something else, or are others: captions that are there are judged again, not made again.
JUDGE_VERSION = 1
FLAGS = ("empty", "truncated", "loop", "boilerplate", "off_frame", "off_alt_text", "retried")


def repeated_ngram_ratio(text: str, ngram_words: int) -> float:
    """Return the share of word n-grams that occurred before in the caption: 0 for prose, near 1 for a loop."""
    words = WORD.findall(text.casefold())
    ngrams = [tuple(words[start : start + ngram_words]) for start in range(len(words) - ngram_words + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def alt_text_overlap(text: str, alt_text: str | None) -> float | None:
    """Return the share of the alt text's distinct words (of three letters and more) that the caption uses, or None."""
    expected = {word for word in WORD.findall((alt_text or "").casefold()) if len(word) >= MIN_ALT_WORD_LETTERS}
    if not expected:
        return None
    return len(expected & set(WORD.findall(text.casefold()))) / len(expected)


def strip_boilerplate(text: str) -> str:
    """Cut a prefix such as `The image features`, and start what remains with a capital letter."""
    match = BOILERPLATE.match(text)
    return text[match.end(1) : match.end(2)].upper() + text[match.end(2) :] if match else text


def judge(row: Mapping[str, Any], quality: QualityConfig) -> Mapping[str, Any]:
    """Return the columns that depend on `quality`: `caption`, `flags`, `repeated_ngram_ratio`, `alt_text_overlap`.

    Of `row` they need `caption_raw`, `first_caption`, `finish_reason` and `alt_text`.
    """
    caption_raw, alt_text = row["caption_raw"], row["alt_text"]
    ratio = repeated_ngram_ratio(caption_raw, quality.ngram_words)
    overlap = alt_text_overlap(caption_raw, alt_text)
    folded = caption_raw.casefold()
    signs = {
        "empty": not caption_raw.strip(),
        "truncated": row["finish_reason"] == "length",
        "loop": ratio > quality.max_repeated_ngram_ratio,
        "boilerplate": BOILERPLATE.match(caption_raw) is not None,
        "off_frame": any(phrase.casefold() in folded for phrase in quality.off_frame_phrases),
        "off_alt_text": overlap is not None and overlap < quality.min_alt_text_overlap,
        "retried": row["first_caption"] is not None,
    }
    return {
        "caption": strip_boilerplate(caption_raw) if quality.strip_boilerplate else caption_raw,
        "flags": [flag for flag in FLAGS if signs[flag]],
        "repeated_ngram_ratio": ratio,
        "alt_text_overlap": overlap,
    }
