"""The numbers of Table 1 and their neighbours, each with its definition."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.manifest import ShardReport

HISTOGRAM_BINS = 256  # captions with more nouns or tokens than this share the last bin


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1 as the paper prints it."""

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


@dataclass(kw_only=True)
class SetMeasures:
    """Everything measured on one caption set; `DEFINITIONS` says what each number means."""

    num_captions: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    distinct_nouns: int = 0
    valid_distinct_nouns: int = 0
    total_nouns: int = 0
    num_tokens: int = 0
    num_boilerplate: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    num_text_tokens: int | None = None
    num_over_limit: dict[str, int] = field(default_factory=dict)
    nouns_lost: dict[str, int] = field(default_factory=dict)
    nouns_per_caption: list[int] = field(default_factory=list)
    text_tokens_per_caption: list[int] = field(default_factory=list)
    squared_nouns: int = 0

    @property
    def valid_fraction(self) -> float:
        """VN / DN."""
        return self.valid_distinct_nouns / self.distinct_nouns if self.distinct_nouns else 0.0

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

    def fraction(self, count: int) -> float:
        """Share of the captions."""
        return count / self.num_captions if self.num_captions else 0.0

    def summary(self) -> dict[str, Any]:
        """The figures for `summary.json` and the manifest."""
        return {
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
            "over_limit_fraction": {limit: self.fraction(count) for limit, count in self.num_over_limit.items()},
            "nouns_lost": self.nouns_lost,
        }


@dataclass(frozen=True)
class Definition:
    """A number's short name, its meaning and its formula, for people who have not read the paper."""

    name: str
    meaning: str
    formula: str


def definitions(*, valid_threshold: int, limits: Sequence[int], boilerplate: Sequence[str]) -> list[Definition]:
    """What every number means, with the thresholds that are in force."""
    shown = ", ".join(f'"{opening}"' for opening in boilerplate)
    lost = " and ".join(str(limit) for limit in limits)
    return [
        Definition("Captions", "Samples with a text that was counted.", "samples read - samples rejected"),
        Definition(
            "Noun",
            "A token the tagger gives a tag of the NN family (NN, NNS, NNP, NNPS). Captions are case-folded first, so "
            '"Dog" and "dog" are one noun and re-casing a caption changes nothing. Singular and plural are two nouns.',
            "tag starts with NN",
        ),
        Definition("DN", "Distinct nouns: how many different nouns occur.", "number of different nouns"),
        Definition(
            "VN",
            f"Valid distinct nouns: distinct nouns that occur more than {valid_threshold} times.",
            f"number of nouns with occurrences > {valid_threshold}",
        ),
        Definition("VN/DN", "Share of the vocabulary that is seen often enough to be learned.", "VN / DN"),
        Definition("Total nouns", "All occurrences of all nouns.", "sum of occurrences"),
        Definition("Nouns per image", "How much a caption says.", "total nouns / captions"),
        Definition(
            "Tokens per caption",
            "Length in words as NLTK cuts them; punctuation marks are tokens too.",
            "tokens / captions",
        ),
        Definition("Boilerplate", f"Captions that open with an empty phrase: {shown}.", "such captions / captions"),
        Definition(
            "Over the limit",
            f"Captions with more T5 tokens than the model reads ({lost}); the end token counts.",
            "captions with T5 tokens > limit / captions",
        ),
        Definition(
            "Nouns lost",
            "Nouns the text encoder never sees because the caption is cut at the limit.",
            "nouns of the caption - nouns of its part within the limit, summed",
        ),
        Definition("Flags", "What captioning noticed (loops, cut-off answers, ...).", "captions with the flag"),
        Definition("Rejected", "Samples without a usable text, by reason; they are in no other number.", "count"),
    ]


def measure_set(reports: Sequence[ShardReport], caption_files: Sequence[Path], *, limits: Sequence[int]) -> SetMeasures:
    """Add up the figures of a set's shards; DN and VN are added by `write_vocabulary`."""
    measures = SetMeasures()
    rejected: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    nouns = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    text_tokens = np.zeros(HISTOGRAM_BINS * 2, dtype=np.int64)
    for report, path in zip(reports, caption_files, strict=True):
        rejected.update(report.rejected)
        table = pq.read_table(path)
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
    measures.nouns_per_caption = nouns.tolist()
    measures.text_tokens_per_caption = text_tokens.tolist() if measures.num_text_tokens is not None else []
    return measures


def _histogram(values: np.ndarray, num_bins: int) -> np.ndarray:
    return np.bincount(np.minimum(values, num_bins - 1), minlength=num_bins)


def table1(measures: Mapping[str, SetMeasures], *, tagger: str, definition_list: Sequence[Definition]) -> str:
    """Table 1 in Markdown: this run's sets, the paper's rows, and what the numbers mean."""
    lines = [
        "# Noun statistics (Table 1)",
        "",
        "| Caption set | VN/DN | Total nouns | Nouns per image | Captions | Tokens per caption |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in measures.items():
        lines.append(
            f"| {name} | {m.valid_distinct_nouns:,}/{m.distinct_nouns:,} = {m.valid_fraction:.1%} | {m.total_nouns:,} "
            f"| {m.nouns_per_image:.1f} | {m.num_captions:,} | {m.tokens_per_caption:.1f} |"
        )
    for row in PAPER_ROWS:
        lines.append(
            f"| {row.name} (the paper's) | {row.valid_of_distinct} = {row.valid_percent}% | {row.total_nouns} "
            f"| {row.nouns_per_image} | | |"
        )
    lines += ["", f"Tagger: {tagger}.", "", "| Number | Meaning | Formula |", "|---|---|---|"]
    lines += [f"| {item.name} | {item.meaning} | {item.formula} |" for item in definition_list]
    return "\n".join(lines) + "\n"


def as_json(measures: Mapping[str, SetMeasures]) -> dict[str, Any]:
    """All measures, for the manifest."""
    return {name: asdict(measure) for name, measure in measures.items()}
