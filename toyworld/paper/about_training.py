"""Claims about training: where it starts (sections 2.2 and 2.3), adaLN-single (Figure 6), many scales (A.5)."""

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from pipelines.store.checkpoints import find_checkpoint
from toyworld.paper.arms import Arm, found_in_arms
from toyworld.paper.claims import Finding, Table, Words
from toyworld.paper.estimates import (
    Estimate,
    Verdict,
    all_of,
    difference_of,
    is_alike,
    is_more,
)
from toyworld.paper.plots import curves_chart
from toyworld.paper.published import ADALN_GIGABYTES, ADALN_PARAMETERS_MILLIONS
from toyworld.paper.readings import Hits, PaperRuns, seconds_at
from toyworld.paper.sizes import published_parameters, stored_parameters

# Samples of a stage's checkpoints by step, as the Makefile names them; the last step has the stage's own name.
CLASSES = "classes"
FROM_CLASSES = {500: "from-classes-500", 900: "from-classes-900", 1300: "from-classes"}
SCRATCH = {
    400: "scratch-400",
    800: "scratch-800",
    1200: "scratch-1200",
    1400: "scratch-1400",
    1500: "scratch-1500",
    1600: "scratch",
}
MAIN = {400: "main-400", 800: "main"}
SIZES = ("80x80", "96x64", "64x96")


def decomposition(runs: PaperRuns, words: Words) -> Finding:
    """Section 2.2: class-conditional training first, in the same total of steps and of time."""
    equal_steps = difference_of(runs.hits("from-classes"), runs.hits("scratch"))
    equal_seconds, seconds = _at_equal_seconds(runs)
    equal_time = difference_of(runs.hits("from-classes"), equal_seconds)
    trained = {stage: runs.trained(stage) for stage in (CLASSES, "from-classes", "scratch")}
    told = {
        stage: sum(one.seconds for one in by_seed.values()) / len(by_seed)
        for stage, by_seed in trained.items()
        if by_seed
    }
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in told.items())
    at = f"; equal time is {seconds:.0f} s" if seconds else ""
    return found_in_arms(
        runs,
        arms=(Arm("300 of classes, 1,300 of texts", "from-classes"), Arm("1,600 of texts", "scratch")),
        differences={"equal_steps": equal_steps, "equal_time": equal_time},
        verdict=all_of(is_more(equal_steps, "at equal steps"), _at_equal_time(equal_time, told, seconds)),
        measured=f"Training took: {times}{at}." if times else "",
        chart=_curves(runs),
        chart_title="Objects all right by seconds of training, classes included",
        further={f"seconds_{stage}": round(value, 1) for stage, value in told.items()},
    )


def _at_equal_time(difference: Estimate | None, told: Mapping[str, float], seconds: float | None) -> Verdict:
    """Whether the difference at equal time is above 0; training from nothing may have ended before."""
    if difference is None and seconds and told.get("scratch", seconds) < seconds:
        return Verdict(None, f"training from nothing ended after {told['scratch']:.0f} s, before {seconds:.0f} s")
    return is_more(difference, "at equal time")


def _at_equal_seconds(runs: PaperRuns) -> tuple[dict[int, Hits], float | None]:
    """What training from nothing draws at the seconds of both stages, between two checkpoints in proportion."""
    found, spent = {}, []
    for seed, run in runs.seeds.items():
        classes, texts = (runs.trained(stage).get(seed) for stage in (CLASSES, "from-classes"))
        if classes is None or texts is None:
            continue
        budget = classes.seconds + texts.seconds
        drawn = _drawn_by_seconds(runs, run, seed, SCRATCH, stage="scratch")
        before = [item for item in drawn if item[0] <= budget][-1:]
        after = [item for item in drawn if item[0] > budget][:1]
        spent.append(budget)
        if before and (after or before[0][0] == budget):
            found[seed] = _between(before[0], [*after, before[0]][0], budget)
    return found, sum(spent) / len(spent) if spent else None


def _between(before: tuple[float, Hits], after: tuple[float, Hits], seconds: float) -> Hits:
    length = after[0] - before[0]
    part = (seconds - before[0]) / length if length else 0.0
    first, last = before[1].by_prompt, after[1].by_prompt
    return Hits(
        by_prompt={
            key: ((1 - part) * right + part * last[key][0], named)
            for key, (right, named) in first.items()
            if key in last
        }
    )


def _drawn_by_seconds(
    runs: PaperRuns, run: Path, seed: int, samples: Mapping[int, str], *, stage: str
) -> list[tuple[float, Hits]]:
    drawn = []
    for step, name in samples.items():
        seconds, hits = seconds_at(run, stage, step), runs.hits(name).get(seed)
        if seconds is not None and hits is not None:
            drawn.append((seconds, hits))
    return drawn


def _curves(runs: PaperRuns) -> Markup | None:
    if not runs.seeds:
        return None
    seed, run = next(iter(runs.seeds.items()))
    classes = runs.trained(CLASSES).get(seed)
    arms = (
        ("classes, then texts", FROM_CLASSES, "from-classes", classes.seconds if classes else 0.0),
        ("texts from nothing", SCRATCH, "scratch", 0.0),
        ("texts from given class weights", MAIN, "main", 0.0),
    )
    curves = {
        title: [(before + at, hits.share) for at, hits in _drawn_by_seconds(runs, run, seed, samples, stage=stage)]
        for title, samples, stage, before in arms
    }
    curves = {title: drawn for title, drawn in curves.items() if drawn}
    if not curves:
        return None
    last = ", ".join(f"{title} {drawn[-1][1]:.1%} after {drawn[-1][0]:.0f} s" for title, drawn in curves.items())
    return curves_chart(curves, label=f"Objects all right by seconds of training: {last}")


