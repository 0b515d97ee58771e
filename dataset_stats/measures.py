"""The numbers of Table 1 and their neighbours, added up over the shards of a set."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataset_stats import scores
from dataset_stats.distribution import Distribution
from dataset_stats.duplicates import Duplicates, count_duplicates
from dataset_stats.estimate import Estimate
from dataset_stats.example_places import ROW_BITS
from dataset_stats.languages import ENGLISH, NO_LETTERS, UNDECIDED
from dataset_stats.scores import Claims, ImageDuplicates
from dataset_stats.set_rows import SetRows
from errors import UserError
from pipelines.columns.choice_counts import ChoiceCounts

UNUSED_COLUMNS = ("key", "nouns", "text_hash", "folded_hash")  # the largest
# What is measured of every caption, by the column of the caption files that has it; T5 tokens not in every run.
LENGTH_COLUMNS = {
    "nouns": "num_nouns",
    "words": "num_tokens",
    "characters": "num_characters",
    "text_tokens": "num_text_tokens",
}
HISTOGRAM_BARS = 256  # in the manifest
NUM_UNREAD_EXAMPLES = 3
# Captioning has a flag for what is measured here as boilerplate, of all sets and by one list: it is not shown again.
MEASURED_FLAGS = ("boilerplate",)


@dataclass(kw_only=True)
class SetMeasures:
    """Everything measured on one caption set; `report.table1.definitions` says what each number means.

    Attributes:
        before: of a set with `where`, the set that it chooses from.
        choice: what the clauses of `where` remove, of whole shards.
        image_duplicates, claims: what columns say of the samples; None where there are none.
    """

    num_captions: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    distinct_nouns: int = 0
    valid_distinct_nouns: int = 0
    folded_distinct_nouns: int | None = None
    folded_valid_distinct_nouns: int | None = None
    total_nouns: int = 0
    num_tokens: int = 0
    num_boilerplate: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    num_text_tokens: int | None = None
    num_over_limit: dict[str, int] = field(default_factory=dict)
    nouns_lost: dict[str, int] = field(default_factory=dict)
    num_not_read_whole: int = 0
    num_unreadable: int = 0
    unread_places: list[int] = field(default_factory=list)
    lengths: dict[str, Distribution] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    duplicates: Duplicates = field(default_factory=Duplicates)
    estimate: Estimate | None = None
    before: str | None = None
    choice: ChoiceCounts | None = None
    image_duplicates: ImageDuplicates | None = None
    claims: Claims | None = None

    @property
    def valid_fraction(self) -> float:
        """VN / DN."""
        return self.valid_distinct_nouns / self.distinct_nouns if self.distinct_nouns else 0.0

    @property
    def folded_valid_fraction(self) -> float:
        """VN / DN with plurals folded."""
        return (self.folded_valid_distinct_nouns or 0) / (self.folded_distinct_nouns or 1)

    @property
    def nouns_per_image(self) -> float:
        """Total nouns / captions."""
        return self.total_nouns / self.num_captions if self.num_captions else 0.0

    @property
    def nouns_per_image_deviation(self) -> float:
        """Standard deviation of nouns per image over captions."""
        return self.lengths["nouns"].deviation

    @property
    def tokens_per_caption(self) -> float:
        """Tokens / captions."""
        return self.num_tokens / self.num_captions if self.num_captions else 0.0

    @property
    def text_tokens_per_caption(self) -> float | None:
        """T5 tokens / captions; None where they were not measured."""
        return None if self.num_text_tokens is None else self.num_text_tokens / max(self.num_captions, 1)

    @property
    def num_read(self) -> int:
        """Captions and rejected samples."""
        return self.num_captions + sum(self.rejected.values())

    @property
    def num_other_languages(self) -> int:
        """Captions in another language or script than English, where that can be told."""
        return sum(count for name, count in self.languages.items() if name not in (ENGLISH, UNDECIDED, NO_LETTERS))

    def headline(self) -> str:
        """Return the figures of Table 1 in a line."""
        ratio = f"{self.valid_distinct_nouns:,}/{self.distinct_nouns:,} = {self.valid_fraction:.1%}"
        return f"VN/DN {ratio}, {self.nouns_per_image:.1f} nouns per image, {self.num_captions:,} captions"

    def left_out(self) -> str:
        """Say what is not among the captions, and how much a text encoder does not read; empty if nothing."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.items())
        longer = ", ".join(f"{count:,} over {limit} tokens" for limit, count in self.num_over_limit.items() if count)
        unread = f"{self.num_not_read_whole:,}, and nothing at all of {self.num_unreadable:,}"
        unread = unread if self.num_not_read_whole else ""
        parts = (("left out", reasons), ("longer", longer), ("with words the text encoder cannot read", unread))
        return "".join(f"; {what}: {found}" for what, found in parts if found)

    def fraction(self, count: int) -> float:
        """Share of the captions."""
        return count / self.num_captions if self.num_captions else 0.0

    def reject_fraction(self, reason: str) -> float:
        """Share of the samples read that was rejected for `reason`."""
        return self.rejected.get(reason, 0) / max(self.num_read, 1)

    def lost_fraction(self, limit: int | str) -> float:
        """Share of all nouns that is lost at `limit` T5 tokens."""
        return self.nouns_lost.get(str(limit), 0) / self.total_nouns if self.total_nouns else 0.0

    def error(self, name: str) -> float | None:
        """Standard error of a number of a sample; None where all captions were counted."""
        return None if self.estimate is None else self.estimate.errors.get(name, 0.0)

    def summary(self) -> dict[str, Any]:
        """The figures for `summary.json` and the manifest."""
        figures = {
            "num_captions": self.num_captions,
            "rejected": self.rejected,
            "distinct_nouns": self.distinct_nouns,
            "valid_distinct_nouns": self.valid_distinct_nouns,
            "valid_fraction": self.valid_fraction,
            "total_nouns": self.total_nouns,
            "nouns_per_image": self.nouns_per_image,
            "tokens_per_caption": self.tokens_per_caption,
            "boilerplate_fraction": self.fraction(self.num_boilerplate),
            "flags": self.flags,
            "text_tokens_per_caption": self.text_tokens_per_caption,
            "over_limit_fraction": {limit: self.fraction(count) for limit, count in self.num_over_limit.items()},
            "not_read_whole_fraction": self.fraction(self.num_not_read_whole),
            "unreadable_fraction": self.fraction(self.num_unreadable),
            "nouns_lost": self.nouns_lost,
            "nouns_lost_fraction": {limit: self.lost_fraction(limit) for limit in self.nouns_lost},
            "lengths": {name: distribution.summary() for name, distribution in self.lengths.items()},
            "duplicates": self.duplicates.num_exact,
            "folded_duplicates": self.duplicates.num_folded,
            "languages": self.languages,
        }
        if self.folded_distinct_nouns is not None:
            figures["plurals_folded"] = {
                "distinct_nouns": self.folded_distinct_nouns,
                "valid_distinct_nouns": self.folded_valid_distinct_nouns,
                "valid_fraction": self.folded_valid_fraction,
            }
        if self.choice is not None:
            figures |= {"before": self.before, "choice": self.choice.to_json()}
        figures |= self.of_scores()
        if self.estimate is not None:
            figures["estimate"] = {
                "num_samples": self.estimate.num_samples,
                "num_drawn": self.estimate.num_drawn,
                "standard_errors": self.estimate.errors,
                "whole_captions": self.estimate.whole_captions,
                "whole_total_nouns": self.estimate.whole_total_nouns,
            }
        return figures

    def of_scores(self) -> dict[str, Any]:
        """The figures that columns give, where there are some."""
        found = {"image_duplicates": self.image_duplicates, "claims": self.claims}
        return {name: scores.as_json(figures) for name, figures in found.items() if figures is not None}


