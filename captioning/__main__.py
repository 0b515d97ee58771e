"""`python -m captioning --recipe R --run RUN [--set key=value] [--plan]`: raw shards to captions/<shard>.parquet."""

import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from captioning.cuts.making import make_cut, print_cut
from captioning.earlier import EARLIER_FOLDER, clear_earlier, forget_parts_with_rejects, set_aside
from captioning.given.addresses import MAIN_COLUMN
from captioning.given.coverage import check_coverage
from captioning.given.index import forget_indexes
from captioning.given.own_names import check_own_names, require_own_texts
from captioning.job import CaptioningJob
from captioning.pass_jobs import read_pass_jobs
from captioning.plan import OPEN_BATCH, print_plan
from captioning.preflight import require_models
from captioning.table import judge_directory_again
from captioning.worker import CaptionWorker
from encoders.devices import require_device
from encoders.tokens import TextCut
from pipelines.command import parse_command, run_command
from pipelines.engine.preflight import require_workers
from pipelines.engine.progress import get_logger
from pipelines.engine.run import run_over_shards
from pipelines.run_memory import remember_found
from pipelines.store.files import exclusive
from pipelines.store.manifest import Manifest
from pipelines.store.summary import update_summary

log = get_logger("captioning")

# The toy LLaVA captions so many in about eight seconds, in which Ray's workers would hardly have started. A server
# answers many at once, and more to more workers.
FEW_SAMPLES = 500
FEW_SAMPLES_OF_SERVER = 100
FEW_GIVEN_SAMPLES = 20_000


def main() -> None:
    """Caption the recipe's shards, in each of its passes, or print what that would take."""
    start_seconds = time.monotonic()
    command = parse_command("captioning", "Raw shards to dense captions.")
    jobs = read_pass_jobs(command)
    for job in jobs.captions:
        if command.is_plan:
            print_plan(job)
        if not job.is_done():
            _require_means(job, is_plan=command.is_plan)
            _require_texts(job)
    for cut in jobs.cuts:
        if command.is_plan:
            print_cut(cut)
        else:
            cut.require()
    if command.is_plan:
        return
    command.remember()
    raw = [*(source for job in jobs.captions for source in job.sources), *(raw for cut in jobs.cuts for raw in cut.raw)]
    remember_found(command.run, list(dict.fromkeys(source.path for source in raw)))
    if not jobs.named:
        given = [source for job in jobs.captions for source in job.given]
        forget_indexes(command.run, [source.index for source in given if source.index is not None])
    for job in jobs.captions:
        _make(job, start_seconds=start_seconds)
        start_seconds = time.monotonic()
    waiting: set[str] = set()
    for cut in jobs.cuts:
        if cut.config.of in waiting:
            log.warning(f"{cut.column} is not made yet: it is cut of {cut.config.of}, which waits")
            waiting.add(cut.column)
        elif not make_cut(cut, is_asked_for=cut.column in jobs.named):
            waiting.add(cut.column)


def _make(job: CaptioningJob, *, start_seconds: float) -> None:
    """Make the captions of a job, and say and note what they are."""
    is_done = job.is_done()
    manifest = caption_shards(job)
    if not is_done:
        seconds = time.monotonic() - start_seconds
        counts = _counts(job, manifest)
        update_summary(job.run, f"seconds.{job.figures}", round(seconds, 1))
        update_summary(job.run, f"counts.{job.figures}", counts)
        name = "" if job.column == MAIN_COLUMN else f"{job.column}: "
        log.info(
            f"{name}{counts['kept']:,} captions of {counts['read']:,} samples in {seconds:.0f} s{_describe(counts)}"
        )
        _say_cut(job, manifest)
        _say_missing(job, manifest)


def caption_shards(job: CaptioningJob) -> Manifest:
    """Caption what is pending, after judging anew what was judged under other thresholds."""
    if not job.is_judged():
        with exclusive(job.output.path):
            judged = judge_directory_again(job.output, fingerprint=job.fingerprint, quality=job.config.quality)
        if judged:
            log.info(f"captioning.quality or its judge has changed: judged {len(judged)} shards again, captioned none")
    changes = job.changed_settings()
    _set_aside(job)
    manifest = run_over_shards(
        CaptionWorker,
        job.worker_config,
        sources=job.sources,
        output=job.output,
        fingerprint=job.fingerprint,
        engine=job.workers,
        max_reject_fraction=job.config.max_reject_fraction,
        room=job.room,
        few_samples=_few_samples(job),
        memory_settings={
            f"{job.table_of('batch_size')}.batch_size": _batch_size(job),
            f"{job.table_of('max_new_tokens')}.max_new_tokens": job.config.max_new_tokens,
            f"{job.table_of('num_decode_threads')}.num_decode_threads": job.config.num_decode_threads,
            "data.max_pixels": job.data.max_pixels,
        },
        extra=job.extra,
        changes=changes,
    )
    _clear_earlier(job)
    return manifest


