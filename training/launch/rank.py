"""One rank of a stage: `python -m training.launch.rank`, with the arguments of `python -m training`.

RANK, WORLD_SIZE and the like come from the environment.
A launcher starts those of its machine; `torchrun` may, too.
"""

import os
import signal
import sys
import threading
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.command import parse_command, run_command
from pipelines.engine.progress import progress_bar
from pipelines.store.files import atomic_write_bytes
from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from training.config import STAGES
from training.data.batches import shared_survey, training_reader
from training.data.survey import Survey
from training.launch.preflight import (
    print_weights,
    require_disk,
    require_even_batches,
    require_memory,
)
from training.launch.ranks import ERROR_FOLDER, LOST_CONTACT
from training.loop.clock import Clock
from training.loop.compilation import require_compilable
from training.loop.ema import EMA
from training.loop.flops import StepFlops, device_peak_teraflops
from training.loop.health import SkipCounter
from training.loop.loop import Session, train
from training.loop.losses import LossWindow
from training.loop.metrics import MetricsLog
from training.loop.state import load_checkpoint, needs_universal
from training.loop.validation import open_validation
from training.loop.zero import ZeroModel, initialize_ranks
from training.objectives.denoise import Denoising
from training.stages.checkpoint import Checkpoint
from training.stages.networks import count_parameters, network_config, parameter_counts
from training.stages.stage import TrainingJob, open_stage
from training.stages.starts import starting_network

# How gloo and NCCL say that the other end of a connection is gone.
LOST_SIGNS = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "remote process exited")


def main() -> None:
    """Train one stage on this rank."""
    job = open_stage(parse_command("training.launch.rank", "One rank of a training stage.", stages=STAGES))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    # The launcher blocks it until there is somebody to listen.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    initialize_ranks()
    try:
        run_rank(job, stop)
        dist.barrier()
    except torch.OutOfMemoryError as error:
        settings = job.settings
        raise ValueError(
            f"the GPU's memory does not suffice: {str(error).splitlines()[0]} Raise "
            f"training.gradient_accumulation_steps {settings.gradient_accumulation_steps} (smaller micro-batches) or "
            f'training.zero_stage {settings.zero_stage}, or set training.keep_activations = "products" or '
            f'"inputs" (it is {settings.keep_activations!r})'
        ) from error
    except RuntimeError as error:
        if is_lost_contact(error):
            raise OSError(LOST_CONTACT) from error
        if isinstance(error, dist.DistError):
            raise ValueError(f"the ranks cannot talk to each other: {error}") from error
        raise
    dist.destroy_process_group()


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone; what that rank says is the message that matters."""
    return isinstance(error, dist.DistNetworkError) or any(sign in str(error) for sign in LOST_SIGNS)


def run_rank(job: TrainingJob, stop: threading.Event) -> None:
    """Build model, average and reader, resume if there is a checkpoint, and train."""
    settings, resume = job.settings, job.resume
    require_even_batches(settings, dist.get_world_size())
    require_compilable(settings)
    _require_same_resume(resume)
    survey = shared_survey(job)
    config = network_config(job, survey)
    network = starting_network(job, config)
    num_parameters, is_first = count_parameters(network), dist.get_rank() == 0
    if is_first:
        print_weights(job, parameter_counts=parameter_counts(config), num_ranks=dist.get_world_size())
    num_ranks = dist.get_world_size()
    require_memory(job, num_parameters, num_ranks=num_ranks, available_bytes=_available_bytes())
    require_disk(job, num_parameters)
    is_elastic = resume is not None and needs_universal(resume, dist.get_world_size())
    model = ZeroModel(network, settings, loads_universal=is_elastic)
    ema = EMA(model, settings.ema_decay)
    trainer: dict[str, Any] = {
        "step": 0,
        "elapsed_seconds": 0.0,
        "device_seconds": 0.0,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
    }
    if resume is not None:
        load_checkpoint(resume, model=model, ema=ema)
        # The ranks' time of a checkpoint made before it was counted by itself.
        trainer = {"device_seconds": resume.trainer["elapsed_seconds"] * resume.trainer["num_ranks"]} | resume.trainer
    with ExitStack() as stack:
        reader = stack.enter_context(training_reader(job, survey, start_step=trainer["step"]))
        remaining_steps = settings.num_steps - trainer["step"]
        title = f"training {job.command.stage_name}"
        session = Session(
            model=model,
            ema=ema,
            objective=_objective(job, network, model),
            batches=iter(reader),
            settings=settings,
            directory=job.directory,
            trainer=describe(job, survey, network_config=network.config),
            stop=stop,
            clock=Clock(
                trainer["elapsed_seconds"],
                device_seconds=trainer["device_seconds"],
                num_devices=dist.get_world_size(),
            ),
            skips=SkipCounter(
                settings.max_skipped_steps, total=trainer["skipped_steps"], in_a_row=trainer["skipped_in_a_row"]
            ),
            window=LossWindow(trainer.get("window")),
            flops=StepFlops(config),
            peak_teraflops=settings.device_peak_teraflops or device_peak_teraflops(model.device),
            validation=open_validation(job),
            step=trainer["step"],
            metrics=stack.enter_context(MetricsLog(job.directory, step=trainer["step"])) if is_first else None,
            progress_bar=stack.enter_context(progress_bar(title, remaining_steps, unit="steps")) if is_first else None,
        )
        train(session)


def _available_bytes() -> float:
    """Return the memory of this rank's GPU, or without one its share of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine_bytes / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _require_same_resume(resume: Checkpoint | None) -> None:
    """Refuse a rank whose view of the storage is not that of rank 0: each looks the newest checkpoint up by itself."""
    mine = resume and resume.path.name
    of_first = [mine]
    dist.broadcast_object_list(of_first, src=0)
    if mine != of_first[0]:
        raise ValueError(
            f"rank {dist.get_rank()} would continue from {mine or 'the start'}, but rank 0 from "
            f"{of_first[0] or 'the start'}: the storage of RUN does not show all machines the same yet; type it again"
        )


