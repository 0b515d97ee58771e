"""The numbers of Table 1 and their neighbours, added up over the shards of a set."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from dataset_stats.estimate import Estimate
from pipelines.store.manifest import ShardReport
from pipelines.store.tables import MEND_SHARD, read_table, read_table_schema

UNUSED_COLUMNS = ("key", "nouns")  # the largest
HISTOGRAM_BINS = 256  # captions with more nouns or tokens than this share the last bin


@dataclass(kw_only=True)
class SetMeasures:
    """Everything measured on one caption set; `report.table1.definitions` says what each number means."""

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
    noun_histogram: list[int] = field(default_factory=list)
    text_token_histogram: list[int] = field(default_factory=list)
    squared_nouns: int = 0
    estimate: Estimate | None = None

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
        if not self.num_captions:
            return 0.0
        return math.sqrt(max(self.squared_nouns / self.num_captions - self.nouns_per_image**2, 0.0))

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

    def headline(self) -> str:
        """Return the figures of Table 1 in a line."""
        ratio = f"{self.valid_distinct_nouns:,}/{self.distinct_nouns:,} = {self.valid_fraction:.1%}"
        return f"VN/DN {ratio}, {self.nouns_per_image:.1f} nouns per image, {self.num_captions:,} captions"

    def left_out(self) -> str:
        """Say what is not among the captions, and how many are longer than a text encoder reads; empty if neither."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.items())
        longer = ", ".join(f"{count:,} over {limit} tokens" for limit, count in self.num_over_limit.items() if count)
        return "".join(f"; {what}: {found}" for what, found in (("left out", reasons), ("longer", longer)) if found)

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
            "nouns_lost": self.nouns_lost,
            "nouns_lost_fraction": {limit: self.lost_fraction(limit) for limit in self.nouns_lost},
        }
        if self.folded_distinct_nouns is not None:
            figures["plurals_folded"] = {
                "distinct_nouns": self.folded_distinct_nouns,
                "valid_distinct_nouns": self.folded_valid_distinct_nouns,
                "valid_fraction": self.folded_valid_fraction,
            }
        if self.estimate is not None:
            figures["estimate"] = {
                "num_samples": self.estimate.num_samples,
                "num_drawn": self.estimate.num_drawn,
                "standard_errors": self.estimate.errors,
                "whole_captions": self.estimate.whole_captions,
                "whole_total_nouns": self.estimate.whole_total_nouns,
            }
        return figures


def measure_set(reports: Sequence[ShardReport], caption_files: Sequence[Path], *, limits: Sequence[int]) -> SetMeasures:
    """Add up the figures of a set's shards; DN and VN are added by `write_noun_table`."""
    measures = SetMeasures()
    rejected: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    nouns = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    text_tokens = np.zeros(HISTOGRAM_BINS * 2, dtype=np.int64)
    for report, path in zip(reports, caption_files, strict=True):
        rejected.update(report.rejected)
        columns = [name for name in read_table_schema(path, mend=MEND_SHARD).names if name not in UNUSED_COLUMNS]
        table = read_table(path, columns, mend=MEND_SHARD)
        kept = table.filter(pc.field("reject").is_null())
        num_nouns = kept["num_nouns"].to_numpy()
        nouns += _histogram(num_nouns, len(nouns))
        measures.num_captions += len(kept)
        measures.total_nouns += int(num_nouns.sum())
        measures.squared_nouns += int(np.square(num_nouns, dtype=np.int64).sum())
        measures.num_tokens += int(kept["num_tokens"].to_numpy().sum())
        measures.num_boilerplate += int(kept["is_boilerplate"].to_numpy().sum())
        flags.update(kept["flags"].combine_chunks().flatten().to_pylist())
        if "num_text_tokens" in table.column_names:
            lengths = kept["num_text_tokens"].to_numpy()
            text_tokens += _histogram(lengths, len(text_tokens))
            measures.num_text_tokens = (measures.num_text_tokens or 0) + int(lengths.sum())
            for limit in limits:
                over = measures.num_over_limit.get(str(limit), 0) + int((lengths > limit).sum())
                measures.num_over_limit[str(limit)] = over
                lost = int(kept[f"nouns_lost_{limit}"].to_numpy().sum())
                measures.nouns_lost[str(limit)] = measures.nouns_lost.get(str(limit), 0) + lost
    measures.rejected, measures.flags = dict(sorted(rejected.items())), dict(sorted(flags.items()))
    measures.noun_histogram = nouns.tolist()
    measures.text_token_histogram = text_tokens.tolist() if measures.num_text_tokens is not None else []
    return measures


def _histogram(values: np.ndarray, num_bins: int) -> np.ndarray:
    return np.bincount(np.minimum(values, num_bins - 1), minlength=num_bins)


def as_json(measures: Mapping[str, SetMeasures]) -> dict[str, Any]:
    """All measures, for the manifest."""
    figures = {name: asdict(measure) for name, measure in measures.items()}
    for figure in figures.values():
        if figure["estimate"]:
            del figure["estimate"]["rate_errors"]  # one for each noun
    return figures
