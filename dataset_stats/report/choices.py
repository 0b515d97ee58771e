"""What a set with a `where` keeps of the set that it chooses from, and what its clauses remove."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dataset_stats.measures import SetMeasures
from dataset_stats.report.quality import percent, plus_minus


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A set with a `where` beside the one that it chooses from.

    Attributes:
        kept: a sentence that says how many samples are kept.
        rows: by what is compared, the cell of the set before, that of the set, and what became of it.
        clauses: what each clause removes: alone, of how many it is unknown, and after those before it.
    """

    name: str
    before: str
    kept: str
    rows: dict[str, tuple[str, str, str]]
    clauses: list[tuple[str, tuple[str, str, str]]]


CLAUSE_COLUMNS = ("Removes alone", "Of which unknown", "Removes after those before it")


def choices(measures: Mapping[str, SetMeasures]) -> list[Choice]:
    """Return what there is to say of each set with a `where`, in the order of the sets."""
    return [_choice(name, m, measures) for name, m in measures.items() if m.choice is not None]


def _choice(name: str, m: SetMeasures, measures: Mapping[str, SetMeasures]) -> Choice:
    assert m.choice is not None and m.before is not None
    before, counts = measures[m.before], m.choice
    clauses = [
        (
            clause.text,
            (
                _count(clause.removes_alone, counts.num_samples),
                _count(clause.unknown, counts.num_samples),
                _count(clause.removes_after, counts.num_samples),
            ),
        )
        for clause in counts.clauses
    ]
    share = percent(counts.num_chosen, counts.num_samples)
    return Choice(
        name=name,
        before=m.before,
        kept=f"{counts.num_chosen:,} of {counts.num_samples:,} samples are kept ({share}).",
        rows=_rows(before, m),
        clauses=clauses,
    )


def _rows(before: SetMeasures, after: SetMeasures) -> dict[str, tuple[str, str, str]]:
    assert after.choice is not None
    images = {"Images": _kept(after.choice.num_samples, after.choice.num_chosen)}
    rows = (images if after.estimate is None else {}) | {
        "Captions": _kept(before.num_captions, after.num_captions),
        "Words": _kept(before.num_tokens, after.num_tokens),
    }
    if before.num_text_tokens is not None and after.num_text_tokens is not None:
        rows["T5 tokens"] = _kept(before.num_text_tokens, after.num_text_tokens)
    rows |= {
        "Nouns": _kept(before.total_nouns, after.total_nouns),
        "DN": _kept(before.distinct_nouns, after.distinct_nouns),
        "VN": _kept(before.valid_distinct_nouns, after.valid_distinct_nouns),
        "VN/DN": _points(before, after, lambda m: m.valid_fraction, "valid_fraction"),
        "Nouns per image": _mean(before, after, lambda m: m.nouns_per_image, "nouns_per_image"),
        "Words per caption": _mean(before, after, lambda m: m.tokens_per_caption, "tokens_per_caption"),
        "Duplicate captions": _points(before, after, lambda m: m.fraction(m.duplicates.num_folded)),
        "Not English": _points(before, after, lambda m: m.fraction(m.num_other_languages)),
        "Boilerplate": _points(before, after, lambda m: m.fraction(m.num_boilerplate), "boilerplate_fraction"),
    }
    if before.image_duplicates and after.image_duplicates:
        rows["Duplicate images"] = _points(before, after, _share_of_images)
    if before.claims and after.claims:
        rows["Unsupported claims"] = _points(before, after, _share_of_claims)
    for flag in sorted(before.flags.keys() | after.flags.keys()):
        rows[f"Flag: {flag}"] = _points(
            before, after, lambda m, flag=flag: m.fraction(m.flags.get(flag, 0)), f"flag_fraction.{flag}"
        )
    return rows


def _share_of_images(m: SetMeasures) -> float:
    found = m.image_duplicates
    return found.num_duplicates / max(found.num_samples, 1) if found else 0.0


def _share_of_claims(m: SetMeasures) -> float:
    return m.claims.unsupported_fraction if m.claims else 0.0


def _count(count: int, whole: int) -> str:
    return f"{count:,} ({percent(count, whole)})" if count else "0"


def _kept(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{percent(after, before)} kept"


def _mean(
    before: SetMeasures, after: SetMeasures, value: Callable[[SetMeasures], float], error: str
) -> tuple[str, str, str]:
    cells = [f"{value(m):.2f}{plus_minus(m, error, '{:.2f}')}" for m in (before, after)]
    return cells[0], cells[1], _signed(value(after) - value(before), "{:.2f}")


def _points(
    before: SetMeasures, after: SetMeasures, value: Callable[[SetMeasures], float], error: str = ""
) -> tuple[str, str, str]:
    cells = [f"{value(m):.1%}{plus_minus(m, error, '{:.2%}') if error else ''}" for m in (before, after)]
    return cells[0], cells[1], f"{_signed(100 * (value(after) - value(before)), '{:.1f}')} points"


def _signed(value: float, form: str) -> str:
    """A difference with its sign, which one of zero has not."""
    text = form.format(abs(value))
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"
