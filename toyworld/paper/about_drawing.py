"""Claims about drawing and scores: solvers by steps (A.5), guidance (Figure 20), Table 3, the user study (Figure 5)."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from toyworld.paper.arms import Arm, picture_rows
from toyworld.paper.claims import Finding, Table, Words
from toyworld.paper.estimates import (
    NOT_RUN,
    TRAINING_ERROR,
    Estimate,
    Verdict,
    all_of,
    difference_of,
    is_alike,
    is_more,
    over_seeds,
    percent,
    share_of,
)
from toyworld.paper.plots import curves_chart
from toyworld.paper.published import TABLE_3, TABLE_3_AXES
from toyworld.paper.readings import PaperRuns, read_axes
from toyworld.paper.votes import preference_folders

SOLVERS = {"iDDPM": "iddpm", "DPM-Solver++": "dpm-solver", "SA-Solver": "sa-solver"}
STEPS = (5, 10, 20, 50, 100)
CHOSEN = "dpm-solver-in-20"
CURVE = "main-curve"
AXES = {"Color": "colour_binding", "Shape": "shape_binding", "Spatial": "spatial", "Complex": "complex"}


def samplers(runs: PaperRuns, words: Words) -> Finding:
    """A.5: three solvers draw alike, and DPM-Solver needs 20 steps for it."""
    by_steps = {
        title: {steps: share for steps in STEPS if (share := share_of(runs.hits(f"{name}-in-{steps}"))) is not None}
        for title, name in SOLVERS.items()
    }
    shares = {(title, steps): share for title, found in by_steps.items() for steps, share in found.items()}
    # Of each solver the best there is: which steps that takes is no part of what is compared.
    best = {title: max(found, key=lambda steps: found[steps].value) for title, found in by_steps.items() if found}
    is_whole = len(shares) == len(SOLVERS) * len(STEPS)
    verdicts = [
        is_alike(
            difference_of(runs.hits(CHOSEN), runs.hits(drawn), is_one_training=True),
            f"DPM-Solver++ in 20 steps over {title} in {steps}",
            margin=words.margin,
        )
        for title, steps in best.items()
        if is_whole and (drawn := f"{SOLVERS[title]}-in-{steps}") != CHOSEN
    ]
    curves = {
        title: [(float(steps), share.value) for steps, share in found.items()]
        for title, found in by_steps.items()
        if found
    }
    return Finding(
        verdict=all_of(*verdicts) if verdicts else Verdict(None, NOT_RUN),
        ours=Table(
            title="This world, objects all right",
            columns=("", *(f"{steps} steps" for steps in STEPS)),
            rows=[
                (title, *(percent(shares[title, steps]) if (title, steps) in shares else "–" for steps in STEPS))
                for title in curves
            ],
        )
        if curves
        else None,
        chart=curves_chart(curves, label=f"Objects all right by steps of {', '.join(curves)}", is_log=True, ticks=STEPS)
        if curves
        else None,
        chart_title="Objects all right by steps",
        pictures=picture_rows(runs, [Arm(f"{title}, 20 steps", f"{name}-in-20") for title, name in SOLVERS.items()]),
        figures={f"{SOLVERS[title]}_{steps}": share.figures() for (title, steps), share in shares.items()},
        seeds=sorted({seed for share in shares.values() for seed in share.by_seed}),
    )


def guidance(runs: PaperRuns, words: Words) -> Finding:
    """Figure 20: distance against CLIP score by guidance, and alignment that stays over the scales."""
    curve = {seed: _read_curve(run) for seed, run in runs.seeds.items()}
    curve = {seed: rows for seed, rows in curve.items() if rows}
    first = next(iter(curve.values()), [])
    scales = [row.scale for row in first]
    shares = {scale: share for scale in scales if (share := share_of(runs.hits(_at_scale(scale)))) is not None}
    guided = [scale for scale in shares if scale >= 1.5]
    verdict = Verdict(None, NOT_RUN)
    if len(guided) > 1 and len(shares) == len(scales):
        best, worst = (choose(guided, key=lambda scale: shares[scale].value) for choose in (max, min))
        difference = difference_of(runs.hits(_at_scale(best)), runs.hits(_at_scale(worst)), is_one_training=True)
        verdict = is_alike(difference, f"guidance {best:g} over {worst:g}", margin=words.margin)
    distances = [(row.clip, row.distance) for row in first if row.clip is not None and row.distance is not None]
    return Finding(
        verdict=verdict,
        ours=Table(
            title="This world",
            columns=("guidance", "objects all right", "FD-LLaVA", "CLIP score"),
            rows=[
                (
                    f"{row.scale:g}",
                    percent(shares[row.scale]) if row.scale in shares else "–",
                    _number(row.distance),
                    _number(row.clip),
                )
                for row in first
            ],
        )
        if first
        else None,
        chart=curves_chart(
            {"FD-LLaVA by CLIP score, a dot a scale": distances},
            label="Distance by CLIP score over guidance scales",
            is_share=False,
        )
        if len(distances) > 1
        else None,
        chart_title="Distance against CLIP score (the lower and the further right, the better)",
        links=[(f"seed-{seed}/evaluation/{CURVE}/curve.html", f"the curve of seed {seed}") for seed in curve],
        figures={f"at_{scale:g}": share.figures() for scale, share in shares.items()},
        seeds=sorted(curve),
    )


def _at_scale(scale: float) -> str:
    return f"main-cfg{scale:g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class _Point:
    """A guidance scale with its distance and CLIP score, as far as they were measured."""

    scale: float
    distance: float | None
    clip: float | None


def _read_curve(run: Path) -> list[_Point]:
    path = run / "evaluation" / CURVE / "curve.json"
    if not path.is_file():
        return []
    points = []
    for row in json.loads(path.read_bytes())["checkpoints"]:
        numbers = {item["metric"]: item["value"] for item in row["numbers"]}
        distance = next((value for metric, value in numbers.items() if metric.startswith("FD-")), None)
        points.append(_Point(row["guidance_scale"], distance, numbers.get("CLIP score")))
    return points


def compositionality(runs: PaperRuns, words: Words) -> Finding:
    """Table 3: T2I-CompBench's axes, and what captions have to do with them."""
    arms = {"main (all captions)": "main", "dense captions": "dense", "alt texts": "raw"}
    scores = {title: {axis: _axis(runs, name, key) for axis, key in AXES.items()} for title, name in arms.items()}
    gains = {axis: _axis_difference(runs, "dense", "raw", key) for axis, key in AXES.items()}
    verdicts = [is_more(gain, f"{axis.lower()}, dense over raw") for axis, gain in gains.items()]
    is_run = any(value is not None for found in scores.values() for value in found.values())
    return Finding(
        verdict=all_of(*verdicts) if any(gains.values()) else Verdict(None, NOT_RUN),
        theirs=Table(
            title="Table 3",
            columns=("", *TABLE_3_AXES),
            rows=[(name, *(f"{value:.4f}" for value in row)) for name, row in TABLE_3.items()],
        ),
        ours=Table(
            title="This world",
            columns=("", *TABLE_3_AXES),
            rows=[(title, *(_score(found.get(axis)) for axis in TABLE_3_AXES)) for title, found in scores.items()],
        )
        if is_run
        else None,
        figures={
            **{
                f"{name}_{key}": estimate.figures()
                for title, name in arms.items()
                for axis, key in AXES.items()
                if (estimate := scores[title][axis]) is not None
            },
            **{f"dense_over_raw_{AXES[axis]}": gain.figures() for axis, gain in gains.items() if gain is not None},
        },
        seeds=sorted(
            {seed for found in scores.values() for value in found.values() if value for seed in value.by_seed}
        ),
    )


