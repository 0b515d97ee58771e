"""`python -m features --recipe R --run RUN --stage S [--plan]`: captions and images of a table to features."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from encoders.devices import require_device
from encoders.weights import require_model
from errors import UserError
from features.completing import CompletingConfig, CompletingWorker
from features.families import wanted_families
from features.jobs import FamilyPlan, FeatureInputs, FeatureJob, read_inputs
from features.overflow import warn_of_overflow
from features.plan import plan_families, print_plan, require_space
from features.speed import remember_speed
from features.unreadable import warn_of_unreadable
from pipelines.columns.written_choices import write_choice
from pipelines.command import parse_command, run_command
from pipelines.engine.pieces import PARTS_FOLDER
from pipelines.engine.preflight import require_packages, require_workers
from pipelines.engine.progress import get_logger
from pipelines.engine.run import run_over_shards
from pipelines.engine.set_aside import EARLIER_FOLDER
from pipelines.store.manifest import Manifest
from pipelines.store.summary import update_summary

log = get_logger("features")


def main() -> None:
    """Compute the features one stage trains on, or print what that would take."""
    start_seconds = time.monotonic()
    command = parse_command(
        "features", "Captions and images to T5 and VAE features.", has_stages=True, stage_table="features"
    )
    inputs = read_inputs(command)
    if command.is_plan:
        plans = print_plan(inputs)
        # What it reads may not be there yet, and is said to be missing.
        jobs = [plan.job for plan in plans if plan.job is not None]
        _require_models(jobs, inputs)
        _require_room(jobs, plans, inputs)
        return
    jobs = [family.job(inputs) for family in wanted_families(inputs)]
    is_done = [job.is_done() for job in jobs]
    if not all(is_done):
        # Before the plan, which takes a codec that is not here for the paper's.
        _require_models(jobs, inputs)
        _require_room(jobs, plan_families(inputs), inputs)
    if inputs.choice is not None:
        # Refused where it keeps nothing, and then not remembered.
        write_choice(inputs.choice, [source.name for source in inputs.raw])
    command.remember()
    manifests = {job.family.name: run_job(job, inputs) for job in jobs}
    if not all(is_done):
        _summarize(inputs, jobs, manifests, seconds=time.monotonic() - start_seconds)


def _require_models(jobs: Sequence[FeatureJob], inputs: FeatureInputs) -> None:
    """Find out before any work starts, and for a plan, that a model is missing."""
    for job in jobs:
        if not job.is_done():
            rounding = ["torchao"] if inputs.features.text_weight_dtype == "int8" else []
            require_packages("torch", "transformers", "diffusers", *rounding)
            if job.model is not None:
                require_model(job.model, key=job.model_key)


def _require_room(jobs: Sequence[FeatureJob], plans: Sequence[FamilyPlan], inputs: FeatureInputs) -> None:
    """Find out the same of what else stands in the way.

    Raises:
        UserError: what is read has changed, or the disk, the device or the workers do not suffice.
    """
    for job in jobs:
        if job.is_done():
            continue
        job.family.check(job, inputs)
        num_pending = job.wanted.count_left()
        if num_pending and job.family.encodes:
            require_device(inputs.features.device, key="features.device")
        inputs_of_job = _without_gpus(job, inputs)
        require_workers(inputs_of_job.engine, num_pending=num_pending, few_samples=inputs_of_job.few_samples)
    require_space(plans, run=inputs.run, stage_name=inputs.stage_name)


def _without_gpus(job: FeatureJob, inputs: FeatureInputs) -> FeatureInputs:
    """Return the inputs of a job, whose workers reserve no GPU where they only import."""
    if job.family.encodes:
        return inputs
    return replace(inputs, engine=inputs.engine.model_copy(update={"gpus_per_worker": 0.0}))


def run_job(job: FeatureJob, inputs: FeatureInputs) -> Manifest:
    """Compute what is pending of one family and return the directory's manifest."""
    inputs = _without_gpus(job, inputs)
    changes = job.changed_settings()
    job.family.prepare(job, inputs)
    is_done = job.is_done()
    num_pending = job.wanted.count_left()
    is_resumed = (job.output.path / PARTS_FOLDER).is_dir()
    start_seconds = time.monotonic()
    try:
        manifest = _complete(job, inputs, is_done=is_done, changes=changes)
    except UserError:
        # Too many rejects, perhaps, and these are why.
        warn_of_overflow(job)
        warn_of_unreadable(job, inputs)
        raise
    # Of a resumed run it is not known here how much an earlier one had done.
    if num_pending and not is_resumed:
        remember_speed(job, inputs, num_samples=num_pending, seconds=time.monotonic() - start_seconds)
    if not is_done:
        warn_of_overflow(job)
        warn_of_unreadable(job, inputs)
        job.family.report(job, manifest, inputs)
    return manifest


def _complete(job: FeatureJob, inputs: FeatureInputs, *, is_done: bool, changes: Sequence[str]) -> Manifest:
    """Compute what is not there, and of finished shards what they lack of the samples that are wanted."""
    wanted = job.wanted
    wanted.clear()
    if num_aside := wanted.set_aside():
        log.info(f"{job.output.path}: {num_aside:,} shards are completed; what they have is kept as it is")
    worker_class, worker_config = job.worker_class, job.worker_config
    if not is_done and (inputs.choice is not None or (job.output.path / EARLIER_FOLDER).is_dir()):
        worker_class, worker_config = CompletingWorker, _completing_config(job, inputs)
    manifest = run_over_shards(
        worker_class,
        worker_config,
        sources=job.sources,
        output=job.output,
        fingerprint=job.fingerprint,
        engine=inputs.engine,
        max_reject_fraction=inputs.features.max_reject_fraction,
        room=f"features {job.family.name}",
        few_samples=inputs.few_samples,
        memory_settings=job.memory_settings,
        upstream=job.upstream,
        extra={} if is_done else job.family.manifest_extra(job, inputs),
        changes=changes,
    )
    wanted.clear()
    # An interrupted run has left parts of a shard that were made for a narrower choice.
    return _complete(job, inputs, is_done=False, changes=()) if wanted.find_incomplete() else manifest


def _completing_config(job: FeatureJob, inputs: FeatureInputs) -> CompletingConfig:
    choice = inputs.choice
    return CompletingConfig(
        worker_class=job.worker_class,
        worker=job.worker_config,
        family=job.family.schema(job, inputs),
        choice=None if choice is None else choice.settings.directory(choice.run).absolute(),
        earlier=(job.output.path / EARLIER_FOLDER).absolute(),
    )


def _summarize(
    inputs: FeatureInputs, jobs: list[FeatureJob], manifests: dict[str, Manifest], *, seconds: float
) -> None:
    counts: dict[str, Any] = {}
    for job in jobs:
        reports = [manifests[job.family.name].shards[source.name] for source in job.sources]
        rejected = sum((Counter(report.rejected) for report in reports), Counter())
        counts[job.family.name] = {
            "read": sum(report.num_read for report in reports),
            "kept": sum(report.num_kept for report in reports),
            "rejected": dict(sorted(rejected.items())),
        }
    update_summary(inputs.run, f"seconds.features.{inputs.stage_name}", round(seconds, 1))
    update_summary(inputs.run, f"counts.features.{inputs.stage_name}", counts)
    parts = ", ".join(f"{count['kept']:,} of {count['read']:,} {family}" for family, count in counts.items())
    log.info(f"{inputs.stage_name}: {parts} in {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(run_command("features", main))
