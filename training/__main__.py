"""`python -m training --recipe R --run RUN --stage S [--plan]`: train one stage of the recipe."""

import sys
import time
from collections.abc import Callable

from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.command import Command, parse_command, run_command
from pipelines.engine.preflight import require_packages
from pipelines.engine.progress import get_logger
from pipelines.store.checkpoints import find_checkpoint, require_free_names
from pipelines.store.summary import update_summary
from training.launch.disk_needs import require_disk
from training.launch.hosts import run_hosts
from training.launch.meeting import NOTHING_TO_DO, START, FirstTask, ask_first_task
from training.launch.memory import memory_advice
from training.launch.placement import Host, Placement, is_slurm_task, of_slurm_task, on_this_machine, read_hostfile
from training.launch.preflight import (
    Preflight,
    inspect_stage,
    print_plan,
    print_weights,
    say_changes,
)
from training.launch.ranks import LostContactError, run_ranks
from training.previews.texts import encode_prompts
from training.stages.gate import print_gate, samples_of
from training.stages.stage import TrainingJob, open_stage

log = get_logger("training")


def main() -> None:
    """Check a stage, say what it will do, and run its ranks; a finished stage is left alone."""
    if not is_slurm_task():
        lead(announce=lambda: None)
    elif (task := of_slurm_task()).has_first:
        with FirstTask(task) as first:
            lead(announce=lambda: first.say(START))
    else:
        follow(task)


def lead(*, announce: Callable[[], None]) -> None:
    """Check the stage and run it, or the part that is here; `announce` is called when nothing is left to refuse."""
    start_seconds = time.monotonic()
    command = _command()
    require_packages("torch", "deepspeed", "diffusers")
    command.require_typed_shards()
    job = open_stage(command)
    for checkpoint in (job.resume, job.start.checkpoint, *(weights.checkpoint for weights in job.networks.values())):
        if checkpoint is not None and checkpoint.note is not None:
            log.warning(checkpoint.note)
    if job.settings.has_adapters:
        require_packages("peft")
    ranks = _where(job)
    resume = job.resume
    if resume is not None and resume.step >= job.settings.num_steps:
        done = f"nothing to do: {command.stage_name} has done its {resume.step:,} steps, see {resume.path}"
        log.info(f"{done}; to go on, raise training.{command.stage_name}.num_steps = {job.settings.num_steps:,}")
        return
    num_ranks = ranks.world_size if isinstance(ranks, Placement) else sum(host.slots for host in ranks)
    require_free_names(job.directory, after_step=0 if resume is None else resume.step)
    preflight = inspect_stage(job, num_ranks)
    former = job.start.checkpoint
    if former is not None and resume is None:
        print_gate(former, samples=samples_of(former))
    print_plan(job, preflight)
    if command.is_plan:
        num_sharing = ranks.ranks_on_machine if isinstance(ranks, Placement) else max(host.slots for host in ranks)
        _plan_networks(job, preflight, num_sharing=num_sharing)
        return
    command.remember()
    if preflight.previews is not None and not preflight.previews.labels:
        encode_prompts(job)
    _run(job, ranks, announce=announce)
    former_seconds = resume.trainer["elapsed_seconds"] if resume is not None else 0.0
    _report(job, preflight, seconds=former_seconds + time.monotonic() - start_seconds)


def follow(task: Placement) -> None:
    """Run the rank of a task whose first one speaks for all; ends with 2 where that one says why."""
    answer = ask_first_task(task)
    if answer == START:
        try:
            # The first task has looked at the checkpoints' files.
            _run(open_stage(_command(is_silent=True), checks_files=False), task, announce=lambda: None)
        except LostContactError:
            sys.exit(2)
    elif answer != NOTHING_TO_DO:
        sys.exit(2)


def _command(*, is_silent: bool = False) -> Command:
    return parse_command(
        "training", "Features to checkpoints: one stage of the recipe.", has_stages=True, is_silent=is_silent
    )


def _where(job: TrainingJob) -> Placement | list[Host]:
    """Return the ranks that this process starts, or the hosts that it leads."""
    settings = job.settings
    if is_slurm_task():
        if settings.hostfile is not None:
            raise UserError(f"training.hostfile {settings.hostfile} is set in tasks of Slurm; use one of the two")
        return of_slurm_task()
    return (
        on_this_machine(settings.num_processes)
        if settings.hostfile is None
        else read_hostfile(typed_path(settings.hostfile))
    )


def _run(job: TrainingJob, ranks: Placement | list[Host], *, announce: Callable[[], None]) -> None:
    settings = job.settings
    if isinstance(ranks, Placement):
        run_ranks(
            job.command.words,
            placement=ranks,
            threads_per_process=settings.threads_per_process,
            directory=job.directory,
            announce=announce,
            memory_advice=memory_advice(settings),
        )
    else:
        run_hosts(job.command.words, hosts=ranks, remote_shell=settings.remote_shell)


def _plan_networks(job: TrainingJob, preflight: Preflight, *, num_sharing: int) -> None:
    """Open what the ranks would open, say what they would say, and refuse what they would refuse.

    `num_sharing` ranks share a machine's memory.
    """
    import torch

    from training.launch.start import available_bytes, card_bytes, open_start, settle, settled
    from training.loop.validation import open_validation
    from training.loop.zero import local_device
    from training.objectives.choice import choose_objective
    from training.stages.networks import parameter_counts

    num_ranks, has_gpu = preflight.num_ranks, torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    if has_gpu:
        local_device(num_sharing - 1, torch.cuda.device_count(), is_slurm=is_slurm_task())
    start = open_start(job, preflight.survey, choose=choose_objective, device=device)
    open_validation(job)
    gigabytes = job.settings.device_gigabytes
    if gigabytes is not None and not has_gpu:
        room_bytes = card_bytes(gigabytes)
    else:
        room_bytes = available_bytes(start, job.settings, device=device, num_sharing=num_sharing, num_loaded=1)
    shares = settle(
        job,
        start,
        preflight.survey,
        choose=choose_objective,
        num_ranks=num_ranks,
        room_bytes=room_bytes,
        device=device,
        is_host=not has_gpu and gigabytes is None,
    )
    job_settled = settled(job, shares.num_micro_batches, shares.kept)
    say_changes(job_settled, num_ranks=num_ranks)
    counts = parameter_counts(start.config)
    print_weights(job, start.weights, shares, parameter_counts=counts, num_ranks=num_ranks)
    require_disk(job_settled, start.weights)


def _report(job: TrainingJob, preflight: Preflight, *, seconds: float) -> None:
    checkpoint = find_checkpoint(job.directory)
    assert checkpoint is not None, "ranks that end well leave a checkpoint"
    if not checkpoint.is_finished:
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
    log.info(f"{name}: {checkpoint.step:,} steps in {seconds:.0f} s, EMA weights in {checkpoint.weights}")
    print_gate(checkpoint, samples=samples_of(checkpoint))


if __name__ == "__main__":
    sys.exit(run_command("training", main))