def _score(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3f}"


def _axis(runs: PaperRuns, name: str, axis: str) -> Estimate | None:
    found = {seed: axes[axis] for seed, axes in runs.by_seed(lambda run: read_axes(run, name)).items() if axis in axes}
    if not found:
        return None
    errors = [math.sqrt(score * (1 - score) / count) for score, count in found.values()]
    values = {seed: score for seed, (score, _) in found.items()}
    return over_seeds(values, error=sum(errors) / len(errors), training_error=TRAINING_ERROR / math.sqrt(2))


def _axis_difference(runs: PaperRuns, first: str, second: str, axis: str) -> Estimate | None:
    """As of independent pictures: prompts are the same, so the interval is rather too wide."""
    one, other = (runs.by_seed(lambda run, name=name: read_axes(run, name)) for name in (first, second))
    values, errors = {}, []
    for seed in sorted(one.keys() & other.keys()):
        if axis in one[seed] and axis in other[seed]:
            pair = (one[seed][axis], other[seed][axis])
            values[seed] = pair[0][0] - pair[1][0]
            errors.append(math.sqrt(sum(score * (1 - score) / count for score, count in pair)))
    return over_seeds(values, error=sum(errors) / len(errors), training_error=TRAINING_ERROR) if values else None


def preference(runs: PaperRuns, words: Words) -> Finding:
    """Figure 5: pairs of pictures, seen blindly, with the judge in the place of people."""
    found = runs.by_seed(_read_rates)
    rates = {seed: rate for seed, rate in found.items() if rate["rate"] is not None}
    verdict = Verdict(None, NOT_RUN)
    if rates:
        low, high = min(rate["low"] for rate in rates.values()), max(rate["high"] for rate in rates.values())
        mean = sum(rate["rate"] for rate in rates.values()) / len(rates)
        holds = True if low > 0.5 else False if high < 0.5 else None
        verdict = Verdict(
            holds, f"dense captions are preferred in {mean:.1%} of the votes that are no ties ({low:.1%} to {high:.1%})"
        )
    return Finding(
        verdict=verdict,
        theirs=Table(
            title="Section 3.2, against SDv2",
            columns=("", "improvement"),
            rows=[("quality", "7.2%"), ("alignment", "42.4%")],
        ),
        ours=Table(
            title="This world, alignment",
            columns=("seed", "for dense", "for alt texts", "ties", "share"),
            rows=[
                (
                    str(seed),
                    str(rate["num_first"]),
                    str(rate["num_second"]),
                    str(rate["num_ties"]),
                    f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})",
                )
                for seed, rate in rates.items()
            ],
        )
        if rates
        else None,
        links=[
            (f"{folder.relative_to(runs.folder)}/preference.html", f"the blind page of seed {seed}")
            for seed, run in runs.seeds.items()
            for folder in preference_folders(run)
        ],
        figures={f"seed_{seed}": {key: rate[key] for key in ("rate", "low", "high")} for seed, rate in rates.items()},
        seeds=sorted(rates),
    )


def _read_rates(run: Path) -> Mapping[str, Any] | None:
    """How often `dense` was preferred; the checkpoints of a pair stand in the order of their titles."""
    path = run / "evaluation" / "dense-preference" / "win-rates.json"
    if not path.is_file():
        return None
    (rate,) = json.loads(path.read_bytes())["rates"]
    if not rate["first"].startswith("dense"):
        raise UserError(f"{path} compares {rate['first']} with {rate['second']}, where dense comes first")
    return rate
