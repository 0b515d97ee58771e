"""Table 1 of the paper for this run's sets, in Markdown, with what every number means and what the numbers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dataset_stats.measures import SetMeasures
from dataset_stats.report.choices import CLAUSE_COLUMNS, choices
from dataset_stats.report.definitions import Definition
from dataset_stats.report.quality import length_columns, length_rows, plus_minus
from dataset_stats.report.score_tables import all_tables

# A set with hardly a noun below the threshold has a closed vocabulary, unless it has hardly any nouns at all.
CLOSED_FRACTION = 0.9
BAR = "\\|"


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1 as the paper prints it (it prints 13.3 % for 85K/646K)."""

    name: str
    valid_of_distinct: str
    valid_percent: float
    total_nouns: str
    nouns_per_image: str


PAPER_ROWS = (
    PaperRow("LAION", "210K/2461K", 8.5, "72.0M", "6.4"),
    PaperRow("LAION-LLaVA", "85K/646K", 13.3, "233.9M", "20.9"),
    PaperRow("SAM-LLaVA", "23K/124K", 18.6, "327.9M", "29.3"),
    PaperRow("Internal", "152K/582K", 26.1, "136.6M", "12.2"),
)


def findings(measures: Mapping[str, SetMeasures], *, valid_threshold: int) -> list[str]:
    """What the numbers say, one sentence each: every set against the first, and what VN/DN cannot show here."""
    baseline_name, *others = measures
    baseline = measures[baseline_name]
    sentences = []
    for name in others:
        m = measures[name]
        if m.choice is not None:
            continue  # what it changed has a table of its own
        if not (baseline.nouns_per_image and m.distinct_nouns):
            continue
        sentences.append(
            f"{name} has {m.nouns_per_image:.1f} nouns per image where {baseline_name} has "
            f"{baseline.nouns_per_image:.1f} ({m.nouns_per_image / baseline.nouns_per_image:.1f} times as many); its "
            f"VN/DN is {m.valid_fraction:.1%} where {baseline_name}'s is {baseline.valid_fraction:.1%}."
        )
    closed = [name for name, m in measures.items() if m.distinct_nouns and m.valid_fraction >= CLOSED_FRACTION]
    if closed:
        listed = ", ".join(f"{name} ({measures[name].distinct_nouns:,} nouns)" for name in closed)
        sentences.append(
            f"Nearly every noun of {listed} occurs more than {valid_threshold} times: a closed vocabulary. VN/DN then "
            "says that few words are used often, not that much is described; the paper's sets, with 124K to 2461K "
            "nouns, are not of this kind."
        )
    sizes = [m.num_captions for m in measures.values()]
    if max(sizes) > 2 * max(min(sizes), 1):
        sentences.append(
            "The sets differ much in size, and VN/DN falls as a set grows: compare it at one dataset_stats.sample."
        )
    return sentences


def sample_note(measures: Mapping[str, SetMeasures]) -> str:
    """One paragraph that says what was drawn, or nothing where all captions were counted."""
    drawn = {name: m.estimate for name, m in measures.items() if m.estimate}
    if not drawn:
        return ""
    sizes = "; ".join(f"{name} {e.num_drawn:,} of {e.num_samples:,} samples" for name, e in drawn.items())
    wholes = "; ".join(
        f"{name} {e.whole_total_nouns[0]:,.0f} ± {e.whole_total_nouns[1]:,.0f}" for name, e in drawn.items()
    )
    return (
        f"An estimate, not a full count: {sizes}. ± is one standard error. Means and shares estimate the whole set; "
        "DN, VN and VN/DN are those of a sample of this size and say nothing about the whole set's. "
        f"Total nouns of the whole sets, estimated: {wholes}."
    )


def table1(measures: Mapping[str, SetMeasures], *, tagger: str, definition_list: Sequence[Definition]) -> str:
    """All numbers in Markdown: this run's sets, the paper's rows, length and faults, and what the numbers mean."""
    note = sample_note(measures)
    lines = ["# Noun statistics (Table 1)" + (": an estimate from a sample" if note else ""), ""]
    if note:
        lines += [f"**{note}**", ""]
    lines += [
        "| Caption set | VN/DN | Total nouns | Nouns per image | Captions | Words per caption |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line for name, m in measures.items() for line in _rows(name, m)]
    lines += [
        f"| {row.name} (the paper's) | {row.valid_of_distinct} = {row.valid_percent}% | {row.total_nouns} "
        f"| {row.nouns_per_image} | | |"
        for row in PAPER_ROWS
    ]
    lines += [
        "",
        f"Tagger: {tagger}.",
        "",
        *_choices(measures),
        *_quality(measures),
        "| Number | Meaning | Formula |",
        "|---|---|---|",
    ]
    lines += [f"| {item.name} | {item.meaning} | {item.formula} |" for item in definition_list]
    return "\n".join(lines) + "\n"


def _rows(name: str, m: SetMeasures) -> list[str]:
    def counts(prefix: str, valid: int, distinct: int, fraction: float) -> str:
        vn = f"{valid:,}{plus_minus(m, f'{prefix}valid_distinct_nouns', '{:,.0f}')}"
        dn = f"{distinct:,}{plus_minus(m, f'{prefix}distinct_nouns', '{:,.0f}')}"
        slash = " / " if m.estimate else "/"
        return f"{vn}{slash}{dn} = {fraction:.1%}{plus_minus(m, f'{prefix}valid_fraction', '{:.2%}')}"

    rows = [
        f"| {name} | {counts('', m.valid_distinct_nouns, m.distinct_nouns, m.valid_fraction)} "
        f"| {m.total_nouns:,}{plus_minus(m, 'total_nouns', '{:,.0f}')} "
        f"| {m.nouns_per_image:.1f}{plus_minus(m, 'nouns_per_image', '{:.2f}')} | {m.num_captions:,} "
        f"| {m.tokens_per_caption:.1f}{plus_minus(m, 'tokens_per_caption', '{:.2f}')} |"
    ]
    if m.folded_distinct_nouns is not None:
        valid, distinct = m.folded_valid_distinct_nouns or 0, m.folded_distinct_nouns
        rows.append(
            f"| {name}, plurals folded | {counts('folded_', valid, distinct, m.folded_valid_fraction)} | | | | |"
        )
    return rows


def _choices(measures: Mapping[str, SetMeasures]) -> list[str]:
    lines = []
    for choice in choices(measures):
        lines += [f"**{choice.name}**: {choice.kept}", ""]
        lines += [f"| Of the captions | {choice.before} | {choice.name} | change |", "|---|---|---|---|"]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in choice.rows.items()]
        lines += ["", f"| Clause | {' | '.join(CLAUSE_COLUMNS)} |", "|---|---|---|---|"]
        # A bar in a clause would end its cell.
        lines += [f"| `{text.replace('|', BAR)}` | {' | '.join(cells)} |" for text, cells in choice.clauses]
        lines.append("")
    return lines


def _quality(measures: Mapping[str, SetMeasures]) -> list[str]:
    columns = length_columns()
    lines = [f"| Per caption | Caption set | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {title} | {name} | {' | '.join(cells)} |" for title, name, cells in length_rows(measures)]
    for table in all_tables(measures):
        lines += ["", f"| {table.title} | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in table.rows.items()]
    return [*lines, ""]