def measure_set(rows: SetRows, *, limits: Sequence[int]) -> SetMeasures:
    """Add up the figures of a set's shards; DN and VN are added by `write_noun_table`."""
    measures = SetMeasures(lengths={name: Distribution() for name in LENGTH_COLUMNS})
    rejected: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for shard in range(len(rows.files)):
        columns = [name for name in rows.column_names(shard) if name not in UNUSED_COLUMNS]
        table = rows.read(shard, columns)
        rejected.update(_counted(table["reject"].drop_null()))
        kept = table.filter(pc.field("reject").is_null())
        measures.num_captions += len(kept)
        for name, column in LENGTH_COLUMNS.items():
            if column in columns:
                measures.lengths[name].add(kept[column].to_numpy())
        measures.num_boilerplate += int(kept["is_boilerplate"].to_numpy().sum())
        flags.update(kept["flags"].combine_chunks().flatten().to_pylist())
        languages.update(_counted(kept["language"]))
        if "num_text_tokens" in columns:
            _add_limits(measures, kept, limits)
            _add_unread(measures, table, functools.partial(rows.numbers, shard), shard)
        else:
            measures.lengths.pop("text_tokens", None)
    measures.total_nouns = measures.lengths["nouns"].total
    measures.num_tokens = measures.lengths["words"].total
    if "text_tokens" in measures.lengths:
        measures.num_text_tokens = measures.lengths["text_tokens"].total
    measures.rejected = dict(sorted(rejected.items()))
    measures.flags = {flag: count for flag, count in sorted(flags.items()) if flag not in MEASURED_FLAGS}
    measures.languages = dict(sorted(languages.items(), key=lambda item: (-item[1], item[0])))
    measures.duplicates = count_duplicates(rows, num_captions=measures.num_captions)
    return measures