def reparameterization(runs: PaperRuns, words: Words) -> Finding:
    """Figure 6, `w/o re-param`: from given class-conditional weights against from nothing, which gets more steps."""
    difference = difference_of(runs.hits("main"), runs.hits("scratch"))
    return found_in_arms(
        runs,
        arms=(
            Arm("re-parameterised, 800", "main"),
            Arm("from nothing, 800", "scratch-800"),
            Arm("from nothing, 1,600", "scratch"),
        ),
        differences={
            "over_twice_the_steps": difference,
            "over_as_many_steps": difference_of(runs.hits("main"), runs.hits("scratch-800")),
        },
        verdict=is_more(difference, "800 steps re-parameterised over 1,600 from nothing"),
    )


def adaln_size(runs: PaperRuns, words: Words) -> Finding:
    """Figure 6: parameters and memory of adaLN-single against a layer in each block."""
    counts = {kind: published_parameters(kind) for kind in ("single", "per-block")}
    toy = {kind: _parameters(runs, stage) for kind, stage in (("single", "main"), ("per-block", "per-block"))}
    memory = {
        kind: [one.peak_memory_gigabytes for one in runs.trained(stage).values()]
        for kind, stage in (("single", "main"), ("per-block", "per-block"))
    }
    saved = 1 - counts["single"] / counts["per-block"]
    rows = [
        ("parameters of XL/2", *(f"{counts[kind] / 1e6:.1f}M" for kind in counts), f"{saved:.1%}"),
        (
            "weights, gradients, Adam, EMA of XL/2, fp32",
            *(f"{20 * counts[kind] / 1e9:.1f} GB" for kind in counts),
            f"{saved:.1%}",
        ),
    ]
    holds: bool | None = all(abs(counts[kind] / 1e6 - number) < 1 for kind, number in ADALN_PARAMETERS_MILLIONS.items())
    why = f"XL/2 has {counts['single'] / 1e6:.1f}M and {counts['per-block'] / 1e6:.1f}M parameters, {saved:.1%} fewer"
    single, block = toy["single"], toy["per-block"]
    if single and block:
        rows.append(("parameters here", f"{single:,}", f"{block:,}", f"{1 - single / block:.1%}"))
    if memory["single"] and memory["per-block"]:
        means = {kind: sum(found) / len(found) for kind, found in memory.items()}
        rows.append(
            (
                "peak of a process here, libraries included",
                *(f"{means[kind]:.3f} GB" for kind in means),
                f"{1 - means['single'] / means['per-block']:.1%}",
            )
        )
    return Finding(
        verdict=Verdict(holds, why),
        theirs=Table(
            title="Figure 6",
            columns=("", "adaLN-single", "adaLN per block", "saved"),
            rows=[
                ("parameters", *(f"{number}M" for number in ADALN_PARAMETERS_MILLIONS.values()), "26%"),
                ("GPU memory", *(f"{number} GB" for number in ADALN_GIGABYTES.values()), "21%"),
            ],
        ),
        ours=Table(
            title="Reckoned and measured here", columns=("", "adaLN-single", "adaLN per block", "saved"), rows=rows
        ),
        figures={
            "parameters_single": counts["single"],
            "parameters_per_block": counts["per-block"],
            "toy_parameters_single": single,
            "toy_parameters_per_block": block,
        },
    )


def _parameters(runs: PaperRuns, stage: str) -> int | None:
    for run in runs.seeds.values():
        folder = run / "training" / stage
        checkpoint = find_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is not None:
            return stored_parameters(checkpoint.weights)
    return None


def adaln_quality(runs: PaperRuns, words: Words) -> Finding:
    """Figure 6: pictures of adaLN-single are on par with those of a layer in each block."""
    difference = difference_of(runs.hits("main"), runs.hits("per-block"))
    return found_in_arms(
        runs,
        arms=(Arm("adaLN-single", "main"), Arm("adaLN per block", "per-block")),
        differences={"single_over_per_block": difference},
        verdict=is_alike(difference, "single over per-block", margin=words.margin),
    )


def multi_scale(runs: PaperRuns, words: Words) -> Finding:
    """A.5: buckets of aspect ratios against square crops, drawn at sizes of both."""
    by_size = {size: difference_of(runs.hits(f"multi-scale-{size}"), runs.hits(f"square-{size}")) for size in SIZES}
    wide = _mean([by_size[size] for size in SIZES[1:]])
    arms = [
        Arm(f"{title}, {size}", f"{stage}-{size}")
        for size in SIZES
        for title, stage in (("multi-scale", "multi-scale"), ("square", "square"))
    ]
    return found_in_arms(
        runs,
        arms=arms,
        differences={f"at_{size}": difference for size, difference in by_size.items()} | {"at_both_oblong": wide},
        verdict=is_more(wide, "multi-scale over square at 96x64 and 64x96"),
    )


def _mean(differences: list[Estimate | None]) -> Estimate | None:
    """The mean of differences of the same arms, by seed; its interval is taken to be as wide as the widest."""
    known = [difference for difference in differences if difference is not None]
    if not known or len(known) < len(differences):
        return None
    seeds = set.intersection(*(set(difference.by_seed) for difference in known))
    values = {seed: sum(difference.by_seed[seed] for difference in known) / len(known) for seed in sorted(seeds)}
    mean = sum(values.values()) / len(values)
    return Estimate(value=mean, half_width=max(difference.half_width for difference in known), by_seed=values)