def _objective(job: TrainingJob, network: DiT | PixArt, model: ZeroModel) -> Denoising:
    return Denoising(
        process=process_of(job.process, device=model.device),
        scaling_factor=job.features.vae["scaling_factor"],
        shift_factor=job.features.vae["shift_factor"],
        null_label=network.null_label if isinstance(network, DiT) else None,
        dtype=model.dtype,
    )


def describe(job: TrainingJob, survey: Survey, *, network_config: DiTConfig | PixArtConfig) -> dict[str, Any]:
    """Return what `trainer.json` says about the stage, all that sampling and a resume need to know."""
    is_pixart = isinstance(network_config, PixArtConfig)
    return {
        "stage": job.stage,
        "stage_name": job.command.stage_name,
        "kind": "pixart" if is_pixart else "dit",
        "weights": "ema",
        "init_from": job.settings.init_from,
        "num_steps": job.settings.num_steps,
        "num_ranks": dist.get_world_size(),
        "zero_stage": job.settings.zero_stage,
        "dtype": job.settings.dtype,
        "seed": job.settings.seed,
        "plan_fingerprint": job.fingerprint.digest,
        "fingerprint": job.fingerprint.fields,
        "resolution": job.features.resolution,
        "buckets": survey.buckets,
        "vae": job.features.vae,
        "text": job.features.text_encoder,
        "process": job.process,
        "interpolation_scale": network_config.interpolation_scale if is_pixart else 1.0,
    }


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
        if isinstance(error, ValueError | OSError) and not os.environ.get("ATELIER_TRACEBACK"):
            atomic_write_bytes(Path(folder) / os.environ["RANK"], str(error).encode())
        else:
            traceback.print_exc()
    sys.stderr.flush()
    os._exit(2)


if __name__ == "__main__":
    sys.exit(run())
