"""What else is known of the captions: lengths, what is missing, duplicates, languages, faults; and what to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dataset_stats.distribution import Distribution
from dataset_stats.languages import NO_LETTERS, UNDECIDED
from dataset_stats.measures import SetMeasures

LENGTH_NAMES = {
    "nouns": "Nouns",
    "words": "Words",
    "characters": "Characters",
    "text_tokens": "T5 tokens",
}
MEAN_ERRORS = {
    "nouns": "nouns_per_image",
    "words": "tokens_per_caption",
    "characters": "characters_per_caption",
    "text_tokens": "text_tokens_per_caption",
}
REASONS = {
    "no_text": "null: the sample has no text",
    "blank_text": "empty, or white space alone",
    "not_text": "a number, list or other value",
    "not_utf8": "bytes that are no UTF-8",
    "not_json": "a line that is no JSON object",
    "too_long": "longer than max_characters",
    "corrupt_alt_text": "a text member that cannot be read",
    "cut_off": "the file ends in the sample",
}
ALWAYS_SHOWN = ("no_text", "blank_text", "not_text", "not_utf8")  # zeros, too, so that one sees what was looked for
OTHER_REASON = "as captioning or img2dataset said"
# From these shares of a set's captions on, a sentence says so.
DUPLICATES, REJECTED, OTHER_LANGUAGES, OVER_LIMIT, UNREAD, FLAGGED = 0.01, 0.01, 0.05, 0.01, 0.01, 0.01
BOILERPLATE, ONE_TEXT = 0.2, 0.01
UNSUPPORTED, UNKNOWN_CLAIMS = 0.05, 0.2
SHORT_WORDS = 3  # half of the captions have no more


@dataclass(frozen=True)
class QualityTable:
    """Rows with one text per set.

    Attributes:
        name: for anchors and files.
        meanings: by row, what it stands for, where its name does not say it.
    """

    name: str
    title: str
    note: str
    rows: dict[str, list[str]]
    meanings: Mapping[str, str]


@dataclass(frozen=True)
class Notice:
    """A sentence about a set, and the part of the report that has the numbers."""

    text: str
    part: str


def plus_minus(m: SetMeasures, name: str, form: str) -> str:
    """The standard error of a sample's number as " ± x"; nothing where all captions were counted."""
    error = m.error(name)
    return "" if error is None else f" ± {form.format(error)}"


def length_rows(measures: Mapping[str, SetMeasures]) -> list[tuple[str, str, list[str]]]:
    """What is measured, the set, and mean, standard deviation, minimum, quantiles and maximum."""
    rows = []
    for kind, title in LENGTH_NAMES.items():
        for name, m in measures.items():
            if kind in m.lengths:
                mean, deviation, *quantiles = m.lengths[kind].summary().values()
                error = plus_minus(m, MEAN_ERRORS[kind], "{:.2f}")
                rows.append(
                    (title, name, [f"{mean:,.1f}{error}", f"{deviation:,.1f}", *(f"{value:,g}" for value in quantiles)])
                )
    return rows


def length_columns() -> list[str]:
    """Names of the columns of `length_rows`."""
    return list(Distribution().summary())


def quality_tables(measures: Mapping[str, SetMeasures]) -> list[QualityTable]:
    """The tables with a column for each set; those that would be empty are left out."""
    tables = [_cut(measures), _missing(measures), _duplicates(measures), _languages(measures), _faults(measures)]
    return [table for table in tables if table.rows]


def _share(count: int, whole: int, m: SetMeasures, error: str = "") -> str:
    pm = plus_minus(m, error, "{:.2%}") if error else ""
    return f"{count:,} ({percent(count, whole)}{pm})"


def percent(count: int, whole: int) -> str:
    """A share that is 0.0% or 100.0% only where it is none or all."""
    text = f"{count / max(whole, 1):.1%}"
    if count and text == "0.0%":
        return "< 0.1%"
    return "> 99.9%" if count < whole and text == "100.0%" else text


def _each(measures: Mapping[str, SetMeasures], cell: Callable[[SetMeasures], str]) -> list[str]:
    return [cell(m) for m in measures.values()]


