"""One rank of a stage: `python -m training.launch.rank`, with the arguments of `python -m training`.

RANK, WORLD_SIZE and the like come from the environment.
A launcher starts those of its machine; `torchrun -m -- training.launch.rank` may, too.
"""

import dataclasses
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from encoders.weights import identity_of
from errors import MemoryShortageError, StorageError, UserError, describe_reason, is_out_of_memory, users_message
from pipelines.command import parse_command, run_command
from pipelines.store.bases import describe_base
from pipelines.store.checkpoints import AVERAGE_LENGTH, BASE, CONTROL, Checkpoint
from pipelines.store.files import atomic_write_bytes
from training.codec.previews import open_codec_previews
from training.codec.statistics import write_statistics
from training.codec_keys import CODEC
from training.data.batches import shared_survey, training_reader
from training.data.survey import Survey, chosen_digests
from training.data.transfer import Transfers
from training.launch.disk_needs import require_disk
from training.launch.memory import memory_advice
from training.launch.preflight import print_weights, require_even_batches, say_changes
from training.launch.ranks import ERROR_FOLDER, LOST_CONTACT
from training.launch.start import ObjectiveChoice, Start, available_bytes, open_start, settle, settled
from training.loop.compilation import require_compilable
from training.loop.flops import StepFlops
from training.loop.host import require_offload
from training.loop.kept_averages import drop_averages
from training.loop.log import open_log
from training.loop.loop import Session, train
from training.loop.networks import open_networks
from training.loop.products import require_products
from training.loop.progress import open_progress
from training.loop.validation import open_validation
from training.loop.zero import compute_dtype, initialize_ranks, rank_device
from training.objectives.choice import choose_objective
from training.objectives.objective import Objective
from training.previews.previews import open_previews
from training.stages.kinds import Network, TraineeConfig
from training.stages.networks import blank_copy, parameter_counts, trained_of
from training.stages.resume import CHOSEN_SAMPLES
from training.stages.stage import TrainingJob, open_stage

META = torch.device("meta")
# How libraries say that a GPU's memory was too small, where torch does not by its own error.
GPU_SIGNS = ("CUDA", "CUBLAS", "CUDNN")
# How gloo and NCCL say that the other end of a connection is gone.
LOST_SIGNS = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "remote process exited")


def main() -> None:
    """Train one stage on this rank."""
    command = parse_command("training.launch.rank", "One rank of a training stage.", has_stages=True)
    # One rank looks at the files of checkpoints for all; where a launcher has started it, that one has, too.
    job = open_stage(command, checks_files=os.environ["RANK"] == "0")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    # The launcher blocks it until there is somebody to listen.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    initialize_ranks()
    try:
        run_rank(job, stop)
        dist.barrier()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryShortageError(_describe_shortage(job, error)) from error
        if is_lost_contact(error):
            raise StorageError(LOST_CONTACT) from error
        if isinstance(error, dist.DistError):
            raise UserError(f"the ranks cannot talk to each other: {error}") from error
        raise
    dist.destroy_process_group()


def _describe_shortage(job: TrainingJob, error: BaseException) -> str:
    settings = job.settings
    # Ranks with a GPU need the machine's memory, too, for batches and checkpoints.
    is_of_gpu = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in GPU_SIGNS)
    memory = "the GPU's memory" if is_of_gpu else "the machine's memory"
    reason = describe_reason(error)
    return (
        f"{memory} does not suffice for training.{job.command.stage_name}{f' ({reason})' if reason else ''}: "
        f"{memory_advice(settings)}; the last checkpoint stays in force"
    )


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone; what that rank says is the message that matters."""
    return isinstance(error, dist.DistNetworkError) or any(sign in str(error) for sign in LOST_SIGNS)


def run_rank(job: TrainingJob, stop: threading.Event, *, choose: ObjectiveChoice = choose_objective) -> None:
    """Build networks and reader, resume if there is a checkpoint, and train for the objective that `choose` gives."""
    require_even_batches(job.settings, dist.get_world_size())
    require_compilable(job.settings)
    require_products(job.settings)
    require_offload(job.settings, num_ranks=dist.get_world_size())
    _require_same_resume(job.resume)
    survey = shared_survey(job)
    start = open_start(job, survey, choose=choose, device=rank_device())
    job = _settled(job, start, survey, choose=choose)
    require_disk(job, start.weights)
    flops = _step_flops(job, choose(job, META), start.networks, in_channels=survey.channels)
    # Before DeepSpeed and what is kept for the backward pass change it.
    blank = blank_copy(trained_of(start.networks, start.objective.networks))
    is_codec = job.settings.network == CODEC
    networks = open_networks(job, start.objective.networks, start.networks)
    with ExitStack() as stack:
        reader = stack.enter_context(training_reader(job, survey))
        progress = open_progress(job)
        if dist.get_rank() == 0:
            drop_averages(job.directory, after_step=progress.step)
        description = describe(job, survey, blank.config)
        session = Session(
            job=job,
            objective=start.objective,
            networks=networks,
            batches=iter(reader),
            transfers=Transfers(networks.model.device),
            progress=progress,
            log=open_log(job, progress, stack, description=description),
            flops=flops,
            validation=open_validation(job),
            previews=open_codec_previews(job, blank=blank) if is_codec else open_previews(job, survey, blank=blank),
            description=description,
            stop=stop,
            measure=partial(write_statistics, job, device=networks.model.device) if is_codec else None,
        )
        train(session)


def _settled(job: TrainingJob, start: Start, survey: Survey, *, choose: ObjectiveChoice) -> TrainingJob:
    """Return the job with micro-batches and activations that fit the memory of all ranks, as the first chooses them."""
    num_ranks, device = dist.get_world_size(), rank_device()
    # All have the networks in memory, and none more than that.
    dist.barrier()
    num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rooms: list[Any] = [None] * num_ranks
    own = available_bytes(start, job.settings, device=device, num_sharing=num_sharing, num_loaded=num_sharing)
    dist.all_gather_object(rooms, own)
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        shares = settle(
            job,
            start,
            survey,
            choose=choose,
            num_ranks=num_ranks,
            room_bytes=min(rooms),
            device=device,
            is_host=device.type != "cuda",
        )
        chosen = [(shares.num_micro_batches, shares.kept)]
        say_changes(settled(job, *chosen[0]), num_ranks=num_ranks)
        counts = parameter_counts(start.config)
        print_weights(job, start.weights, shares, parameter_counts=counts, num_ranks=num_ranks)
    dist.broadcast_object_list(chosen, src=0)
    return settled(job, *chosen[0])


def _step_flops(
    job: TrainingJob, objective: Objective, networks: Mapping[str, Network], *, in_channels: int
) -> StepFlops:
    """Return the counter of an objective's operations; the objective is for the meta device."""
    dtype, text = compute_dtype(job.settings), job.features.text_encoder
    blanks = {name: blank_copy(network).to(dtype) for name, network in networks.items()}
    return StepFlops(
        objective,
        blanks,
        in_channels=in_channels,
        text_width=None if text is None else text["d_text"],
        channels_beside=job.features.channels_beside,
        is_pixels=job.settings.network == CODEC,
        last_step=job.settings.num_steps - 1,
    )


