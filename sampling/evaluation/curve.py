"""Numbers over guidance scales, as in the paper's Figure 20: `RUN/evaluation/<stage>-curve/curve.{csv,json,html}`."""

import csv
import html
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from errors import UserError
from pipelines.command import Command
from pipelines.engine.progress import console, get_logger
from pipelines.store.files import sha256_text
from pipelines.store.manifest import MANIFEST_NAME, Fingerprint, ShardDirectory
from pipelines.store.summary import update_summary
from sampling.evaluation.config import EvaluationConfig, written_out_defaults
from sampling.evaluation.contestants import Contestant, check_samples, draw_samples, find_contestants
from sampling.evaluation.scores import Meter, as_outlined, judged_outline, write_report

CURVE_VERSION = 1  # raise it when the same numbers are written in another way
REPORT_NAME = "curve"
# What the plot shows, the first that there is; all of them are in the table.
DISTANCES = ("FID", "FD-", "CLIP-FD")
# Columns behind the numbers: what they were compared with, and what was left out or cut to get them.
COUNTS = ("num_reference", "unusable_samples", "unusable_reference", "num_prompts", "prompts_cut_by_clip")

log = get_logger("evaluation")


def draw_curve(command: Command) -> None:
    """Draw and score every checkpoint at every guidance scale; write table and plot.

    Raises:
        MissingFileError, UserError: see `Meter` and `find_contestants`.
    """
    points, meter = _open(command)
    directory = ShardDirectory(command.run / "evaluation" / f"{command.stage_name}-curve")
    start_seconds = time.monotonic()
    draw_samples([contestant for _, contestant in points], run=command.run)
    judged = {item.folder.name: judged_outline([asdict(n) for n in meter.judged(item)]) for _, item in points}
    fingerprint = Fingerprint.of({"version": CURVE_VERSION, **meter.inputs(), **meter.settings(), "judged": judged})
    fingerprint = directory.known_as(fingerprint, defaults=written_out_defaults())
    fingerprint = as_outlined(directory, fingerprint)
    identity = "sha256:" + sha256_text(json.dumps([item.inputs() for _, item in points], sort_keys=True))
    if directory.is_done(REPORT_NAME, identity, fingerprint) and (directory.path / MANIFEST_NAME).is_file():
        log.info(f"nothing to do: {directory.file(REPORT_NAME, '.csv')} is up to date")
        return
    rows = [
        {
            "title": item.title,
            "guidance_scale": scale,
            "inputs": item.inputs(),
            "numbers": [asdict(number) for number in meter.measure(item)],
        }
        for scale, item in points
    ]
    texts = {".csv": _table(rows), ".html": plot(rows, title=f"{command.run.name}, {command.stage_name}")}
    write_report(
        directory,
        REPORT_NAME,
        {"inputs": meter.inputs(), "checkpoints": rows},
        texts,
        fingerprint=fingerprint,
        identity=identity,
    )
    update_summary(command.run, f"seconds.curve_{command.stage_name}", round(time.monotonic() - start_seconds, 1))
    log.info(f"written to {directory.path}")
    console.print(_table(rows), soft_wrap=True)


def describe_curve(command: Command) -> list[str]:
    """Return what `draw_curve` would do, line by line."""
    points, _ = _open(command)
    check_samples([contestant for _, contestant in points])
    return [
        f"guidance {scale:g}: would draw {len(item.job.pending()):,} of {len(item.job.requests):,} images into "
        f"{item.folder}"
        for scale, item in points
    ]


def _open(command: Command) -> tuple[list[tuple[float, Contestant]], Meter]:
    """Open the points of the curve and what they are scored with, and refuse what would give no number."""
    config = command.recipe.table("evaluation", EvaluationConfig)
    points = [
        (scale, contestant)
        for scale in config.guidance_scales
        for contestant in find_contestants(command, config, guidance_scale=scale)
    ]
    meter = Meter(command)
    if not meter.networks:
        raise UserError("a curve needs evaluation.inception, evaluation.clip or evaluation.vision")
    meter.require_numbers([contestant for _, contestant in points])
    return points, meter


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(number["metric"] for row in rows for number in row["numbers"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["checkpoint", "guidance_scale", "num_images", *names, *COUNTS])
    for row in rows:
        values = {number["metric"]: number["value"] for number in row["numbers"]}
        cells = [repr(values[name]) if name in values else "" for name in names]
        counts = _counts(row["numbers"])
        writer.writerow([row["title"], f"{row['guidance_scale']:g}", row["inputs"]["num_images"], *cells, *counts])
    return text.getvalue()


def _counts(numbers: Sequence[Mapping[str, Any]]) -> list[int | str]:
    """Return what `COUNTS` names; a number that no network of ours has taken has none."""
    measured = [number for number in numbers if number["network_key"]]
    prompts = next((number["prompts"] for number in measured if number["prompts"] is not None), None)
    return [
        max((number["num_reference"] for number in measured), default=0),
        max((sum(number["rejected_samples"].values()) for number in measured), default=0),
        max((sum(number["rejected_reference"].values()) for number in measured), default=0),
        "" if prompts is None else prompts["num_texts"],
        "" if prompts is None else prompts["num_cut"],
    ]


def plot(rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Return a page that opens offline: Fréchet distance over CLIP score, or over guidance where there is no CLIP."""
    import plotly.graph_objects as go

    metrics = [number["metric"] for number in rows[0]["numbers"]]
    distances = [name for prefix in DISTANCES for name in metrics if name.startswith(prefix)]
    distance = distances[0] if distances else metrics[0]
    has_clip = "CLIP score" in metrics and distance != "CLIP score"
    figure = go.Figure()
    for checkpoint in dict.fromkeys(row["title"] for row in rows):
        points = sorted(
            (row["guidance_scale"], {number["metric"]: number["value"] for number in row["numbers"]})
            for row in rows
            if row["title"] == checkpoint
        )
        figure.add_scatter(
            x=[values["CLIP score"] if has_clip else scale for scale, values in points],
            y=[values[distance] for _, values in points],
            text=[f"{scale:g}" for scale, _ in points],
            name=checkpoint,
            mode="lines+markers+text",
            textposition="top center",
        )
    shown = ("CLIP score", distance) if has_clip else (distance,)
    remarks = dict.fromkeys(
        f"{number['metric']}: {number['remark']}"
        for row in rows
        for number in row["numbers"]
        if number["metric"] in shown and number["remark"]
    )
    figure.add_annotation(
        text="<br>".join(html.escape(remark) for remark in remarks),
        showarrow=False,
        align="left",
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-70,
        yanchor="top",
        font_size=12,
    )
    figure.update_layout(
        margin_b=100 + 18 * len(remarks),
        title=f"{distance} over {'CLIP score' if has_clip else 'guidance scale'} · {title}",
        xaxis_title="CLIP score (higher is better)" if has_clip else "guidance scale",
        yaxis_title=f"{distance} (lower is better)" if distances else distance,
        showlegend=True,
        font_family="system-ui, sans-serif",
        template="plotly_white",
    )
    return figure.to_html(include_plotlyjs=True, full_html=True)