def _cut(measures: Mapping[str, SetMeasures]) -> QualityTable:
    rows = {}
    for limit in sorted({limit for m in measures.values() for limit in m.num_over_limit}, key=int):
        rows[f"Over {limit} T5 tokens"] = [
            _share(m.num_over_limit.get(limit, 0), m.num_captions, m, f"over_limit_fraction.{limit}")
            for m in measures.values()
        ]
        rows[f"Nouns lost at {limit}"] = [
            _share(m.nouns_lost.get(limit, 0), m.total_nouns, m, f"nouns_lost_fraction.{limit}")
            for m in measures.values()
        ]
    if any(m.num_not_read_whole for m in measures.values()):
        rows["Words unknown to it"] = _each(measures, lambda m: _share(m.num_not_read_whole, m.num_captions, m))
        rows["Nothing else"] = _each(measures, lambda m: _share(m.num_unreadable, m.num_captions, m))
    note = "What a text encoder that reads so many tokens never sees, and words that its vocabulary lacks."
    meanings = {
        "Words unknown to it": "captions with unknown or control tokens",
        "Nothing else": "captions of which it reads no letter or digit",
    }
    return QualityTable("cut", "Cut by the text encoder", note, rows, meanings)


def _missing(measures: Mapping[str, SetMeasures]) -> QualityTable:
    found = {reason for m in measures.values() for reason in m.rejected}
    reasons = [*ALWAYS_SHOWN, *sorted(found - {*ALWAYS_SHOWN})]
    rows = {
        "Samples read": _each(measures, lambda m: f"{m.num_read:,}"),
        "Captions": _each(measures, lambda m: _share(m.num_captions, m.num_read, m)),
    }
    rows |= {
        _rejected(reason): [
            _share(m.rejected.get(reason, 0), m.num_read, m, f"reject_fraction.{reason}") for m in measures.values()
        ]
        for reason in reasons
    }
    meanings = {_rejected(reason): REASONS.get(reason, OTHER_REASON) for reason in reasons}
    note = "Samples without a usable text are in no other number. Shares are of the samples read."
    return QualityTable("missing", "Missing values", note, rows, meanings)


def _rejected(reason: str) -> str:
    return f"Rejected: {reason.replace('_', ' ')}"


def _duplicates(measures: Mapping[str, SetMeasures]) -> QualityTable:
    note = "Captions whose text occurred before in the set."
    if any(m.estimate for m in measures.values()):
        note += " Of the sample alone: in the whole set more texts meet their like, and their share is not estimated."
    rows = {
        "Distinct captions": _each(
            measures, lambda m: _share(m.num_captions - m.duplicates.num_exact, m.num_captions, m)
        ),
        "Duplicates": _each(measures, lambda m: _share(m.duplicates.num_exact, m.num_captions, m)),
        "Duplicates but for case and white space": _each(
            measures, lambda m: _share(m.duplicates.num_folded, m.num_captions, m)
        ),
    }
    return QualityTable("duplicates", "Duplicates", note, rows, {})


def _languages(measures: Mapping[str, SetMeasures]) -> QualityTable:
    total = {language: 0 for m in measures.values() for language in m.languages}
    for m in measures.values():
        for language, count in m.languages.items():
            total[language] += count
    rows = {
        language: [
            _share(m.languages.get(language, 0), m.num_captions, m, f"language_fraction.{language}")
            for m in measures.values()
        ]
        for language in sorted(total, key=lambda language: (-total[language], language))
    }
    note = "Told by the script and, in Latin script, by each language's most common words: a guess for short captions."
    meanings = {UNDECIDED: "too few common words to tell", NO_LETTERS: "digits and signs alone"}
    return QualityTable("languages", "Languages", note, rows, meanings)


def _faults(measures: Mapping[str, SetMeasures]) -> QualityTable:
    rows = {
        "Boilerplate": [_share(m.num_boilerplate, m.num_captions, m, "boilerplate_fraction") for m in measures.values()]
    }
    for flag in sorted({flag for m in measures.values() for flag in m.flags}):
        rows[f"Flag: {flag}"] = [
            _share(m.flags.get(flag, 0), m.num_captions, m, f"flag_fraction.{flag}") for m in measures.values()
        ]
    return QualityTable("faults", "Empty phrases and faults", "Shares are of the captions.", rows, {})


