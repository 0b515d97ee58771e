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

import jinja2
import pandas as pd
from markupsafe import Markup

from dataset_stats.measures import SetMeasures
from dataset_stats.noun_table import PER_CAPTIONS, NounTable
from dataset_stats.report.gallery import GalleryItem
from dataset_stats.report.table1 import PAPER_ROWS, Definition, findings, plus_minus, quality_rows, sample_note
from pipelines.store.files import atomic_write_bytes

TEMPLATES = Path(__file__).parent / "templates"
MAX_CHART_NOUNS = 60  # nouns per caption on the histogram's axis; the rest share the last bar
NUM_LENGTH_BARS = 40


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What the report shows."""

    run_name: str
    tagger: str
    tagger_hint: str
    measures: Mapping[str, SetMeasures]
    definitions: Sequence[Definition]
    noun_table: NounTable
    examples: Sequence[str]
    gallery: Sequence[GalleryItem]
    valid_threshold: int
    limits: Sequence[int]


def write_report(path: Path, data: ReportData) -> None:
    """Render the report and write it atomically."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = _script_json
    html = environment.get_template("report.html.jinja").render(
        data=data,
        paper_rows=PAPER_ROWS,
        findings=findings(data.measures, valid_threshold=data.valid_threshold),
        sample_note=sample_note(data.measures),
        is_sample=any(measure.estimate for measure in data.measures.values()),
        pm=plus_minus,
        per_captions=PER_CAPTIONS,
        quality=quality_rows(data.measures),
        has_lengths=any(measure.num_text_tokens is not None for measure in data.measures.values()),
        charts=_charts(data),
        nouns=_noun_rows(data.noun_table.top, list(data.measures), data.examples),
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
    """Plotly traces and axis titles; colours and fonts are the page's, so that they follow its theme."""
    nouns = [
        {
            "name": name,
            "x": list(range(MAX_CHART_NOUNS + 1)),
            "y": _shares(_fold(measure.noun_histogram, MAX_CHART_NOUNS), measure.num_captions),
        }
        for name, measure in data.measures.items()
    ]
    nouns = _trim_right(nouns)
    charts = [
        _ratio_chart(data.measures),
        {
            "id": "chart-nouns",
            "kind": "steps",
            "traces": nouns,
            "x": "nouns in a caption"
            + (f" ({MAX_CHART_NOUNS}: or more)" if any(len(t["x"]) > MAX_CHART_NOUNS for t in nouns) else ""),
            "y": "share of captions",
            "width": 1,
        },
        {
            "id": "chart-zipf",
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
        },
    ]
    lengths = {name: measure for name, measure in data.measures.items() if measure.text_token_histogram}
    if lengths:
        charts.append(_length_chart(lengths, data.limits))
    return charts


def _ratio_chart(measures: Mapping[str, SetMeasures]) -> dict[str, Any]:
    bars = [(name, measure.valid_fraction, False) for name, measure in measures.items()]
    bars += [(f"{row.name} (paper)", row.valid_percent / 100, True) for row in PAPER_ROWS]
    return {
        "id": "chart-ratio",
        "kind": "bars",
        "names": [name for name, _, _ in bars],
        "values": [round(value, 4) for _, value, _ in bars],
        "errors": [measure.error("valid_fraction") for measure in measures.values()] + [None] * len(PAPER_ROWS),
        "is_paper": [is_paper for _, _, is_paper in bars],
    }


def _length_chart(measures: Mapping[str, SetMeasures], limits: Sequence[int]) -> dict[str, Any]:
    longest = max(max(i for i, n in enumerate(m.text_token_histogram) if n or i == 0) for m in measures.values())
    width = max(1, -(-(longest + 1) // NUM_LENGTH_BARS))
    traces = []
    for name, measure in measures.items():
        values = measure.text_token_histogram[: longest + 1]
        bars = [sum(values[start : start + width]) for start in range(0, len(values), width)]
        middles = [start + (width - 1) / 2 for start in range(0, len(values), width)]
        traces.append({"name": name, "x": middles, "y": _shares(bars, measure.num_captions)})
    return {
        "id": "chart-lengths",
        "kind": "steps",
        "traces": traces,
        "x": "T5 tokens in a caption" + (f" (bins of {width})" if width > 1 else ""),
        "y": "share of captions",
        "width": width,
        "lines_x": [limit for limit in limits if limit <= 2 * longest],
    }


def _fold(values: Sequence[int], last: int) -> list[int]:
    return [*values[:last], sum(values[last:])]


def _shares(values: Sequence[int], total: int) -> list[float]:
    return [round(value / max(total, 1), 6) for value in values]


def _trim_right(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    end = 2 + max((i for trace in traces for i, y in enumerate(trace["y"]) if y), default=1)
    return [{**trace, "x": trace["x"][:end], "y": trace["y"][:end]} for trace in traces]