def _require_same_resume(resume: Checkpoint | None) -> None:
    """Refuse a rank whose view of the storage is not that of rank 0: each looks the newest checkpoint up by itself."""
    mine = resume and resume.path.name
    of_first = [mine]
    dist.broadcast_object_list(of_first, src=0)
    if mine != of_first[0]:
        raise UserError(
            f"rank {dist.get_rank()} would continue from {mine or 'the start'}, but rank 0 from "
            f"{of_first[0] or 'the start'}: the storage of RUN does not show all machines the same yet; type it again"
        )


def describe(job: TrainingJob, survey: Survey, config: TraineeConfig) -> dict[str, Any]:
    """Return what `trainer.json` says about the stage, all that sampling and a resume need to know.

    `config` is of the network that is trained.
    """
    return {
        **_base(job, config),
        **_control(job),
        "stage": job.command.stage_name,
        "kind": job.settings.network,
        "objective": job.settings.objective,
        "weights": "ema",
        **({AVERAGE_LENGTH: job.settings.ema_lengths[0]} if job.settings.ema == "power" else {}),
        "starts_from": job.settings.starts_from,
        "num_steps": job.settings.num_steps,
        "steering": job.settings.steering,
        "keep_activations": job.settings.kept_activations,
        "num_ranks": dist.get_world_size(),
        "zero_stage": job.settings.zero_stage,
        "dtype": job.settings.dtype,
        "seed": job.settings.seed,
        "plan_fingerprint": job.fingerprint.digest,
        "fingerprint": job.fingerprint.fields,
        "feature_defaults": job.features.fingerprint_defaults(),
        **({CHOSEN_SAMPLES: chosen_digests(survey)} if survey.choices else {}),
        "resolution": job.features.resolution,
        "buckets": survey.buckets,
        "vae": job.features.vae,
        "text": job.features.text_encoder,
        "process": job.settings.process_spec,
        "interpolation_scale": job.settings.position_scale if job.settings.network == "pixart" else 1.0,
    }


def _base(job: TrainingJob, config: TraineeConfig) -> dict[str, Any]:
    """Return what adapters or a branch belong to, on the rank that writes it; nothing of whole networks."""
    if not job.settings.keeps_base or dist.get_rank() != 0:
        return {}
    path = job.start.path
    assert path is not None, "what trains beside weights has such to start from"
    identity, shape = identity_of(path), dataclasses.asdict(config)
    return {BASE: describe_base(path, job.start.adapters, run=job.command.run, identity=identity, shape=shape)}


def _control(job: TrainingJob) -> dict[str, Any]:
    """Return what leads a control branch: how its images are made; nothing where there is none."""
    directory = job.features.control
    if directory is None:
        return {}
    made = directory.fact(CONTROL)
    return {CONTROL: {"family": directory.family.name, **made, "num_copies": job.settings.control_copies}}


def _leave_with_parent() -> None:
    """End this rank at once when the launcher is killed: a second run must not find it still writing."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def run() -> int:
    """Run `main`; returns the exit status. Under the launcher a failing rank leaves its message in a file.

    And it leaves at once: NCCL would first wait for the other ranks, which wait for this one.
    """
    folder = os.environ.get(ERROR_FOLDER)
    if folder is None:
        return run_command("training", main)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        main()
        return 0
    except Exception as error:  # noqa: BLE001 - printed in full, and the process ends
        message = users_message(error)
        if message is not None:
            atomic_write_bytes(Path(folder) / os.environ["RANK"], message.encode())
        if message is None or os.environ.get("ATELIER_TRACEBACK"):
            traceback.print_exc()
    sys.stderr.flush()
    os._exit(2)


if __name__ == "__main__":
    sys.exit(run())