def notices(measures: Mapping[str, SetMeasures]) -> list[Notice]:
    """What is worth a look, set by set; nothing where all is as it should be."""
    return [
        Notice(f"{name}: {text}", part)
        for name, m in measures.items()
        for is_said, text, part in (*_sentences(m), *_sentences_of_columns(m))
        if is_said
    ]


def _sentences_of_columns(m: SetMeasures) -> Iterator[tuple[bool, str, str]]:
    """As `_sentences`, of what columns say."""
    if (images := m.image_duplicates) is not None:
        count, whole = images.num_duplicates, images.num_samples
        text = f"{percent(count, whole)} of the images ({count:,} of {whole:,}) are duplicates of another one"
        yield count > 0 and count >= DUPLICATES * whole, text, "image-duplicates"
    if (claims := m.claims) is not None:
        count, whole = claims.num_unsupported, claims.num_claims - claims.num_unknown
        text = f"{percent(count, whole)} of the claims ({count:,} of {whole:,}) are not supported by the image"
        yield count > 0 and count >= UNSUPPORTED * whole, text, "claims"
        text = f"nobody knows of {percent(claims.num_unknown, claims.num_claims)} of the claims"
        yield claims.num_unknown > 0 and claims.num_unknown >= UNKNOWN_CLAIMS * claims.num_claims, text, "claims"


def _sentences(m: SetMeasures) -> Sequence[tuple[bool, str, str]]:
    """Whether it is to be said, what, and the part of the report."""

    def of_captions(count: int) -> str:
        return f"{m.fraction(count):.1%} of the captions ({count:,} of {m.num_captions:,})"

    duplicates, most = m.duplicates, m.duplicates.most_frequent[:1]
    is_constant = m.num_captions > 1 and duplicates.num_folded == m.num_captions - 1
    num_rejected, most_often = m.num_read - m.num_captions, most[0].count if most else 0
    sample = " in the sample" if m.estimate else ""
    median = m.lengths["words"].quantile(0.5)
    return [
        (is_constant, f"all captions are one and the same text{sample}", "duplicates"),
        (
            not is_constant and m.fraction(duplicates.num_folded) >= DUPLICATES,
            f"{of_captions(duplicates.num_folded)} are duplicates{sample}, up to case and white space",
            "duplicates",
        ),
        (
            not is_constant and m.fraction(most_often) >= ONE_TEXT,
            f"a single text is {of_captions(most_often)}{sample}",
            "duplicates",
        ),
        (
            num_rejected > 0 and num_rejected >= REJECTED * m.num_read,
            f"{num_rejected / max(m.num_read, 1):.1%} of the samples ({num_rejected:,} of {m.num_read:,}) have no text "
            "that can be used",
            "missing",
        ),
        (
            m.fraction(m.num_other_languages) >= OTHER_LANGUAGES,
            f"{of_captions(m.num_other_languages)} are not English",
            "languages",
        ),
        *(
            (m.fraction(count) >= OVER_LIMIT, f"{of_captions(count)} have more than {limit} T5 tokens", "cut")
            for limit, count in m.num_over_limit.items()
        ),
        (
            m.fraction(m.num_not_read_whole) >= UNREAD,
            f"{of_captions(m.num_not_read_whole)} have words that the text encoder cannot read, and of "
            f"{m.num_unreadable:,} it reads nothing",
            "cut",
        ),
        (median <= SHORT_WORDS, f"half of the captions have at most {median:g} words", "lengths"),
        (
            m.fraction(m.num_boilerplate) >= BOILERPLATE,
            f"{of_captions(m.num_boilerplate)} open with an empty phrase",
            "faults",
        ),
        *(
            (m.fraction(count) >= FLAGGED, f"{of_captions(count)} are flagged {flag}", "faults")
            for flag, count in m.flags.items()
        ),
    ]
