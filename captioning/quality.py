"""Signs of a bad caption as columns: measures and flags from the text alone, so that judging anew needs no model."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

from captioning.config import QualityConfig
from captioning.loops import count_same_sentence, has_characters_on_end, repeated_ngram_ratio
from pipelines.text.sentences import UNSPACED

WORD = re.compile(r"\w+")
MIN_ALT_WORD_LETTERS = 3
# No word goes on here: scripts without spaces, and Korean's particles, follow on anything.
WORD_START = rf"(?<![^\W{UNSPACED.pattern[1:-1]}])"
# Thai has spaces between sentences and no full stops.
SENTENCE_START = r"(?:^|(?<=[.!?:।] )|(?<=[。！？])|(?<=[\u0e00-\u0e7f] ))"
NO_LETTER = rf"[^\W{UNSPACED.pattern[1:-1]}\uac00-\ud7a3]"
# What a caption quotes is what somebody has read in the picture. Between single marks are apostrophes, too.
QUOTED = re.compile(
    rf"""(?<!{NO_LETTER})'(?=\S)(?:[^']|'(?={NO_LETTER})){{1,300}}'(?!{NO_LETTER})|"[^"]{{1,300}}"|“[^”]{{1,300}}”"""
    r"""|„[^“”]{1,300}[“”]|«[^»]{1,300}»|‹[^›]{1,300}›|「[^」]{1,300}」|『[^』]{1,300}』|《[^》]{1,300}》"""
)
APOSTROPHES = str.maketrans("’‘ʼ`´", "'''''")
QUOTES = frozenset("'\"“„«‹「『《")
# Chinese and Japanese are written in each other's.
SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "FULLWIDTH": "LATIN"}
MIN_OTHER_LETTERS = 4
# Raised when the flags mean something else, or are others: captions that are there are judged again, not made again.
JUDGE_VERSION = 5
FLAGS = (
    *("empty", "truncated", "loop", "boilerplate", "summary", "markup", "refusal", "speaks_of_user", "file_name"),
    *("other_script", "off_frame", "off_alt_text", "retried"),
)


def alt_text_overlap(text: str, alt_text: str | None) -> float | None:
    """Return the share of the alt text's distinct words (of three letters and more) that the caption uses, or None."""
    expected = {word for word in WORD.findall((alt_text or "").casefold()) if len(word) >= MIN_ALT_WORD_LETTERS}
    if not expected:
        return None
    return len(expected & set(WORD.findall(text.casefold()))) / len(expected)


def strip_boilerplate(text: str, quality: QualityConfig) -> str:
    """Cut an opening such as `The image features`, and start what remains with a capital letter."""
    match = _opening(text, quality)
    if match is None:
        return text
    return text[match.end() : match.end() + 1].upper() + text[match.end() + 1 :]


def judge(row: Mapping[str, Any], quality: QualityConfig) -> Mapping[str, Any]:
    """Return the columns that depend on `quality`: `caption`, `flags`, `repeated_ngram_ratio`, `alt_text_overlap`.

    Of `row` they need `caption_raw`, `first_caption`, `finish_reason`, `alt_text`, and `prompt` if somebody was asked.
    """
    caption_raw, alt_text = row["caption_raw"], row["alt_text"]
    ratio = repeated_ngram_ratio(caption_raw, quality.ngram_words, by_script=True)
    overlap = alt_text_overlap(caption_raw, alt_text)
    folded, own_words = caption_raw.casefold(), without_quotes(caption_raw.lower())
    signs = {
        "empty": not caption_raw.strip(),
        "truncated": row["finish_reason"] == "length",
        "loop": ratio > quality.max_repeated_ngram_ratio
        or count_same_sentence(caption_raw) > quality.max_same_sentence
        or has_characters_on_end(caption_raw, quality.max_characters_on_end),
        "boilerplate": _opening(caption_raw, quality) is not None,
        "summary": _sentences(quality.phrases_of("summary")).search(own_words) is not None,
        "markup": _lines(quality.phrases_of("markup")).search(caption_raw.lower()) is not None,
        "refusal": _has(own_words, "refusal", quality),
        "speaks_of_user": _has(own_words, "speaks_of_user", quality),
        "file_name": _has(own_words, "file_name", quality),
        "other_script": other_script(own_words, row.get("prompt")) > quality.max_other_script,
        "off_frame": any(phrase.casefold() in folded for phrase in quality.off_frame_phrases),
        "off_alt_text": overlap is not None and overlap < quality.min_alt_text_overlap,
        "retried": row["first_caption"] is not None,
    }
    return {
        "caption": strip_boilerplate(caption_raw, quality) if quality.strip_boilerplate else caption_raw,
        "flags": [flag for flag in FLAGS if signs[flag]],
        "repeated_ngram_ratio": ratio,
        "alt_text_overlap": overlap,
    }


def without_quotes(text: str) -> str:
    """Return a text without what stands in quotation marks, on one line, with straight apostrophes.

    A text that is quoted as a whole stays.
    """
    straight = " ".join(text.translate(APOSTROPHES).split())
    if QUOTES.isdisjoint(straight):
        return straight
    found = QUOTED.sub('""', straight)
    return found if WORD.search(found) else straight


def other_script(text: str, prompt: str | None) -> float:
    """Return the share of letters that are of scripts which the prompt has none of; 0 where there was no prompt.

    A few letters, as of a name, are none, and Latin ones only where most are: names and brands have them everywhere.
    """
    if not prompt or (text.isascii() and prompt.isascii()):
        return 0.0
    scripts, asked = Counter(map(_script, text)), set(map(_script, prompt))
    del scripts[""]
    if 2 * scripts["LATIN"] <= scripts.total():
        asked.add("LATIN")
    others = sum(count for script, count in scripts.items() if script not in asked)
    return others / scripts.total() if others >= MIN_OTHER_LETTERS else 0.0


@functools.lru_cache(maxsize=10_000)
def _script(character: str) -> str:
    """Return the script of a letter by the first word of its Unicode name, and nothing for other characters."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").partition(" ")[0]
    return SAME_SCRIPT.get(name, name)


def _has(text: str, flag: str, quality: QualityConfig) -> bool:
    return _phrases(quality.phrases_of(flag)).search(text) is not None


def _opening(text: str, quality: QualityConfig) -> re.Match[str] | None:
    """Return the boilerplate a text starts with, if something follows it."""
    return _openings(quality.phrases_of("boilerplate")).match(text)


@functools.lru_cache
def _phrases(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"{WORD_START}(?:{'|'.join(patterns)})" if patterns else "(?!)")


@functools.lru_cache
def _sentences(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"{SENTENCE_START}(?:{'|'.join(patterns)})" if patterns else "(?!)")


@functools.lru_cache
def _openings(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?:{'|'.join(patterns)})(?=\S)" if patterns else "(?!)", re.IGNORECASE)


@functools.lru_cache
def _lines(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or "(?!)", re.MULTILINE)
