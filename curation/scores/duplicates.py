"""The score `duplicates`: which images are near duplicates of others, in the whole run and in other runs."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.config import DuplicatesConfig
from curation.cores import num_cores
from curation.duplicates.finding import Looking, find_duplicates
from curation.duplicates.gathering import Part, Samples, gather
from curation.duplicates.grouping import KINDS, Groups
from curation.duplicates.kernels import GROUPING_VERSION
from curation.hashing import HASHING_VERSION
from curation.scores.clip import CLIP_KEY, EMBEDDING, EMBEDDINGS_FOLDER, ClipChoice
from curation.scores.protocol import Column, Reads, RunScore, Score
from curation.table_rows import input_hashes, read_inputs
from errors import UserError
from pipelines.columns.columns_folders import COLUMNS, MAIN_CAPTION
from pipelines.columns.expressions import Expression, parse_expression
from pipelines.columns.known_scores import score_command
from pipelines.columns.sample_columns import SampleColumns
from pipelines.engine.progress import get_logger
from pipelines.store.manifest import Manifest, manifest_path, read_manifest

HASHES = Reads(folder="columns/hashes", columns=("exact_hash", "perceptual_hash", "thumbnail"))
EMBEDDINGS = Reads(folder=EMBEDDINGS_FOLDER, columns=(EMBEDDING,))
REPRESENTATIVE_KEY = "columns.duplicates.representative"
RUNS_KEY = "columns.duplicates.runs"

log = get_logger("columns")


class Duplicates(RunScore):
    """Whether an image is a duplicate, of which it is, and of what kind."""

    name = "duplicates"
    version: ClassVar[int] = 1
    columns = (
        Column(name="duplicate", type=pa.bool_(), unit="", meaning="Whether another sample stands for it"),
        Column(name="duplicate_of", type=pa.string(), unit="", meaning="That sample, as shard/key or run:shard/key"),
        Column(
            name="duplicate_kind",
            type=pa.string(),
            unit="",
            meaning="exact, perceptual, mirrored, embedding: how it is like it",
        ),
        Column(
            name="duplicate_group", type=pa.string(), unit="", meaning="Name of the sample that stands for its group"
        ),
    )

    def __init__(self, config: DuplicatesConfig, run: Path, *, others: Sequence[Score], clip: ClipChoice) -> None:
        self._config = config
        self._run = run
        self._others = others
        self._clip = clip

    @cached_property
    def _representative(self) -> Expression:
        expression = parse_expression(self._config.representative, key=REPRESENTATIVE_KEY)
        own = {f"{start}{column.name}" for start in ("", f"{self.name}.") for column in self.columns}
        if name := next((name for name in expression.names if name in own), None):
            raise UserError(
                f"{REPRESENTATIVE_KEY}: {name} is a column of {self.name} itself, which is made by this: write others"
            )
        return expression

    @cached_property
    def reads(self) -> tuple[Reads, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The hashes, and what the representative is chosen by."""
        folders = dict.fromkeys(filter(None, map(self._folder_of, self._representative.names)))
        return (*self._inputs, *(Reads(folder=folder, columns=(), keeps_rejected=True) for folder in folders))

    @property
    def _inputs(self) -> tuple[Reads, ...]:
        return (HASHES,) if self._config.embedding is None else (HASHES, EMBEDDINGS)

    def settings(self) -> dict[str, Any]:
        """Return what counts as a duplicate, and which stands for its group."""
        return {
            "radius": self._config.radius,
            "crops": self._config.crops,
            "mirror": self._config.mirror,
            "representative": self._representative.text,
            "embedding": self._config.embedding,
            "runs": list(self._config.runs),
            "grouping_version": GROUPING_VERSION,
        }

    def require(self) -> None:
        """Find out that another run lacks hashes, or that the representative is chosen by no number."""
        self._other_runs()
        known = {name: kind for names in self._given.values() for name, kind in names.items()}
        there = SampleColumns(self._run).schema()
        self._representative.check(pa.schema({field.name: field.type for field in there} | known), "number")

    def source(self) -> str:
        """Return the hashes of the files of other runs."""
        names = self._representative.names
        found = []
        for run, manifest in self._other_runs().items():
            columns = SampleColumns(Path(run))
            columns.check(self._representative, "number", shards=manifest.shards)
            files = input_hashes(Path(run), self._inputs, list(manifest.shards), score=self.name)
            found.append((run, files, {shard: columns.hashes(shard, names) for shard in files} if names else {}))
        return json.dumps(found, sort_keys=True) if found else ""

    def measure_run(
        self, shards: Sequence[str], read: Callable[[str], pa.Table], scratch: Path
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the columns of each shard; see `RunScore.measure_run`."""
        looking = Looking(
            radius=self._config.radius,
            crops=self._config.crops,
            mirror=self._config.mirror,
            embedding=self._config.embedding,
        )
        parts = [part for number, run in enumerate(self._other_runs()) for part in self._parts_of_other(run, number)]
        num_others = len(parts)
        parts += self._parts(SampleColumns(self._run), shards, read, prefix="", number=len(self._config.runs))
        samples = gather(parts, scratch, crops=looking.crops, mirror=looking.mirror, num_threads=num_cores())
        groups = find_duplicates(samples, looking, num_threads=num_cores())
        own = slice(int(samples.starts[num_others]), None)
        _say(groups.kind[own], samples.num_unknown, self._representative)
        has_followers = np.zeros(len(groups.leader), bool)
        has_followers[groups.leader[groups.kind > 0]] = True
        for start, stop in zip(samples.starts[num_others:-1], samples.starts[num_others + 1 :], strict=True):
            yield _columns(samples, groups, has_followers, range(start, stop))

    @cached_property
    def _given(self) -> dict[str, dict[str, pa.DataType]]:
        """What scores of this recipe will give, by their folders: names, as they are written, with their types."""
        found: dict[str, dict[str, pa.DataType]] = {}
        for score in self._others:
            base, _, caption = score.name.partition("@")
            if base == "clip":  # embeddings are no numbers, and their width is the model's
                continue
            prefix = f"{caption}." if caption and caption != MAIN_CAPTION else ""
            names = {f"{prefix}{start}{each.name}": each.type for start in ("", f"{base}.") for each in score.columns}
            found[f"columns/{score.name}"] = names
        return found

    def _folder_of(self, name: str) -> str | None:
        """Return the folder that a name is a column of; None where it is of none."""
        for folder, names in self._given.items():
            if name in names:
                return folder
        for folder in SampleColumns(self._run).folders:
            prefix = "" if folder.caption == MAIN_CAPTION else f"{folder.caption}."
            starts = ("", f"{folder.score}.") if folder.score else ("",)
            if any(name == f"{prefix}{start}{column}" for start in starts for column in folder.columns):
                return folder.name
        return None

    def _other_runs(self) -> dict[str, Manifest]:
        """Return the manifests of the hashes of other runs.

        Raises:
            UserError: a run has none, or of another version, or it is this run, or names it; says what to do.
        """
        found = {}
        for run in self._config.runs:
            folder = Path(run) / HASHES.folder
            if Path(run).resolve() == self._run.resolve():
                raise UserError(f"{RUNS_KEY}: {run} is this run, whose samples count anyway; leave it out")
            self._refuse_both_ways(run)
            if not manifest_path(folder).is_file():
                raise UserError(f"{RUNS_KEY}: there is no finished {folder}: {score_command('hashes', run)} makes it")
            found[run] = read_manifest(folder)
            version = found[run].extra["score"]["version"]
            if version != HASHING_VERSION:
                raise UserError(
                    f"{RUNS_KEY}: {folder} is of version {version} of the hashes, and these are of version "
                    f"{HASHING_VERSION}: {score_command('hashes', run)} makes it anew"
                )
            if EMBEDDINGS in self._inputs:
                self._require_same_clip(run)
        return found

    def _refuse_both_ways(self, run: str) -> None:
        theirs = Path(run) / COLUMNS / self.name
        runs = read_manifest(theirs).fingerprint.fields["runs"] if manifest_path(theirs).is_file() else ()
        if self._run.resolve() in {Path(each).resolve() for each in runs}:
            raise UserError(
                f"{RUNS_KEY}: {run} itself counts this run's samples as its duplicates, and only one of two may name "
                "the other, else what both have is chosen of neither: leave it out here, or there"
            )

    def _require_same_clip(self, run: str) -> None:
        folder = Path(run) / EMBEDDINGS.folder
        command = score_command("clip", run)
        if not manifest_path(folder).is_file():
            raise UserError(f"{RUNS_KEY}: there is no finished {folder}: {command} makes it")
        theirs, ours = read_manifest(folder).fingerprint.fields["clip_model"], self._clip.source.identity
        if theirs != ours:
            raise UserError(f"{RUNS_KEY}: {folder} is of {theirs}, and {CLIP_KEY} is {ours}: {command} makes it anew")

    def _parts_of_other(self, run: str, number: int) -> list[Part]:
        shards = sorted(read_manifest(Path(run) / HASHES.folder).shards)

        def read(shard: str) -> pa.Table:
            table, reasons = read_inputs(Path(run), self._inputs, shard)
            return table.filter(pa.array([reason is None for reason in reasons], pa.bool_()))

        return self._parts(SampleColumns(Path(run)), shards, read, prefix=f"{run}:", number=number)

    def _parts(
        self,
        columns: SampleColumns,
        shards: Sequence[str],
        read: Callable[[str], pa.Table],
        *,
        prefix: str,
        number: int,
    ) -> list[Part]:
        """Return the parts of a run.

        Raises:
            UserError: a column that the representative is chosen by is not there, or not for all shards.
        """
        columns.check(self._representative, "number", shards=shards)

        def preferences(shard: str, keys: pa.ChunkedArray) -> np.ndarray:
            table = columns.read(shard, self._representative.names)
            values = self._representative.evaluate(table).cast(pa.float64())
            places = pc.call_function("index_in", [keys], pc.SetLookupOptions(table["key"].combine_chunks()))
            return np.asarray(values.take(places).to_numpy(zero_copy_only=False), np.float64)

        return [
            Part(
                name=f"{prefix}{shard}/",
                run=number,
                read=lambda shard=shard: read(shard),
                preferences=lambda keys, shard=shard: preferences(shard, keys),
            )
            for shard in shards
        ]


def _columns(samples: Samples, groups: Groups, has_followers: np.ndarray, rows: range) -> Mapping[str, Any]:
    kinds = groups.kind[rows.start : rows.stop]
    leaders = [samples.name(int(groups.leader[row])) if groups.kind[row] else None for row in rows]
    of_group = [
        samples.name(row) if leader is None and has_followers[row] else leader
        for row, leader in zip(rows, leaders, strict=True)
    ]
    return {
        "duplicate": kinds > 0,
        "duplicate_of": leaders,
        "duplicate_kind": [KINDS[kind] for kind in kinds],
        "duplicate_group": of_group,
    }


def _say(kinds: np.ndarray, num_unknown: int, representative: Expression) -> None:
    counts = Counter(KINDS[kind] for kind in kinds[kinds > 0])
    told = ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS if counts[kind])
    log.info(f"duplicates: {counts.total():,} of {len(kinds):,} samples{f': {told}' if told else ''}")
    if num_unknown:
        log.warning(
            f"{representative.key}: {representative.text} is unknown of {num_unknown:,} samples, which stand for their "
            "groups last of all"
        )
