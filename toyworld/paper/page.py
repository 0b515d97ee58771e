"""The page of the paper's claims, `runs/paper/index.html`, and the same for machines, `summary.json`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from errors import MissingFileError
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_bytes, atomic_write_json, one_at_a_time
from pipelines.store.summary import read_summary
from toyworld.page_filters import toy_template
from toyworld.paper.about_cost import cost, cost_arithmetic
from toyworld.paper.about_data import captions, dense_captions, nouns, tokens
from toyworld.paper.about_drawing import compositionality, guidance, preference, samplers
from toyworld.paper.about_training import adaln_quality, adaln_size, decomposition, multi_scale, reparameterization
from toyworld.paper.claims import Finding, Words, read_words
from toyworld.paper.estimates import LABELS, NOT_RUN, Verdict
from toyworld.paper.readings import WORLD_FOLDER, PaperRuns, find_runs

log = get_logger("toyworld")

PAGE_NAME, SUMMARY_NAME = "index.html", "summary.json"
FINDINGS: dict[str, Callable[[PaperRuns, Words], Finding]] = {
    "nouns": nouns,
    "captions": captions,
    "dense_captions": dense_captions,
    "tokens": tokens,
    "decomposition": decomposition,
    "reparameterization": reparameterization,
    "adaln_size": adaln_size,
    "adaln_quality": adaln_quality,
    "multi_scale": multi_scale,
    "samplers": samplers,
    "guidance": guidance,
    "compositionality": compositionality,
    "preference": preference,
    "cost_arithmetic": cost_arithmetic,
    "cost": cost,
}


def write_page(folder: Path) -> Path:
    """Write page and summary of the runs below `folder`, and return the page; parts that have not run say so.

    Raises:
        MissingFileError: there is no world to show.
    """
    runs = find_runs(folder) if folder.is_dir() else None
    if runs is None or not runs.world.is_dir():
        raise MissingFileError(
            f"{folder} holds no world of the paper, {folder / WORLD_FOLDER}: its parts are run first"
        )
    words = read_words()
    shown = {name: FINDINGS[name](runs, said) for name, said in words.items() if not said.why}
    counts = Counter(finding.verdict.label for finding in shown.values())
    page = toy_template("paper.html.jinja").render(
        claims=[(words[name], finding) for name, finding in shown.items()],
        others=[said for said in words.values() if said.why],
        labels=LABELS,
        not_run=NOT_RUN,
        counts=counts,
        seeds=list(runs.seeds),
        seconds=total_seconds(runs),
    )
    with one_at_a_time(folder, PAGE_NAME):
        atomic_write_bytes(folder / PAGE_NAME, page.encode())
        atomic_write_json(
            folder / SUMMARY_NAME, {"claims": summarize(words.values(), shown), "seeds": list(runs.seeds)}
        )
    told = ", ".join(f"{label}: {count}" for label, count in counts.items())
    log.info(f"wrote {folder / PAGE_NAME} ({len(page) / 1e6:.1f} MB); of {len(shown)} claims {told}")
    return folder / PAGE_NAME


def summarize(words: Iterable[Words], findings: Mapping[str, Finding]) -> dict[str, dict[str, Any]]:
    """Return claims as `summary.json` has them: `holds`, `why`, the seeds of the trainings, and each one's figures."""
    summary: dict[str, dict[str, Any]] = {}
    for said in words:
        finding = findings.get(said.name, Finding(verdict=Verdict(None, said.why)))
        summary[said.name] = {
            "holds": finding.verdict.holds,
            "why": finding.verdict.why,
            "seeds": list(finding.seeds),
            "figures": dict(finding.figures),
        }
    return summary


def total_seconds(runs: PaperRuns) -> float:
    """Return the seconds that rooms say they took, of the world and all seeds."""
    return sum(_sum(read_summary(run).get("seconds", {})) for run in (runs.world, *runs.seeds.values()))


def _sum(node: dict[str, Any]) -> float:
    return sum(_sum(value) if isinstance(value, dict) else value for value in node.values())
