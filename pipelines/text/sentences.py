"""Where the sentences of a caption begin and end, in any script: the one way in which sentences are numbered here.

Punkt (arXiv cs/0605022, as NLTK has it, with a list of abbreviations instead of training) splits at `.`, `!` and `?`
before white space. Full stops of scripts that Punkt does not know end a sentence wherever they stand, and so do blank
lines and the lines of a list. Every character that is no white space is in exactly one sentence.
"""

import functools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

# Raised when texts are split otherwise: what was numbered or cut by the old way is then made again.
SPLITTER_VERSION = 1
# Chinese and Japanese, Devanagari and its neighbours, Urdu and Arabic, Armenian, Ethiopic, Burmese, Khmer.
FULL_STOPS = "。！？｡．…।॥۔؟։።፧፨။។៕"
CLOSERS = "\"'”’»›)\\]）】」』〉》〗｝}*_"
# What ends a sentence inside a line. `．` and `…` stand inside numbers and phrases, too: only before white space or the
# end do they end one.
STOP = re.compile(rf"[。！？｡।॥۔؟։።፧፨။។៕]+[{CLOSERS}]*|[．…]+[{CLOSERS}]*(?=\s|$)")
# A blank line, or a line break before or after a line of a list or a heading.
LIST_LINE = r"(?:[-*•·–]|#{1,6}|\(?\d{1,2}[.)])[ \t]+\S"
BLANK_LINE = re.compile(r"\n[ \t]*\n")
LINE = re.compile(r"[^\n]*\n?")
# Before white space these end no sentence, whatever follows.
ABBREVIATIONS = (
    *("dr", "mr", "mrs", "ms", "prof", "st", "rev", "capt", "lt", "sgt", "jr", "sr", "mt", "vs", "dept"),
    *("approx", "ca", "cf", "e.g", "i.e", "incl", "bzw", "z.b", "d.h", "evtl", "ggf", "sog", "p.ex", "p.ej"),
    *("sra", "dra", "sres", "mme", "mlle", "av", "aprox", "env", "т.е", "др"),
)
# These end one only before a word that does not begin small.
ENDING = (
    "etc",
    "a.m",
    "p.m",
    "u.s",
    "u.k",
    "u.s.a",
    "d.c",
    "inc",
    "ltd",
    "co",
    "corp",
    "ph.d",
    "usw",
    "u.a",
    "т.д",
    "т.п",
)
BEFORE_SMALL = re.compile(rf"(?:^|[\s(\"'“‘])(?:{'|'.join(map(re.escape, ENDING))})\.$", re.IGNORECASE)
# These end none before a number.
BEFORE_NUMBERS = re.compile(r"\b(?:nos?|nr|figs?|vol|pp?|рис|стр)\.$", re.IGNORECASE)
# The first letter of a name, after another name or letter, or after a word by which a name follows.
INITIAL = re.compile(r"(?:[A-Z]\.|\b(?:[A-Z][\w'’-]+|by|von|van|par|por))\s*\b[A-Z]\.$")
# Marks that close what the sentence before has opened.
CLOSING_MARKS = re.compile(r"[\"'”’»)\]*_]+(?=\s|$)")
# A number of a list, or marks alone, belong to what follows or to what was before.
NUMBER_OF_LIST = re.compile(r"\(?\d{1,2}[.)]$")
HAS_WORD = re.compile(r"\w")
WHITE_SPACE = re.compile(r"\S(?:.*\S)?", re.DOTALL)
# Scripts that put no space between words: Han, kana, Thai, Lao, Burmese, Khmer. Each of their letters is counted.
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
WORD = re.compile(rf"{UNSPACED.pattern}|[^\W_]+(?:['’.,/-][^\W_]+)*")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return where each sentence of a text begins and ends, without the white space around it, in order."""
    spans: list[tuple[int, int]] = []
    for begin, end in _blocks(text):
        block: list[tuple[int, int]] = []
        for start, stop in _stops(text, begin, end):
            block += [(start + first, start + last) for first, last in _punkt().span_tokenize(text[start:stop])]
        spans += _joined(text, [trimmed for span in block if (trimmed := _trimmed(text, *span)) is not None])
    return spans


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text; the position of each is its number, wherever sentences have numbers."""
    return [text[begin:end] for begin, end in sentence_spans(text)]


def keep_sentences(text: str, numbers: Collection[int]) -> str:
    """Return the sentences with these numbers, in their order, and before each but the first what it was set off by.

    All numbers give the text as it is, without the white space around it.

    Raises:
        IndexError: the text has no sentence of some number.
    """
    return keep_spans(text, sentence_spans(text), numbers)


def keep_spans(text: str, spans: Sequence[tuple[int, int]], numbers: Collection[int]) -> str:
    """Return what `keep_sentences` does, of a text whose `sentence_spans` are known."""
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(spans):
        raise IndexError(f"sentences {sorted(numbers)} of a text that has {len(spans)}")
    kept = ""
    for number in sorted(set(numbers)):
        begin, end = spans[number]
        gap = text[spans[number - 1][1] : begin] if number else ""
        kept += (gap if kept else "") + text[begin:end]
    return kept


def count_words(text: str) -> int:
    """Return how many words a text has; in scripts without spaces each letter counts as one."""
    return sum(1 for _ in WORD.finditer(text))


@functools.cache
def _punkt() -> "PunktSentenceTokenizer":
    # NLTK takes half a second, and only who splits needs it.
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Yield what no sentence reaches beyond: paragraphs, headings and lines of lists."""
    begin, was_apart = 0, False
    for line in LINE.finditer(text):
        content = line.group().strip()
        is_apart = re.match(LIST_LINE, content) is not None
        if line.start() > begin and (is_apart or was_apart or not content):
            yield begin, line.start()
            begin = line.start()
        was_apart = is_apart
    if begin < len(text):
        yield begin, len(text)


def _stops(text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    for stop in STOP.finditer(text, begin, end):
        yield begin, stop.end()
        begin = stop.end()
    if begin < end:
        yield begin, end


def _trimmed(text: str, begin: int, end: int) -> tuple[int, int] | None:
    found = WHITE_SPACE.search(text, begin, end)
    return None if found is None else found.span()


def _joined(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join what is no sentence of its own: after an abbreviation, a list's number, and marks without a word."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and begin == joined[-1][1] and (marks := CLOSING_MARKS.match(text, begin, end)):
            joined[-1] = (joined[-1][0], marks.end())
            if (rest := _trimmed(text, marks.end(), end)) is None:
                continue
            begin, end = rest
        if joined and _is_open(text[slice(*joined[-1])], text[begin:end]):
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _is_open(before: str, after: str) -> bool:
    """Whether what was split goes on."""
    if NUMBER_OF_LIST.match(before) or not HAS_WORD.search(before) or not HAS_WORD.search(after):
        return True
    first = after[0]
    return bool(
        (first.islower() and (before.endswith("…") or BEFORE_SMALL.search(before)))
        or (first.isdecimal() and BEFORE_NUMBERS.search(before))
        or (first.isupper() and INITIAL.search(before))
    )
