"""Cutting: make a pass of cut captions, say what it did, or say in the plan what it would do."""

import time
from collections import Counter

from captioning.cuts.job import CutJob, WaitingForClaimsError
from captioning.cuts.worker import CutWorker
from captioning.table import judge_directory_again
from errors import UserError
from pipelines.engine.progress import console, get_logger
from pipelines.engine.run import run_over_shards
from pipelines.store.files import exclusive
from pipelines.store.manifest import Manifest
from pipelines.store.summary import update_summary

# So many captions are cut in the time in which Ray's workers would have started.
FEW_SAMPLES = 20_000

log = get_logger("captioning")


def make_cut(job: CutJob, *, is_asked_for: bool) -> bool:
    """Cut what is pending; returns False of a pass that waits for claims, which is said and leaves it as it is.

    Raises:
        WaitingForClaimsError: it waits, and `is_asked_for` by its name.
    """
    start_seconds = time.monotonic()
    try:
        job.sources()
    except WaitingForClaimsError as waiting:
        if is_asked_for:
            raise
        log.warning(f"{job.column} is not made yet: {waiting}")
        return False
    is_done = job.is_done()
    if not job.is_judged():
        with exclusive(job.output.path):
            judge_directory_again(job.output, fingerprint=job.fingerprint, quality=job.config.quality)
    manifest = run_over_shards(
        CutWorker,
        job.worker_config(),
        sources=job.sources(),
        output=job.output,
        fingerprint=job.fingerprint,
        engine=job.workers,
        max_reject_fraction=0.0,
        room=f"captioning {job.column}",
        few_samples=FEW_SAMPLES,
        extra=job.extra,
        changes=job.changes(),
    )
    if not is_done:
        _say(job, manifest, seconds=time.monotonic() - start_seconds)
    return True


def print_cut(job: CutJob) -> None:
    """Print what cutting would take."""
    config = job.config
    bounds = {name: getattr(config, name) for name in ("max_sentences", "max_words", "max_tokens")}
    rule = ", ".join(f"{name} {value:,}" for name, value in bounds.items() if value is not None)
    rule = ", ".join(filter(None, ("supported sentences" if config.supported else "", rule)))
    try:
        todo, total = (sum(each.num_samples for each in found) for found in (job.pending(), job.sources()))
        count = f"{todo:,} of {total:,} samples to do"
    except UserError as missing:
        count = f"waits: {missing}"
    line = f"{job.output.path}: cut of {config.of}, without a model: {rule}; {count}"
    console.print(line, markup=False, soft_wrap=True)


def _say(job: CutJob, manifest: Manifest, *, seconds: float) -> None:
    reports = [manifest.shards[source.name] for source in job.sources()]
    counts, rejected = Counter[str](), Counter[str]()
    for report in reports:
        counts.update(report.details)
        rejected.update(report.rejected)
    num_read, num_kept = (sum(getattr(each, name) for each in reports) for name in ("num_read", "num_kept"))
    update_summary(job.run, f"seconds.captioning@{job.column}", round(seconds, 1))
    found = {"read": num_read, "kept": num_kept, "rejected": dict(sorted(rejected.items()))}
    update_summary(job.run, f"counts.captioning@{job.column}", found)
    log.info(
        f"{job.column}: {num_kept:,} captions cut of {job.config.of} in {seconds:.0f} s: "
        f"{counts['num_sentences_kept']:,} of {counts['num_sentences']:,} sentences, of "
        f"{counts['num_captions_cut']:,} captions some left out"
    )
    if count := counts["num_nothing_left"]:
        log.info(f"{job.column}: of {count:,} captions no sentence is left: they are empty, with that flag")
