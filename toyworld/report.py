"""The run's page, `index.html`: one file that shows what every room made, from whatever has finished so far."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from errors import MissingFileError
from pipelines.engine.progress import get_logger
from pipelines.recipe import DataConfig, Recipe
from pipelines.store.families import schema_of
from pipelines.store.files import atomic_write_bytes, one_at_a_time
from pipelines.store.manifest import MANIFEST_NAME, ShardDirectory, manifest_path, read_manifest
from pipelines.store.state_files import read_log
from pipelines.store.summary import read_summary
from pipelines.store.tables import MEND_SHARD, count_table_rows
from toyworld.charts import loss_chart
from toyworld.config import ToyworldConfig
from toyworld.curation import TARGET, curation
from toyworld.edges_scoring import GRID_NAME, LED_TARGETS
from toyworld.few_steps import few_steps
from toyworld.gallery import SampleExample, caption_examples, sample_examples
from toyworld.page_filters import toy_template
from toyworld.previews import PreviewRow, preview_rows
from toyworld.score_curves import in_order_of_steps, score_curves
from toyworld.scoring import CAPTIONS_NAME, SAMPLES_TABLE, TARGETS, sample_folders

log = get_logger("toyworld")

PAGE_NAME = "index.html"
METRICS_NAME = "metrics.jsonl"
PAPER_STAGES = {  # section 2.2
    "stage1": ("Stage 1", "pixel dependency", "a class-conditional DiT"),
    "stage2": ("Stage 2", "text-image alignment", "texts come in through cross-attention to T5"),
    "stage3": ("Stage 3", "high resolution and aesthetics", "larger images of many aspect ratios"),
}
MAIN_STAGE = "stage2"  # a recipe that has it is one of the whole pipeline
COMPANION_SUFFIX = "-raw"  # `make demo-raw`: the same run on alt texts
LINKS = (
    ("stats/report.html", "noun statistics: every number with its definition, the noun table, examples"),
    ("stats/table1.md", "Table 1 of the paper for this run, as Markdown"),
    (GRID_NAME, "edges, what they led, and the same prompts and noise without them"),
    ("summary.json", "all figures of the run, for machines"),
    ("raw/manifest.json", "raw shards with their hashes"),
    ("captions/.manifest.json", "captions: settings, counts, rejects"),
)


@dataclass(frozen=True)
class StageTitle:
    """What a training stage is called, what it is for and what it trains; the last two are known of the paper's."""

    name: str
    title: str
    goal: str = ""
    detail: str = ""

    @property
    def full(self) -> str:
        """Title and goal."""
        return f"{self.title}: {self.goal}" if self.goal else self.title


@dataclass(kw_only=True)
class Step:
    """A row of the flow: what a room did, how long it took, what it turned away."""

    title: str
    what: str
    anchor: str = ""
    amounts: list[str] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    is_done: bool = False
    share_percent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss of one training stage, and what its preview prompts gave meanwhile."""

    name: str
    title: str
    detail: str
    chart: Markup | None
    previews: list[PreviewRow]
    num_steps: int = 0
    last_loss: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Some samples of a stage, and where all of them are."""

    name: str
    title: str
    detail: str
    num_images: int
    examples: list[SampleExample]
    grid_file: str | None


