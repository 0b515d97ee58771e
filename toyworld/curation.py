"""What a choice was worth where it is known what was spoilt: how much of what spoilt samples cost it gains back.

Samples are known by their names, as `make demo-curation` gives them: `all`, `chosen` and `sound`, of weights trained on
all samples, on those that the choice has kept, and on the sound ones alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.columns.written_choices import read_chosen
from pipelines.engine.progress import get_logger
from pipelines.store.manifest import ShardDirectory, manifest_path, read_manifest
from pipelines.store.summary import update_summary
from pipelines.store.tables import MEND_SHARD, read_table
from toyworld.mending import mend_world
from toyworld.spoilt import IS_SOUND, SPOILT_CAPTION, SPOILT_PICTURE

log = get_logger("toyworld")

ALL, CHOSEN, SOUND = "all", "chosen", "sound"
TARGET = 0.9  # of the difference, what the demo promises
SOUND_KIND = "sound"


@dataclass(frozen=True, kw_only=True)
class KindRow:
    """How many samples were spoilt in a way, or not at all, and how many of them the choice has left out."""

    noun: str
    kind: str
    num_samples: int
    num_left_out: int

    @property
    def share(self) -> float:
        """Part of them that was left out."""
        return self.num_left_out / self.num_samples


@dataclass(frozen=True, kw_only=True)
class Curation:
    """What the page shows: the scores, the difference that was regained, and what was left out by kind and source.

    Attributes:
        regained: part of the difference of the last score and the first that the choice gains.
        error: standard error of that over the prompts; all three draw the same ones. None where pictures differ.
    """

    scores: Mapping[str, float]
    regained: float | None
    error: float | None
    kinds: Sequence[KindRow]
    sources: Sequence[KindRow]
    where: str


def score_curation(run: Path, judged: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Write the table `curation` of the summary of a run that was spoilt, and return it.

    `all`, `chosen` and `sound` are shares of objects that are all right; `regained` is the part of the difference of
    the last and the first that the choice gains, `regained_error` its standard error; `precision` is the part of what
    it left out that was spoilt, `recall` the part of what was spoilt that it left out.
    """
    found = curation(run, judged)
    if found is None or found.regained is None:
        return {}
    figures = {**found.scores, "regained": found.regained}
    if found.error is not None:
        figures["regained_error"] = found.error
    sound = [row for row in found.kinds if row.kind == SOUND_KIND]
    num_spoilt = sum(row.num_samples for row in found.sources) - sum(row.num_samples for row in sound)
    num_left_out = sum(row.num_left_out for row in found.sources)
    spoilt_left_out = num_left_out - sum(row.num_left_out for row in sound)
    if num_left_out and num_spoilt:
        figures |= {"precision": spoilt_left_out / num_left_out, "recall": spoilt_left_out / num_spoilt}
    for name, value in figures.items():
        update_summary(run, f"curation.{name}", round(value, 4))
    log.info("curation: " + ", ".join(f"{name} {value:.1%}" for name, value in figures.items()))
    return figures


def curation(run: Path, judged: Mapping[str, Mapping[str, Any]]) -> Curation | None:
    """Return what is known of the choice of a run that was spoilt; None of any other, and before it has chosen."""
    choices, truth = run / "choices" / CHOSEN, run / "raw" / "truth.parquet"
    if not manifest_path(choices).is_file() or not truth.is_file():
        return None
    rows = read_table(truth, mend=mend_world()).to_pylist()
    if not rows or IS_SOUND not in rows[0]:
        return None
    left_out = _left_out(choices)
    scores = {name: judged[name]["all"] for name in (ALL, CHOSEN, SOUND) if name in judged}
    regained = error = None
    if len(scores) == 3 and scores[SOUND] != scores[ALL]:
        regained = (scores[CHOSEN] - scores[ALL]) / (scores[SOUND] - scores[ALL])
        error = _error(run, regained)
    sound = [row for row in rows if row[IS_SOUND]]
    kinds = [_row("", SOUND_KIND, sound, left_out)] if sound else []
    for noun, column in (("picture", SPOILT_PICTURE), ("caption", SPOILT_CAPTION)):
        for kind in dict.fromkeys(sorted(row[column] for row in rows if row[column] is not None)):
            kinds.append(_row(noun, kind, [row for row in rows if row[column] == kind], left_out))
    names = sorted({row["dataset"] for row in rows})
    sources = [_row("source", name, [row for row in rows if row["dataset"] == name], left_out) for name in names]
    where = read_manifest(choices).extra.get("where") or ""
    return Curation(scores=scores, regained=regained, error=error, kinds=kinds, sources=sources, where=where)


def _error(run: Path, regained: float) -> float | None:
    """The standard error of what is regained, a ratio of sums over the same prompts, linearised."""
    judged = [_right_by_prompt(run, name) for name in (ALL, CHOSEN, SOUND)]
    if not judged[0] or any(right.keys() != judged[0].keys() for right in judged):
        return None
    first, chosen, last = (np.array([right[key] for key in judged[0]], np.float64) for right in judged)
    difference = abs((last - first).sum())
    rest = chosen - first - regained * (last - first)
    return float(np.sqrt((rest**2).sum()) / difference) if difference else None


def _right_by_prompt(run: Path, name: str) -> dict[str, int]:
    """How many objects are all right in each prompt's picture; nothing where the judge has seen no such samples."""
    path = ShardDirectory(run / "judge").file(name, ".parquet")
    if not path.is_file():
        return {}
    return {
        row["key"]: sum(item["has_position"] and item["has_colour"] and item["has_shape"] for item in row["objects"])
        for row in read_table(path, ["key", "objects"], mend=MEND_SHARD).to_pylist()
    }


def _left_out(choices: Path) -> set[tuple[str, str]]:
    """Shard and key of each sample that the choice has left out."""
    found = set()
    for shard in ShardDirectory(choices).finished():
        keys, is_chosen = read_chosen(choices, shard)
        found |= {(shard, key) for key, kept in zip(keys, is_chosen, strict=True) if not kept}
    return found


def _row(noun: str, kind: str, rows: Sequence[Mapping[str, Any]], left_out: set[tuple[str, str]]) -> KindRow:
    num_left_out = sum((row["shard"], row["key"]) in left_out for row in rows)
    return KindRow(noun=noun, kind=kind.replace("_", " "), num_samples=len(rows), num_left_out=num_left_out)
