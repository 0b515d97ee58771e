"""Claims that compare arms: their shares, distances and pictures in one table, chart and grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from pipelines.store.png_files import read_picture
from toyworld.gallery import embed_picture, spread
from toyworld.mending import mend_sample
from toyworld.paper.claims import Finding, Picture, PictureRow, Table
from toyworld.paper.estimates import Estimate, Verdict, percent, points, share_of
from toyworld.paper.plots import rows_chart
from toyworld.paper.readings import DISTANCE, PaperRuns, read_distance
from toyworld.scoring import SAMPLES_TABLE, read_samples

NUM_PICTURES = 8  # as many prompts as in Figure 6


@dataclass(frozen=True)
class Arm:
    """Samples of one side of a comparison: what people call it, and the samples' name."""

    title: str
    samples: str


def found_in_arms(
    runs: PaperRuns,
    *,
    arms: Sequence[Arm],
    differences: Mapping[str, Estimate | None],
    verdict: Verdict,
    measured: str = "",
    theirs: Table | None = None,
    chart: Markup | None = None,
    chart_title: str = "",
    further: Mapping[str, float | int | str] | None = None,
) -> Finding:
    """Return what is found of some arms, with all that is known of each; a chart of shares where none is given."""
    shares = {arm.title: share for arm in arms if (share := share_of(runs.hits(arm.samples))) is not None}
    if chart is None and shares:
        told = ", ".join(f"{title} {percent(share)}" for title, share in shares.items())
        chart, chart_title = rows_chart(shares, label=f"Objects all right: {told}"), "Objects all right"
    known = {key: value for key, value in differences.items() if value is not None}
    seeds = sorted({seed for share in shares.values() for seed in share.by_seed})
    return Finding(
        verdict=verdict,
        measured=measured,
        theirs=theirs,
        ours=_arms_table(runs, arms, known) if shares else None,
        chart=chart,
        chart_title=chart_title,
        pictures=picture_rows(runs, arms),
        figures={
            **{arm.samples: shares[arm.title].figures() for arm in arms if arm.title in shares},
            **{key: value.figures() for key, value in known.items()},
            **(further or {}),
        },
        seeds=seeds,
    )


def _arms_table(runs: PaperRuns, arms: Sequence[Arm], differences: Mapping[str, Estimate]) -> Table:
    distances = {arm: runs.by_seed(lambda run, arm=arm: read_distance(run, arm.samples)) for arm in arms}
    has_distances = any(distances.values())
    rows = []
    for arm in arms:
        share = share_of(runs.hits(arm.samples))
        cells = [arm.title, "–" if share is None else percent(share)]
        if has_distances:
            found = list(distances[arm].values())
            cells.append(f"{sum(found) / len(found):.1f}" if found else "–")
        rows.append(cells)
    rest = [""] if has_distances else []
    rows += [[key.replace("_", " "), points(value), *rest] for key, value in differences.items()]
    return Table(
        title="This world", columns=("", "objects all right", *([DISTANCE] if has_distances else [])), rows=rows
    )


def picture_rows(runs: PaperRuns, arms: Sequence[Arm], *, count: int = NUM_PICTURES) -> list[PictureRow]:
    """Return pictures of the same prompts in each arm, of the first seed."""
    if not runs.seeds:
        return []
    run = next(iter(runs.seeds.values()))
    folders = {arm: run / "samples" / arm.samples for arm in arms}
    drawn = {arm: _files(folder) for arm, folder in folders.items() if (folder / SAMPLES_TABLE).is_file()}
    if not drawn:
        return []
    common = [key for key in next(iter(drawn.values())) if all(key in files for files in drawn.values())]
    return [
        PictureRow(title=arm.title, pictures=[_picture(*files[key]) for key in spread(common, count)])
        for arm, files in drawn.items()
    ]


def _files(folder: Path) -> dict[str, tuple[Path, str]]:
    return {row["key"]: (folder / row["file"], row["prompt"]) for row in read_samples(folder)}


def _picture(path: Path, prompt: str) -> Picture:
    return Picture(source=embed_picture(read_picture(path, mend=mend_sample())), title=prompt)
