"""The training loop: next batch, loss, backward, step, log, maybe save."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from training.data.batch import PackedBatch
from training.loop.flops import StepFlops
from training.loop.health import stop_on_non_finite
from training.loop.log import StepLog
from training.loop.losses import StepLosses
from training.loop.networks import Networks
from training.loop.progress import Progress
from training.loop.schedule import learning_rate_at
from training.loop.state import save_checkpoint
from training.loop.validation import Validation, is_due
from training.objectives.objective import Objective
from training.stages.stage import TrainingJob


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the loop works with; `description` is what `trainer.json` says beside the progress."""

    job: TrainingJob
    objective: Objective
    networks: Networks
    batches: Iterator[PackedBatch]
    progress: Progress
    log: StepLog
    flops: StepFlops
    validation: Validation | None
    description: dict[str, Any]
    stop: threading.Event


def train(session: Session) -> None:
    """Train to the end of the stage, or until `session.stop` is set on any rank; ends with a checkpoint.

    Raises:
        UnhealthyTrainingError: a loss is not finite, or too many updates in a row were skipped.
    """
    settings, networks, progress = session.job.settings, session.networks, session.progress
    is_stopping = False
    if progress.step == 0:
        _validate(session)
    while progress.step < settings.num_steps and not is_stopping:
        losses = _forward_backward(session)
        is_stopping = losses.share(is_stopping=session.stop.is_set())
        if losses.has_non_finite:
            stop_on_non_finite(losses, networks.model, session.job, step=progress.step)
        meter = session.log.meter(networks.model)
        learning_rate = learning_rate_at(settings, progress.step)
        update = networks.update(learning_rate)
        progress.count(losses, update)
        session.log.step(update, meter, learning_rate=learning_rate)
        if is_due(progress.step, every=settings.validate_every, last=settings.num_steps):
            _validate(session)
        if is_stopping or is_due(progress.step, every=settings.checkpoint_every, last=settings.num_steps):
            _save(session)


def _forward_backward(session: Session) -> StepLosses:
    """Accumulate the gradient of one step over its micro-batches; returns this rank's losses."""
    model, clock = session.networks.model, session.progress.clock
    step_losses = StepLosses()
    num_micro_batches = session.job.settings.gradient_accumulation_steps
    for i in range(num_micro_batches):
        with clock.waiting():
            packed = next(session.batches)
        # Not waiting for data: on a GPU a copy ends after the kernels of the step before.
        batch = packed.to(model.device)
        clock.count_flops(session.flops.of_batch(packed))
        losses = session.objective.loss(session.networks, batch)
        model.backward(losses.total.mean(), is_last=i + 1 == num_micro_batches)
        step_losses.add(batch, losses)
    return step_losses


def _validate(session: Session) -> None:
    """Write the validation loss of this step, if the stage has shards for it."""
    if session.validation is None:
        return
    with session.progress.clock.paused():
        losses = session.validation.run(session.networks, session.objective, step=session.progress.step)
    session.log.write(losses)


def _save(session: Session) -> None:
    """Write a checkpoint; all ranks must call it."""
    settings, progress = session.job.settings, session.progress
    num_samples_seen = progress.step * settings.global_batch_size
    save_checkpoint(
        session.job.directory,
        model=session.networks.model,
        ema=session.networks.ema,
        trainer=session.description | progress.record() | {"num_samples_seen": num_samples_seen},
        num_kept=settings.keep_checkpoints,
    )