@dataclass(frozen=True)
class ScoreRow:
    """The judge's figures for one folder of samples of this run or of its companion."""

    title: str
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `make eval` measured: a row of figures by metric for each stage, and where its tables are."""

    metrics: list[str]
    rows: list[tuple[str, Mapping[str, float]]]
    paths: list[str]


def write_report(recipe: Recipe, run: Path) -> Path:
    """Write `run/index.html` and return its path; stages that have not finished are shown as not run yet.

    Raises:
        MissingFileError: there is no such run, or a captioned shard is gone.
    """
    config = recipe.table("toyworld", ToyworldConfig)
    data = recipe.table("data", DataConfig)
    if not run.is_dir():
        raise MissingFileError(f"run {run} does not exist")
    summary = read_summary(run)
    seconds = _flatten(summary.get("seconds", {}))
    stages = [_stage_title(name) for name in recipe.names("training")]
    # Nobody has drawn the images of other runs, so that there is no truth to compare captions and samples with.
    has_world = "toyworld" in recipe.tables or (run / "raw" / "truth.parquet").is_file()
    # Other recipes have what they show beside some of its parts alone.
    is_given = recipe.tables.get("captioning", {}).get("engine") == "given"
    is_whole = has_world and MAIN_STAGE in recipe.names("training")
    page = toy_template("index.html.jinja").render(
        name=run.resolve().name,
        recipe=recipe.path.name,
        total_seconds=sum(seconds.values()),
        has_world=has_world,
        is_whole=is_whole,
        is_given=is_given,
        steps=_flow(
            run,
            stages,
            seconds=seconds,
            captions=_captions_are(has_world=has_world, is_given=is_given),
            is_whole=is_whole,
        ),
        captioning=summary.get("captioning", {}),
        captions=caption_examples(run, data, count=config.num_report_examples),
        nouns=_noun_rows(recipe, summary),
        curves=_curves(run, stages),
        grids=_grids(config, run, stages=stages),
        scores=_score_rows(run, summary),
        score_curves=score_curves(summary.get("judge", {}), stages=recipe.names("training")),
        few_steps=few_steps(summary.get("judge", {})),
        lcm=summary.get("lcm", {}),
        curation=curation(run, summary.get("judge", {})),
        curation_target=TARGET,
        control=summary.get("control", {}),
        control_targets=LED_TARGETS,
        evaluation=_evaluation(run, summary),
        judged=summary.get("judge", {}),
        targets=TARGETS,
        links=[(path, what) for path, what in LINKS if (run / path).is_file()],
    )
    path = run / PAGE_NAME
    with one_at_a_time(run, PAGE_NAME):
        if path.is_file() and path.read_bytes() == page.encode():
            log.info(f"nothing to do: {path} is up to date")
            return path
        atomic_write_bytes(path, page.encode())
    log.info(f"wrote {path} ({len(page) / 1e6:.1f} MB)")
    return path


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}{key}_") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


# The flow


def _flow(
    run: Path, stages: Sequence[StageTitle], *, seconds: Mapping[str, float], captions: str, is_whole: bool
) -> list[Step]:
    steps = {  # by the prefix in the summary's seconds
        "world": _manifest_step(
            run / "raw", title="Raw shards", what="img2dataset, SA-1B and ImageNet-style tars", unit="images"
        ),
        "captioning": _manifest_step(
            run / "captions",
            title="Captions",
            what=captions,
            unit="captions",
            anchor="captions",
        ),
        "dataset_stats": _manifest_step(
            run / "stats", title="Noun statistics", what="what the captions gained", unit="texts", anchor="nouns"
        ),
        "columns": _manifest_step(
            min((path.parent for path in (run / "columns").glob(f"*/{MANIFEST_NAME}")), default=run / "columns"),
            title="Columns",
            what="what samples are chosen by",
            unit="samples",
        ),
        "features": _features_step(run),
        **{f"training_{stage.name}": _training_step(run, stage) for stage in stages},
        "sampling": _sampling_step(run),
        "judge": _judge_step(run),
    }
    for prefix, step in steps.items():
        # The name of a stage may begin another's.
        is_stage = prefix.startswith("training_")
        known = [value for key, value in seconds.items() if key == prefix or (key.startswith(prefix) and not is_stage)]
        step.seconds = sum(known) if known else None
    longest = max((step.seconds or 0.0 for step in steps.values()), default=0.0)
    for step in steps.values():
        step.share_percent = round(100 * (step.seconds or 0.0) / longest, 1) if longest else 0.0
    return [step for name, step in steps.items() if step.is_done or (is_whole and name != "columns")]


def _captions_are(*, has_world: bool, is_given: bool) -> str:
    if is_given:
        return "the texts that came with the images"
    return "LLaVA describes every image in detail" if has_world else "what is to be seen in each image"


def _manifest_step(folder: Path, *, title: str, what: str, unit: str, anchor: str = "") -> Step:
    step = Step(title=title, what=what, anchor=anchor)
    if manifest_path(folder).is_file():
        manifest = read_manifest(folder)
        step.amounts.append(f"{manifest.num_kept:,} {unit}")
        step.rejected = manifest.rejected
        step.is_done = True
    return step


def _features_step(run: Path) -> Step:
    """One row for all feature folders, which share the features stage's seconds."""
    total = Step(title="Features", what="T5 and VAE run once, and never again")
    rejected: Counter[str] = Counter()
    folders = [path.parent for path in (run / "features").glob(f"*/{MANIFEST_NAME}")]
    manifests = {folder: read_manifest(folder) for folder in folders}
    for folder in sorted(folders, key=lambda folder: (manifests[folder].extra.get("resolution", 0), folder.name)):
        schema, resolution = schema_of(manifests[folder]), manifests[folder].extra.get("resolution")
        unit = schema.name if schema is not None else folder.name
        unit = "texts" if unit == "text" else unit
        unit = unit if resolution is None else f"{unit} at {resolution} px"
        step = _manifest_step(folder, title="", what="", unit=unit)
        total.amounts += step.amounts
        total.is_done = True
        rejected.update(step.rejected)
    total.rejected = dict(rejected.most_common())
    return total


def _training_step(run: Path, stage: StageTitle) -> Step:
    losses = _read_losses(run / "training" / stage.name / METRICS_NAME)
    amounts = [f"{losses[-1][0]:,} steps"] if losses else []
    return Step(title=stage.title, what=stage.goal, anchor="training", amounts=amounts, is_done=bool(losses))


