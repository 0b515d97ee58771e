"""The training loop: next batch, loss, backward, step, log, maybe save."""

import math
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.engine.progress import ProgressBar
from training.config import StageTraining
from training.data.batch import PackedBatch
from training.loop.clock import Clock
from training.loop.ema import EMA
from training.loop.flops import StepFlops
from training.loop.health import SkipCounter, stop_on_non_finite
from training.loop.losses import LossWindow, StepLosses
from training.loop.measure import UpdateMeter
from training.loop.metrics import MetricsLog, costs
from training.loop.state import save_checkpoint
from training.loop.validation import Validation, is_due
from training.loop.zero import Update, ZeroModel
from training.objectives.denoise import Denoising

GIGABYTE = 1e9
KIBIBYTE = 1024  # unit of ru_maxrss on Linux


@dataclass(kw_only=True)
class Session:
    """What the loop works with, and how far it has come; `metrics` and `progress_bar` are rank 0's alone."""

    model: ZeroModel
    ema: EMA
    objective: Denoising
    batches: Iterator[PackedBatch]
    settings: StageTraining
    directory: Path
    trainer: dict[str, Any]
    stop: threading.Event
    clock: Clock
    skips: SkipCounter
    window: LossWindow
    flops: StepFlops
    peak_teraflops: float | None = None
    validation: Validation | None = None
    step: int = 0
    metrics: MetricsLog | None = None
    progress_bar: ProgressBar | None = None


def train(session: Session) -> None:
    """Train to the end of the stage, or until `session.stop` is set on any rank; ends with a checkpoint.

    Raises:
        UnhealthyTrainingError: a loss is not finite, or too many updates in a row were skipped.
    """
    settings, model = session.settings, session.model
    is_stopping = False
    if session.step == 0:
        _validate(session)
    while session.step < settings.num_steps and not is_stopping:
        losses = _forward_backward(session)
        is_stopping = losses.share(is_stopping=session.stop.is_set())
        if losses.has_non_finite:
            stop_on_non_finite(losses, model, session.directory, step=session.step)
        is_logged = (session.step + 1) % settings.log_every == 0 or session.step + 1 == settings.num_steps
        meter = UpdateMeter(model) if is_logged else None

        learning_rate = learning_rate_at(settings, session.step)
        update = model.update(learning_rate)
        if not update.is_skipped:
            session.ema.update()
        session.step += 1
        session.skips.count(update, step=session.step)

        session.window.add(losses, gradient_norm=update.gradient_norm)
        if meter is not None:
            _log(session, update, meter, learning_rate=learning_rate)
        if session.progress_bar is not None:
            session.progress_bar.advance()
        if is_due(session.step, every=settings.validate_every, last=settings.num_steps):
            _validate(session)
        if is_stopping or session.step == settings.num_steps or session.step % settings.checkpoint_every == 0:
            save(session)


def _forward_backward(session: Session) -> StepLosses:
    """Accumulate the gradient of one step over its micro-batches; returns this rank's losses."""
    model, objective = session.model, session.objective
    losses = StepLosses(objective.process.num_times)
    num_micro_batches = session.settings.gradient_accumulation_steps
    for i in range(num_micro_batches):
        with session.clock.waiting():
            packed = next(session.batches)
            batch = packed.to(model.device)
        session.clock.count_flops(session.flops.of_batch(packed))
        loss = objective.loss(model.engine, batch)
        model.backward(loss.total.mean(), is_last=i + 1 == num_micro_batches)
        losses.add(batch, objective.times(batch), loss=loss)
    return losses


def _validate(session: Session) -> None:
    """Write the validation loss of this step, if the stage has shards for it."""
    if session.validation is None:
        return
    with session.clock.paused():
        losses = session.validation.run(
            session.model, session.objective, directory=session.directory, step=session.step
        )
    if session.metrics is not None:
        session.metrics.write({"step": session.step, **losses})


def learning_rate_at(settings: StageTraining, step: int) -> float:
    """Return the learning rate of `step`, counted from 0: linear warm-up, constant, and a linear end if one is set."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    num_decay_steps = settings.decay_fraction * settings.num_steps
    remaining = min(1.0, (settings.num_steps - step) / (num_decay_steps + 1))
    return settings.learning_rate * warmup * remaining


def _log(session: Session, update: Update, meter: UpdateMeter, *, learning_rate: float) -> None:
    """Write a line of metrics; all ranks must call it."""
    settings = session.settings
    update_norm, clipped_norm = meter.update_norm(), meter.clipped_gradient_norm()
    max_norm = session.window.state["max_gradient_norm"]
    losses, num_steps = session.window.flush()
    speed = session.clock.lap(num_steps * settings.global_batch_size, peak_teraflops=session.peak_teraflops)
    if session.metrics is None:
        return
    norm = update.gradient_norm
    record = {
        "step": session.step,
        "num_samples_seen": session.step * settings.global_batch_size,
        **losses,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "max_gradient_norm": max_norm,
        "clipped_gradient_norm": None if update.is_skipped else clipped_norm,
        "update_norm": update_norm,
        "skipped_steps": session.skips.total,
        "learning_rate": learning_rate,
        **speed,
        "peak_memory_gigabytes": _peak_memory_gigabytes(session.model.device),
        **costs(settings, device_seconds=session.clock.device_seconds),
    }
    session.metrics.write(record)
    if session.progress_bar is not None:
        session.progress_bar.note = f"loss {losses['loss']:.4f} · data wait {speed['data_wait_fraction']:.0%}"


def _peak_memory_gigabytes(device: torch.device) -> float:
    """Return the most memory this rank has used so far: of its GPU, or of its process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE / GIGABYTE


def save(session: Session) -> None:
    """Write a checkpoint of the session; all ranks must call it."""
    trainer = session.trainer | {
        "step": session.step,
        "num_samples_seen": session.step * session.settings.global_batch_size,
        "elapsed_seconds": session.clock.elapsed_seconds,
        "device_seconds": session.clock.device_seconds,
        "skipped_steps": session.skips.total,
        "skipped_in_a_row": session.skips.in_a_row,
        "window": session.window.state,
    }
    save_checkpoint(
        session.directory,
        model=session.model,
        ema=session.ema,
        trainer=trainer,
        num_kept=session.settings.keep_checkpoints,
    )
