"""What columns say of the sets' samples, as tables and charts: duplicate images, claims that nothing supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dataset_stats.measures import SetMeasures
from dataset_stats.report.quality import QualityTable, percent, quality_tables
from dataset_stats.scores import GROUPS, Claims, ImageDuplicates

UNKNOWN = "–"  # of a set without such columns
PERCENT_OF_BAR, NUM_BARS = 5, 21  # the last bar is of 100 %
KINDS = {
    "exact": "the same file",
    "perceptual": "nearly the same picture: encoded anew, resized, slightly cropped",
    "mirrored": "the same picture, mirrored",
    "embedding": "alike to CLIP",
}


def all_tables(measures: Mapping[str, SetMeasures]) -> list[QualityTable]:
    """Return the tables with a column for each set, those of columns last; none that would be empty."""
    tables = [*quality_tables(measures), _image_duplicates(measures), _claims(measures)]
    return [table for table in tables if table.rows]


def claims_chart(measures: Mapping[str, SetMeasures]) -> dict[str, Any] | None:
    """Return the histogram of the unsupported share of captions' claims; None where none were asked about."""
    spreads = {name: m.claims.shares for name, m in measures.items() if m.claims and m.claims.shares.num}
    if not spreads:
        return None
    starts = range(0, NUM_BARS * PERCENT_OF_BAR, PERCENT_OF_BAR)
    return {
        "id": "chart-claims",
        "title": "Unsupported share of a caption's claims",
        "alt": "; ".join(f"{name}: mean {spread.mean:.1f}%" for name, spread in spreads.items()),
        "kind": "steps",
        "traces": [
            {
                "name": name,
                "x": [start + (PERCENT_OF_BAR - 1) / 2 for start in starts],
                "y": [round(count / spread.num, 6) for count in spread.histogram(PERCENT_OF_BAR, NUM_BARS)],
            }
            for name, spread in spreads.items()
        ],
        "x": f"% of its claims (bins of {PERCENT_OF_BAR}; the last is 100%)",
        "y": "share of captions",
        "width": PERCENT_OF_BAR,
        "lines_x": [],
    }


def _image_duplicates(measures: Mapping[str, SetMeasures]) -> QualityTable:
    found = [m.image_duplicates for m in measures.values()]
    known = [each for each in found if each is not None]
    if not known:
        return QualityTable("image-duplicates", "", "", {}, {})

    def row(count: Callable[[ImageDuplicates], int], *, has_share: bool = True) -> list[str]:
        return [
            UNKNOWN if each is None else _count(count(each), each.num_samples if has_share else 0) for each in found
        ]

    kinds = sorted({kind for each in known for kind in each.kinds}, key=lambda kind: ([*KINDS, kind].index(kind), kind))
    rows = {
        "Images looked at": row(lambda each: each.num_samples, has_share=False),
        "Duplicates of another image": row(lambda each: each.num_duplicates),
        **{kind.capitalize(): row(lambda each, kind=kind: each.kinds.get(kind, 0)) for kind in kinds},
        **{f"Groups of {size}": row(lambda each, size=size: each.groups[size], has_share=False) for size in GROUPS},
        "Largest group": row(lambda each: each.largest_group, has_share=False),
    }
    note = (
        "Images that another sample of the run shows already, by the column duplicate; one of each group is no "
        "duplicate. Groups are counted by those of their samples that are in the set."
    )
    return QualityTable(
        "image-duplicates", "Duplicate images", note, rows, {k.capitalize(): v for k, v in KINDS.items()}
    )


def _claims(measures: Mapping[str, SetMeasures]) -> QualityTable:
    found = [m.claims for m in measures.values()]
    if not any(found):
        return QualityTable("claims", "", "", {}, {})

    def row(count: Callable[[Claims], int], whole: Callable[[Claims], int] = lambda _: 0) -> list[str]:
        return [UNKNOWN if each is None else _count(count(each), whole(each)) for each in found]

    rows = {
        "Captions asked about": row(lambda each: each.num_captions),
        "Claims": row(lambda each: each.num_claims),
        "Claims nobody knows of": row(lambda each: each.num_unknown, lambda each: each.num_claims),
        "Unsupported claims": row(lambda each: each.num_unsupported, lambda each: each.num_claims - each.num_unknown),
        "Captions with an unsupported claim": row(lambda each: each.num_marked, lambda each: each.num_captions),
        "Mean unsupported share": [UNKNOWN if each is None else f"{each.shares.mean:.1f}%" for each in found],
    }
    meanings = {
        "Claims nobody knows of": "the model says neither yes nor no",
        "Unsupported claims": "of those that are known",
        "Mean unsupported share": "of a caption's claims, over captions",
    }
    note = "What captions claim, asked back of a model that sees the image."
    return QualityTable("claims", "Claims", note, rows, meanings)


def _count(count: int, whole: int) -> str:
    return f"{count:,} ({percent(count, whole)})" if whole else f"{count:,}"
