"""`report.html`: everything that was found, in one file that opens without a network."""

from __future__ import annotations

import base64
import functools
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from dataset_stats.measures import SetMeasures
from dataset_stats.noun_table import PER_CAPTIONS, NounTable
from dataset_stats.report.choices import CLAUSE_COLUMNS, choices
from dataset_stats.report.definitions import Definition
from dataset_stats.report.examples import Quotes
from dataset_stats.report.gallery import GalleryItem
from dataset_stats.report.quality import (
    LENGTH_NAMES,
    length_columns,
    length_rows,
    notices,
    plus_minus,
)
from dataset_stats.report.score_tables import all_tables, claims_chart
from dataset_stats.report.table1 import PAPER_ROWS, findings, sample_note
from pipelines.page_templates import page_template
from pipelines.store.files import atomic_write_bytes

TEMPLATE = Path(__file__).parent / "templates" / "report.html.jinja"
NUM_BARS = 40
# A histogram's axis has this quantile of the captions and a little more, but ends at twice the 95 % quantile, so that a
# few endless captions do not press all others into one bar; those beyond the end share the last bar.
AXIS_QUANTILE, TAIL_QUANTILE = 0.995, 0.95
CHART_TITLES = {
    "nouns": "Nouns per caption",
    "words": "Words per caption",
    "characters": "Characters per caption",
    "text_tokens": "Length in T5 tokens, and where the text encoder cuts",
}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What the report shows."""

    run_name: str
    tagger: str
    tagger_hint: str
    measures: Mapping[str, SetMeasures]
    definitions: Sequence[Definition]
    noun_table: NounTable
    quotes: Quotes
    gallery: Sequence[GalleryItem]
    valid_threshold: int
    limits: Sequence[int]
    missing: Sequence[str]


def write_report(path: Path, data: ReportData) -> None:
    """Render the report and write it atomically."""
    charts = _charts(data)
    html = page_template(TEMPLATE, {"json": _script_json}).render(
        data=data,
        paper_rows=PAPER_ROWS,
        findings=findings(data.measures, valid_threshold=data.valid_threshold),
        sample_note=sample_note(data.measures),
        is_sample=any(measure.estimate for measure in data.measures.values()),
        pm=plus_minus,
        per_captions=PER_CAPTIONS,
        choices=choices(data.measures),
        clause_columns=CLAUSE_COLUMNS,
        changes=[name for name in data.noun_table.gained if data.measures[name].choice is None],
        notices=notices(data.measures),
        lengths=length_rows(data.measures),
        length_columns=length_columns(),
        quality=all_tables(data.measures),
        has_text_tokens=any(measure.num_text_tokens is not None for measure in data.measures.values()),
        charts=charts,
        nouns=_noun_rows(data.noun_table.top, list(data.measures), data.quotes.by_noun),
        count_digits=len(f"{int(data.noun_table.top[list(data.measures)].to_numpy().max(initial=0)):,}"),
        plotly=_packed_plotly(),
    )
    atomic_write_bytes(path, html.encode())


def _script_json(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(escaped.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


@functools.cache
def _packed_plotly() -> str:
    # plotly.js is 4.8 MB; packed it leaves room for pictures, and every browser since 2023 can unpack it.
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _noun_rows(top: pd.DataFrame, names: Sequence[str], examples: Sequence[str]) -> list[list[Any]]:
    counts = top[list(names)].to_numpy().tolist()
    return [[noun, *row, example] for noun, row, example in zip(top["noun"], counts, examples, strict=True)]


def _charts(data: ReportData) -> list[dict[str, Any]]:
    """Plotly traces, titles of charts and axes; colours and fonts are the page's, so that they follow its theme."""
    zipf = {
        "id": "chart-zipf",
        "title": "Zipf: how often the k-th noun occurs",
        "alt": "; ".join(
            f"{name}: {m.distinct_nouns:,} nouns, the most frequent one {data.noun_table.zipf[name][0][1]:,} times"
            for name, m in data.measures.items()
            if name in data.noun_table.zipf
        ),
        "kind": "line",
        "traces": [
            {"name": name, "x": [rank for rank, _ in points], "y": [count for _, count in points]}
            for name, points in data.noun_table.zipf.items()
        ],
        "x": "rank of the noun",
        "y": "occurrences",
        "log": True,
        "line_y": data.valid_threshold,
        "line_text": f"valid: more than {data.valid_threshold}",
    }
    lengths = [
        _length_chart(kind, data) for kind in LENGTH_NAMES if any(kind in m.lengths for m in data.measures.values())
    ]
    claims = claims_chart(data.measures)
    return [_ratio_chart(data.measures), lengths[0], zipf, *lengths[1:], *([claims] if claims else [])]


def _ratio_chart(measures: Mapping[str, SetMeasures]) -> dict[str, Any]:
    bars = [(name, measure.valid_fraction, False) for name, measure in measures.items()]
    bars += [(f"{row.name} (paper)", row.valid_percent / 100, True) for row in PAPER_ROWS]
    return {
        "id": "chart-ratio",
        "title": "VN/DN: share of the nouns seen often enough",
        "alt": "; ".join(f"{name}: {value:.1%}" for name, value, _ in bars),
        "kind": "bars",
        "names": [name for name, _, _ in bars],
        "values": [round(value, 4) for _, value, _ in bars],
        "errors": [measure.error("valid_fraction") for measure in measures.values()] + [None] * len(PAPER_ROWS),
        "is_paper": [is_paper for _, _, is_paper in bars],
    }


def _length_chart(kind: str, data: ReportData) -> dict[str, Any]:
    """A histogram of one kind of length for all sets, with one width of bars."""
    spreads = {name: m.lengths[kind] for name, m in data.measures.items() if kind in m.lengths}
    longest = max(len(spread.counts) for spread in spreads.values())
    most = max(
        min(1.2 * spread.quantile(AXIS_QUANTILE), 2 * spread.quantile(TAIL_QUANTILE)) for spread in spreads.values()
    )
    end = min(longest, int(most) + 2)
    width = max(1, -(-end // NUM_BARS))
    num_bars = -(-end // width)
    unit = LENGTH_NAMES[kind] if kind == "text_tokens" else LENGTH_NAMES[kind].lower()
    notes = [f"bins of {width}"] * (width > 1) + [f"last bin: or more, up to {longest - 1:,}"] * (
        longest > num_bars * width
    )
    return {
        "id": f"chart-{kind.replace('_', '-')}",
        "title": CHART_TITLES[kind],
        "alt": "; ".join(
            f"{name}: mean {spread.mean:.1f}, median {spread.quantile(0.5):g}" for name, spread in spreads.items()
        ),
        "kind": "steps",
        "traces": [
            {
                "name": name,
                "x": [start + (width - 1) / 2 for start in range(0, num_bars * width, width)],
                "y": _shares(spread.histogram(width, num_bars), spread.num),
            }
            for name, spread in spreads.items()
        ],
        "x": f"{unit} in a caption" + (f" ({'; '.join(notes)})" if notes else ""),
        "y": "share of captions",
        "width": width,
        "lines_x": [limit for limit in data.limits if limit <= 2 * end] if kind == "text_tokens" else [],
    }


def _shares(values: Sequence[int], total: int) -> list[float]:
    return [round(value / max(total, 1), 6) for value in values]