def _batch_size(job: CaptioningJob) -> int | str:
    """Return captions at a time as errors name them: one left open is one to lower, too. A server has its own."""
    if job.config.batch_size == 0 and job.config.engine in OPEN_BATCH:
        return f"0 ({OPEN_BATCH[job.config.engine]})"
    return job.config.batch_size


def _clear_earlier(job: CaptioningJob) -> None:
    if (job.output.path / EARLIER_FOLDER).is_dir():
        with exclusive(job.output.path):
            clear_earlier(job.output, job.sources, job.fingerprint)


def _few_samples(job: CaptioningJob) -> int:
    """Return how many samples are small work; with GPUs none are: the work is theirs, and they share it."""
    if job.config.engine == "openai":
        return FEW_SAMPLES_OF_SERVER
    if job.config.is_given and job.config.clip_model is None:
        return FEW_GIVEN_SAMPLES
    return 0 if job.workers.gpus_per_worker else FEW_SAMPLES


def _set_aside(job: CaptioningJob) -> None:
    _clear_earlier(job)
    if not job.config.retry_rejects and not job.to_complete():
        return
    with exclusive(job.output.path):
        # Asked under the lock: another command may have completed them.
        names = job.to_complete()
        set_aside(job.output, names, job.sources, job.fingerprint)
        if job.config.retry_rejects:
            forget_parts_with_rejects(job.output)
    if names:
        log.info(f"{len(names)} shards keep their captions: rejects are tried again, other limits and scores applied")


def _require_means(job: CaptioningJob, *, is_plan: bool) -> None:
    """Find out before any work starts, and for a plan, that a model, a server, a device or workers are missing."""
    table = job.table_of("model")
    require_models(job.config, job.model, api_key=job.worker_config.api_key, is_plan=is_plan, table=table)
    if job.config.engine not in ("openai", "given") or job.config.clip_model is not None:
        require_device(job.config.device, key=f"{job.table_of('device')}.device")
    num_pending = sum(source.num_samples for source in job.pending())
    require_workers(job.workers, num_pending=num_pending, few_samples=_few_samples(job))


def _require_texts(job: CaptioningJob) -> None:
    """Find out whether texts that are there and the samples fit each other."""
    num_texts = sum(job.num_texts.values())
    require_own_texts(job.given, job.sources, num_texts=num_texts, reading=job.data.reading, run=job.run)
    check_coverage(job.given, job.sources, reading=job.data.reading, run=job.run)
    check_own_names(job.given, job.sources, reading=job.data.reading, run=job.run)


def _counts(job: CaptioningJob, manifest: Manifest) -> dict[str, Any]:
    reports = [manifest.shards[source.name] for source in job.sources]
    rejected = sum((Counter(report.rejected) for report in reports), Counter())
    return {
        "read": sum(report.num_read for report in reports),
        "kept": sum(report.num_kept for report in reports),
        "rejected": dict(sorted(rejected.items())),
    }


def _say_cut(job: CaptioningJob, manifest: Manifest) -> None:
    """Say, and note in the summary, how much of the captions their CLIP scores are not about."""
    details = [manifest.shards[source.name].details for source in job.sources]
    details = [found for found in details if "clip_captions" in found]
    if job.config.clip_model is None or not details:
        return
    cut = TextCut(
        max_tokens=max(found["max_clip_tokens"] for found in details),
        num_texts=sum(found["clip_captions"] for found in details),
        num_cut=sum(found["clip_captions_cut"] for found in details),
        num_tokens=sum(found["clip_tokens"] for found in details),
        num_tokens_cut=sum(found["clip_tokens_cut"] for found in details),
    )
    log.info(f"CLIP scores: {cut.describe(noun='captions', model='this CLIP')}")
    update_summary(job.run, f"{job.figures}.clip_score_captions", asdict(cut))


def _say_missing(job: CaptioningJob, manifest: Manifest) -> None:
    """Say of how many samples a column of given captions has no text, and how many alt texts nobody can read."""
    details = [manifest.shards[source.name].details for source in job.sources]
    for source in job.given:
        if count := sum(found.get(f"num_without_{source.name}", 0) for found in details):
            name = job.column if source.name == MAIN_COLUMN else source.name
            log.info(f"column {name}: {count:,} of the samples with a caption have no text here")
    if count := sum(found.get("num_unreadable_alt_texts", 0) for found in details):
        log.warning(f"{count:,} texts beside images are no UTF-8 or no JSON: `alt_text` is null there")


def _describe(counts: dict[str, Any]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts["rejected"].items())
    return f"; rejected: {reasons}" if reasons else ""


if __name__ == "__main__":
    sys.exit(run_command("captioning", main))
