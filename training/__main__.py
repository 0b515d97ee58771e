"""`python -m training --recipe R --run RUN --stage N [--phase P] [--plan]`: train one stage of the paper."""

import sys
import time

from pipelines.command import parse_command, run_command
from pipelines.progress import get_logger
from pipelines.summary import update_summary
from training.config import STAGES
from training.gate import print_gate, samples_of
from training.launch import run_ranks
from training.preflight import Preflight, inspect_stage, print_plan, print_weights
from training.stage import StageJob, open_stage

log = get_logger("training")


def main() -> None:
    """Check a stage, say what it will do, and run its ranks; a finished stage is left alone."""
    start_seconds = time.monotonic()
    command = parse_command("training", "Features to checkpoints: one of the paper's three stages.", stages=STAGES)
    job = open_stage(command)
    resume = job.resume
    if resume is not None and resume.step >= job.settings.num_steps and not command.is_plan:
        log.info(f"nothing to do: {command.stage_name} has done its {resume.step:,} steps, see {resume.path}")
        return
    preflight = inspect_stage(job)
    former = job.start.checkpoint
    if former is not None and resume is None:
        print_gate(former, samples=samples_of(former))
    print_plan(job, preflight)
    if command.is_plan:
        _print_weights(job, preflight)
        return
    is_finished = run_ranks(
        sys.argv[1:],
        num_ranks=preflight.num_ranks,
        threads_per_rank=preflight.threads_per_rank,
        directory=job.directory,
    )
    former_seconds = resume.trainer["elapsed_seconds"] if resume is not None else 0.0
    _report(job, preflight, is_finished=is_finished, seconds=former_seconds + time.monotonic() - start_seconds)


def _print_weights(job: StageJob, preflight: Preflight) -> None:
    from training.networks import blank_network, count_parameters, network_config

    network = blank_network(network_config(job, preflight.survey))
    print_weights(job, num_parameters=count_parameters(network), num_ranks=preflight.num_ranks)


def _report(job: StageJob, preflight: Preflight, *, is_finished: bool, seconds: float) -> None:
    checkpoint = job.resume
    assert checkpoint is not None, "ranks that end well leave a checkpoint"
    if not is_finished:
        log.info(f"stopped after step {checkpoint.step:,}, saved in {checkpoint.path}; the same command continues")
        return
    name = job.command.stage_name
    counts = {
        "samples": preflight.num_samples,
        "steps": checkpoint.step,
        "samples_seen": checkpoint.trainer["num_samples_seen"],
        "skipped_steps": checkpoint.trainer["skipped_steps"],
    }
    update_summary(job.command.run, f"seconds.training.{name}", round(seconds, 1))
    update_summary(job.command.run, f"counts.training.{name}", counts)
    log.info(f"{name}: {checkpoint.step:,} steps in {seconds:.0f} s, EMA weights in {checkpoint.path / 'model'}")
    print_gate(checkpoint, samples=samples_of(checkpoint))


if __name__ == "__main__":
    sys.exit(run_command("training", main))
