"""Making columns: what passes over images have left, passes over what is pending, then scores from tables."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curation.dealing import ImagePass, deal_out, deal_out_pass, drop_passes, open_pass
from curation.image_pass import ImagePassConfig, ImagePassWorker
from curation.job import ColumnsJob
from curation.run_scores import make_run_score, run_sources
from curation.scores.protocol import ImageScore, RunScore, Score, TableScore
from curation.table_rows import input_hashes
from curation.table_worker import TableWorker, TableWorkerConfig
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.engine.rejects import require_few_rejects
from pipelines.engine.run import run_over_shards, say_done_anew
from pipelines.store.files import exclusive
from pipelines.store.manifest import Manifest, manifest_path, read_manifest

ROOM = "columns"

log = get_logger(ROOM)


@dataclass(frozen=True, kw_only=True)
class MadeColumns:
    """The manifest of each score by its name, and how many shards of some score were made."""

    manifests: dict[str, Manifest]
    num_new: int


def make_columns(job: ColumnsJob) -> MadeColumns:
    """Make what is pending of every score.

    Raises:
        TooManyRejectsError: a score has no columns for more samples than the recipe allows.
        QuarantinedShardError, MemoryShortageError: as `run_over_shards`.
        UserError: another command makes columns of the run, or a score lacks what it is made from.
    """
    manifests: dict[str, Manifest] = {}
    with exclusive(job.folder):
        sources_to_do = to_do(job)
        for score in job.scores:
            if sources_to_do[score.name]:
                score.require()
        num_new = sum(len(job.pending(score, job.sources)) for score in job.image_scores)
        _make_image_scores(job)
        for score in job.scores:
            sources = sources_of(job, score)
            num_new += 0 if isinstance(score, ImageScore) else len(job.pending(score, sources))
            if isinstance(score, TableScore):
                _make_table_score(job, score, sources)
            elif isinstance(score, RunScore):
                make_run_score(job, score, sources)
            manifests[score.name] = _finish(job, score, sources)
    return MadeColumns(manifests=manifests, num_new=num_new)


def to_do(job: ColumnsJob) -> dict[str, list[Source]]:
    """Return, by the name of each score, the shards it is pending for, and those that what it is made from is made for.

    Raises:
        UserError: a score lacks what it is made from, and no other score gives.
    """
    found: dict[str, list[Source]] = {}
    for score in job.scores:
        made = {reads.folder: found.get(reads.folder.removeprefix(f"{job.folder.name}/"), []) for reads in score.reads}
        fed = {source.name for sources in made.values() for source in sources}
        if fed:
            # What no score of this command makes must be there before hours are spent on what it makes.
            there = [reads for reads in score.reads if not made[reads.folder]]
            input_hashes(job.run, there, [source.name for source in job.sources], score=score.name)
        if fed and isinstance(score, RunScore):
            fed = {source.name for source in job.sources}
        others = replace(job, sources=[source for source in job.sources if source.name not in fed])
        pending = {each.name for each in job.pending(score, sources_of(others, score))} if others.sources else set()
        found[score.name] = [source for source in job.sources if source.name in fed | pending]
    return found


def sources_of(job: ColumnsJob, score: Score) -> list[Source]:
    """Return the shards as a score knows them; raises as `ColumnsJob.sources_of`."""
    return run_sources(job, score) if isinstance(score, RunScore) else job.sources_of(score)


def image_groups(job: ColumnsJob) -> list[tuple[list[ImageScore], list[Source]]]:
    """Return what passes over images are to be made: scores that are pending for the same shards, and those shards."""
    pending = {score.name: {each.name for each in job.pending(score, job.sources)} for score in job.image_scores}
    groups: dict[tuple[str, ...], list[Source]] = {}
    for source in job.sources:
        names = tuple(name for name, shards in pending.items() if source.name in shards)
        if names:
            groups.setdefault(names, []).append(source)
    return [
        ([score for score in job.image_scores if score.name in names], sources) for names, sources in groups.items()
    ]


def _make_image_scores(job: ColumnsJob) -> None:
    wanted = {score.name: job.fingerprint(score) for score in job.image_scores}
    for score in job.image_scores:
        if job.pending(score, job.sources):
            output = job.output(score)
            changes = output.changes(wanted[score.name], defaults={})
            say_done_anew(output, job.sources, wanted[score.name], changes=changes, room=ROOM)
    deal_out(job.folder, wanted)
    groups = image_groups(job)
    # A pass that goes on keeps the parts of shards that it has begun.
    drop_passes(job.folder, except_for=[open_pass(job.folder, scores, wanted).folder.path for scores, _ in groups])
    for scores, sources in groups:
        deal_out_pass(job.folder, _make_pass(job, scores, sources), wanted)
    drop_passes(job.folder)


def _make_pass(job: ColumnsJob, scores: Sequence[ImageScore], sources: Sequence[Source]) -> ImagePass:
    one = open_pass(job.folder, scores, {score.name: job.fingerprint(score) for score in scores})
    one.note()
    few_samples = min(score.few_samples for score in scores)
    num_samples = sum(source.num_samples for source in sources)
    log.info(
        f"{', '.join(score.name for score in scores)}: one pass over {num_samples:,} images of {len(sources):,} shards"
    )
    num_threads = job.num_threads(num_samples, few_samples=few_samples)
    run_over_shards(
        ImagePassWorker,
        ImagePassConfig(
            scores=tuple(scores),
            reading=job.data.reading,
            max_pixels=job.data.max_pixels,
            num_threads=num_threads,
            run=Path(job.run).absolute(),
        ),
        sources=sources,
        output=one.folder,
        fingerprint=one.fingerprint,
        engine=job.workers,
        # Asked of each score, once its files are where they belong.
        max_reject_fraction=1.0,
        room=ROOM,
        few_samples=few_samples,
        memory_settings={"data.max_pixels": job.data.max_pixels},
    )
    return one


def _make_table_score(job: ColumnsJob, score: TableScore, sources: Sequence[Source]) -> None:
    output, fingerprint = job.output(score), job.fingerprint(score)
    if job.pending(score, sources):
        run_over_shards(
            TableWorker,
            TableWorkerConfig(
                score=score,
                reading=job.data.reading,
                run=Path(job.run).absolute(),
                raw_identities={source.name: source.identity for source in job.sources},
            ),
            sources=sources,
            output=output,
            fingerprint=fingerprint,
            engine=job.workers,
            max_reject_fraction=1.0,
            room=ROOM,
            few_samples=score.few_samples,
            extra=_extra(score),
            changes=output.changes(fingerprint, defaults={}),
        )


def _extra(score: Score) -> dict[str, Any]:
    return {"score": score.describe()}


def _finish(job: ColumnsJob, score: Score, sources: Sequence[Source]) -> Manifest:
    """Return the manifest of a score whose shards are all done, written anew where it does not cover them."""
    output, fingerprint = job.output(score), job.fingerprint(score)
    manifest = read_manifest(output.path) if manifest_path(output.path).is_file() else None
    names = [source.name for source in sources]
    is_whole = (
        manifest is not None
        and manifest.fingerprint.digest == fingerprint.digest
        and manifest.extra == _extra(score)
        and set(names) <= manifest.shards.keys()
    )
    if manifest is None or not is_whole:
        with exclusive(output.path):
            manifest = output.write_manifest(fingerprint, names, upstream={}, extra=_extra(score))
    limit = job.config.max_reject_fraction
    require_few_rejects(output, sources, fingerprint, limit=limit, room=ROOM)
    return manifest