def _sampling_step(run: Path) -> Step:
    counts = [count_table_rows(folder / SAMPLES_TABLE, mend=MEND_SHARD) for folder in sample_folders(run)]
    amounts = [f"{sum(counts):,} images" + (f" in {len(counts)} sets" if len(counts) > 1 else "")] if counts else []
    what = "DPM-Solver++ draws unseen scenes"
    return Step(title="Samples", what=what, anchor="samples", amounts=amounts, is_done=bool(counts))


def _judge_step(run: Path) -> Step:
    directory = ShardDirectory(run / "judge")
    files = [directory.file(name, ".parquet") for name in directory.marked() if name != CAPTIONS_NAME]
    counts = [count_table_rows(path, mend=MEND_SHARD) for path in filter(Path.is_file, files)]
    amounts = [f"{sum(counts):,} images"] if counts else []
    what = "scores samples against the scenes of their prompts"
    return Step(title="Judge", what=what, anchor="scores", amounts=amounts, is_done=bool(counts))


# Sections


def _noun_rows(recipe: Recipe, summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Figures of each caption set, in the recipe's order."""
    figures = summary.get("dataset_stats", {})
    order = list(recipe.tables.get("dataset_stats", {}).get("sets", {}))
    names = sorted(figures, key=lambda name: (order.index(name) if name in order else len(order), name))
    return [(name, figures[name]) for name in names]


def _read_losses(path: Path) -> list[tuple[int, float]]:
    """(step, finite loss) in order; a resumed run repeats steps, of which the last counts."""
    if not path.is_file():
        return []
    # Lines of the validation have no training loss.
    rows = [(row.get("step"), row.get("loss")) for row in read_log(path)]
    losses = {
        step: loss
        for step, loss in rows
        if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss)
    }
    return sorted(losses.items())


def _curves(run: Path, stages: Sequence[StageTitle]) -> list[Curve]:
    curves = []
    for stage in stages:
        losses = _read_losses(run / "training" / stage.name / METRICS_NAME)
        if not losses:
            curves.append(Curve(name=stage.name, title=stage.full, detail=stage.detail, chart=None, previews=[]))
            continue
        tail = [loss for _, loss in losses[-max(1, len(losses) // 20) :]]
        last_loss = sum(tail) / len(tail)
        label = f"Loss of {stage.title.lower()} over {losses[-1][0]} steps, {last_loss:.3f} at the end"
        curves.append(
            Curve(
                name=stage.name,
                title=stage.full,
                detail=stage.detail,
                chart=loss_chart(losses, label=label),
                num_steps=losses[-1][0],
                last_loss=last_loss,
                previews=preview_rows(run, stage.name),
            )
        )
    return curves


def _grids(config: ToyworldConfig, run: Path, *, stages: Sequence[StageTitle]) -> list[Grid]:
    found = {folder.name: folder for folder in sample_folders(run)}
    grids = []
    others = sorted(found.keys() - {stage.name for stage in stages}, key=in_order_of_steps)
    for stage in [*stages, *map(_stage_title, others)]:
        folder = found.get(stage.name)
        grids.append(
            Grid(
                name=stage.name,
                title=stage.full,
                detail=stage.detail,
                num_images=count_table_rows(folder / SAMPLES_TABLE, mend=MEND_SHARD) if folder else 0,
                examples=sample_examples(config, run, folder) if folder else [],
                grid_file=f"samples/{stage.name}/grid.png" if folder and (folder / "grid.png").is_file() else None,
            )
        )
    return grids


def _score_rows(run: Path, summary: Mapping[str, Any]) -> list[ScoreRow]:
    """The judge's figures of this run, then those of the run that differs from it only in its captions."""
    judged = summary.get("judge", {})
    rows = [ScoreRow(_stage_title(name).title, judged[name]) for name in sorted(judged, key=in_order_of_steps)]
    name = run.resolve().name
    is_raw = name.endswith(COMPANION_SUFFIX)
    companion = run.resolve().with_name(name.removesuffix(COMPANION_SUFFIX) if is_raw else name + COMPANION_SUFFIX)
    figures = read_summary(companion).get("judge", {}).get("stage2")
    if figures:
        kind = "dense captions" if is_raw else "alt texts"
        rows.append(ScoreRow(f"Stage 2 on {kind} ({companion.name})", figures))
    return rows


def _evaluation(run: Path, summary: Mapping[str, Any]) -> Evaluation | None:
    stages = sorted(summary.get("evaluation", {}).items())
    if not stages:
        return None
    paths = [f"evaluation/{name}/scores.md" for name, _ in stages]
    return Evaluation(
        metrics=list(dict.fromkeys(metric for _, figures in stages for metric in figures)),
        rows=[(_stage_title(name).title, figures) for name, figures in stages],
        paths=[path for path in paths if (run / path).is_file()],
    )


def _stage_title(name: str) -> StageTitle:
    return StageTitle(name, *PAPER_STAGES.get(name, (name,)))