def _counted(values: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in values.value_counts().to_pylist()}


def _add_limits(measures: SetMeasures, kept: pa.Table, limits: Sequence[int]) -> None:
    """Count the captions that are longer than the text encoder reads, and the nouns that this costs."""
    lengths = kept["num_text_tokens"].to_numpy()
    for limit in limits:
        over = measures.num_over_limit.get(str(limit), 0) + int((lengths > limit).sum())
        measures.num_over_limit[str(limit)] = over
        lost = int(kept[f"nouns_lost_{limit}"].to_numpy().sum())
        measures.nouns_lost[str(limit)] = measures.nouns_lost.get(str(limit), 0) + lost


def _add_unread(
    measures: SetMeasures, table: pa.Table, numbers: Callable[[np.ndarray], np.ndarray], shard: int
) -> None:
    """Count the captions with words that the text encoder cannot read; the places of the first ones are kept."""
    # Counts made before there were these columns say nothing of it.
    if "num_unread_tokens" not in table.column_names:
        return
    unreadable = table["is_unreadable"].fill_null(False).to_numpy()
    rows = np.flatnonzero((table["num_unread_tokens"].fill_null(0).to_numpy() > 0) | unreadable)
    measures.num_not_read_whole += len(rows)
    measures.num_unreadable += int(unreadable.sum())
    missing = NUM_UNREAD_EXAMPLES - len(measures.unread_places)
    measures.unread_places += [(shard << ROW_BITS) | int(row) for row in numbers(rows[:missing])]


def require_captions(measures: Mapping[str, SetMeasures]) -> None:
    """Raise a UserError that names the set, and why it is so, where one has no caption at all."""
    for name, measure in measures.items():
        if not measure.num_captions:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in measure.rejected.items())
            raise UserError(
                f"dataset_stats.sets.{name}: none of its {measure.num_read:,} samples has a text ({reasons})"
            )


def as_json(measures: Mapping[str, SetMeasures]) -> dict[str, Any]:
    """All measures, for the manifest."""
    figures = {}
    for name, measure in measures.items():
        figure = asdict(replace(measure, lengths={}, image_duplicates=None, claims=None)) | measure.of_scores()
        figure["lengths"] = {kind: spread.as_json(HISTOGRAM_BARS) for kind, spread in measure.lengths.items()}
        if figure["estimate"]:
            del figure["estimate"]["rate_errors"]  # one for each noun
        figures[name] = figure
    return figures
