"""`python -m captioning.claims --recipe R --run RUN [--plan]`: claims of captions, asked back about their images."""

import sys
import time
from collections import Counter
from typing import Any

from captioning.claims.job import ClaimsJob, read_jobs
from captioning.claims.plan import print_plan
from captioning.claims.sources import score_of
from captioning.claims.worker import ClaimWorker
from captioning.preflight import require_models
from encoders.devices import require_device
from pipelines.command import parse_command, run_command
from pipelines.engine.preflight import require_workers
from pipelines.engine.progress import get_logger
from pipelines.engine.run import run_over_shards
from pipelines.run_memory import remember_found
from pipelines.store.manifest import Manifest
from pipelines.store.summary import update_summary

log = get_logger("claims")

# Claims of so many captions are asked in the time in which Ray's workers would have started.
FEW_SAMPLES = 500
FEW_SAMPLES_OF_SERVER = 100


def main() -> None:
    """Ask about the captions of the recipe's shards, or print what that would take."""
    command = parse_command("captioning.claims", "Captions to claims, asked back of the model that sees the images.")
    jobs = read_jobs(command)
    if command.is_plan:
        print_plan(jobs)
    pending = [job for job in jobs if not job.is_done()]
    if pending:
        _require_means(pending, is_plan=command.is_plan)
    if command.is_plan:
        return
    command.remember()
    remember_found(command.run, [source.path for source in jobs[0].sources])
    for job in jobs:
        start_seconds = time.monotonic()
        is_done = job.is_done()
        manifest = _ask(job)
        if not is_done:
            _say(job, manifest, seconds=time.monotonic() - start_seconds)


def _require_means(jobs: list[ClaimsJob], *, is_plan: bool) -> None:
    """Find out before any work starts, and for a plan, that a model, a server, a device or workers are missing."""
    job = jobs[0]
    table = "captioning" if job.config.claims.model is None else "captioning.claims"
    require_models(job.config, job.model, api_key=job.worker_config.api_key, is_plan=is_plan, table=table)
    if job.config.engine != "openai":
        require_device(job.config.device, key="captioning.device")
    num_pending = max(sum(source.num_samples for source in job.pending()) for job in jobs)
    require_workers(job.workers, num_pending=num_pending, few_samples=_few_samples(job))


def _few_samples(job: ClaimsJob) -> int:
    """Return how many samples are small work; with GPUs none are: the work is theirs."""
    if job.config.engine == "openai":
        return FEW_SAMPLES_OF_SERVER
    return 0 if job.workers.gpus_per_worker else FEW_SAMPLES


def _ask(job: ClaimsJob) -> Manifest:
    return run_over_shards(
        ClaimWorker,
        job.worker_config,
        sources=job.sources,
        output=job.output,
        fingerprint=job.fingerprint,
        engine=job.workers,
        max_reject_fraction=job.config.max_reject_fraction,
        room="claims",
        few_samples=_few_samples(job),
        memory_settings={
            "captioning.claims.batch_size": job.config.claims.batch_size,
            "captioning.num_decode_threads": job.config.num_decode_threads,
            "data.max_pixels": job.data.max_pixels,
        },
        upstream=job.upstream,
        extra=job.extra,
        changes=job.output.changes(job.fingerprint, defaults=job.config.claims.fingerprint_defaults()),
    )


def _say(job: ClaimsJob, manifest: Manifest, *, seconds: float) -> None:
    """Say what was found, and note it in the summary."""
    reports = [manifest.shards[source.name] for source in job.sources]
    details = sum((Counter(report.details) for report in reports), Counter())
    num_claims, num_unknown = details["num_claims"], details["num_unknown_claims"]
    num_known = num_claims - num_unknown
    found: dict[str, Any] = {
        "captions": sum(report.num_kept for report in reports),
        "captions_without_claims": details["num_captions_without_claims"],
        "claims": num_claims,
        "unknown": num_unknown,
        "unsupported": details["num_unsupported_claims"],
        "unsupported_share": round(details["num_unsupported_claims"] / num_known, 4) if num_known else None,
    }
    update_summary(job.run, f"claims.{job.column.name}", found)
    update_summary(job.run, f"seconds.{score_of(job.column)}", round(seconds, 1))
    share = f"{found['unsupported']:,} unsupported ({found['unsupported_share']:.1%})" if num_known else "none answered"
    log.info(
        f"{job.column.name}: {num_claims:,} claims of {found['captions']:,} captions in {seconds:.0f} s, {share}"
        f"{f', {num_unknown:,} unknown: neither yes nor no' if num_unknown else ''}"
        f"{f'; {empty:,} captions claim nothing' if (empty := found['captions_without_claims']) else ''}"
    )


if __name__ == "__main__":
    sys.exit(run_command("claims", main))
