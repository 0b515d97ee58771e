"""The training loop: next batch, loss, backward, step, log, maybe save, maybe draw."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.codec.previews import CodecPreviews
from training.data.batch import PackedBatch
from training.data.transfer import Transfers
from training.loop.flops import StepFlops
from training.loop.log import StepLog
from training.loop.losses import StepLosses
from training.loop.networks import Networks
from training.loop.progress import Progress
from training.loop.schedule import is_due, learning_rate_at
from training.loop.state import save_checkpoint
from training.loop.validation import Validation
from training.objectives.objective import Objective
from training.previews.previews import Previews
from training.stages.stage import TrainingJob


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the loop works with.

    `description` is what `trainer.json` says beside the progress, `measure` what completes weights, as
    `save_checkpoint` has it.
    """

    job: TrainingJob
    objective: Objective
    networks: Networks
    batches: Iterator[PackedBatch]
    transfers: Transfers
    progress: Progress
    log: StepLog
    flops: StepFlops
    validation: Validation | None
    previews: Previews | CodecPreviews | None
    description: dict[str, Any]
    stop: threading.Event
    measure: Callable[[Path], Mapping[str, Any]] | None = None


def train(session: Session) -> None:
    """Train to the end of the stage, or until `session.stop` is set on any rank; ends with a checkpoint.

    Raises:
        UnhealthyTrainingError: a loss is not finite, or too many updates in a row were skipped.
    """
    settings, progress = session.job.settings, session.progress
    if progress.step == 0:
        _validate(session)
    _preview(session)
    while progress.step < settings.num_steps and not progress.health.is_stopping:
        _step(session)
        if is_due(progress.step, every=settings.validate_every, last=settings.num_steps):
            _look(session, is_all=True)
            _validate(session)
        is_average_due = is_due(progress.step, every=settings.ema_snapshot_every, last=settings.num_steps)
        if settings.keeps_averages and is_average_due:
            _look(session, is_all=True)
            session.networks.averages.keep(session.job.directory, progress.step)
        is_save_due = is_due(progress.step, every=settings.checkpoint_every, last=settings.num_steps)
        if is_save_due or progress.health.is_stopping:
            _look(session, is_all=True)
            _save(session)
        _preview(session)


def _step(session: Session) -> None:
    """Launch one step, and look at the one before it."""
    networks, progress = session.networks, session.progress
    losses = _forward_backward(session)
    losses.share(is_stopping=session.stop.is_set())
    meter = session.log.meter(networks.model)
    learning_rate = learning_rate_at(session.job.settings, progress.step)
    update = networks.update(learning_rate, step=progress.step, is_ruined=progress.health.is_ruined(losses))
    progress.count(losses, update)
    # A line of metrics waits for its step anyway; it is of sound ones.
    _look(session, is_all=meter is not None)
    session.log.step(update, meter, learning_rate=learning_rate)


def _look(session: Session, *, is_all: bool) -> None:
    """Look whether steps were sound, all of them or those that the device is past, and whether a rank is to stop."""
    session.progress.health.look(session.networks.model, session.job, is_all=is_all)


def _forward_backward(session: Session) -> StepLosses:
    """Accumulate the gradient of one step over its micro-batches; returns this rank's losses."""
    model, clock = session.networks.model, session.progress.clock
    step_losses = StepLosses()
    num_micro_batches = session.job.settings.num_micro_batches
    for i in range(num_micro_batches):
        session.transfers.finish()
        with clock.waiting():
            packed = next(session.batches)
        batch = session.transfers.bring(packed)
        clock.count_flops(session.flops.of_batch(packed))
        losses = session.objective.loss(session.networks, batch)
        model.backward(losses.minimised.mean(), is_last=i + 1 == num_micro_batches)
        step_losses.add(batch, losses)
    return step_losses


def _validate(session: Session) -> None:
    """Write the validation loss of this step, if the stage has shards for it."""
    if session.validation is None:
        return
    with session.progress.clock.paused():
        losses = session.validation.run(session.networks, session.objective, step=session.progress.step)
    session.log.write(losses)


def _preview(session: Session) -> None:
    """Draw the previews of this step, if they are due; a stage that is to stop leaves them to its resume."""
    previews, progress = session.previews, session.progress
    if previews is None or not previews.is_due(progress.step) or progress.health.is_stopping:
        return
    with progress.clock.paused():
        pictures = previews.draw(session.networks, step=progress.step)
    session.log.show(pictures)


def _save(session: Session) -> None:
    """Write a checkpoint; all ranks must call it."""
    settings, progress = session.job.settings, session.progress
    num_samples_seen = progress.step * settings.global_batch_size
    save_checkpoint(
        session.job.directory,
        model=session.networks.model,
        ema=session.networks.ema,
        second=session.networks.averages.second,
        trainer=session.description | progress.record() | {"num_samples_seen": num_samples_seen},
        num_kept=settings.keep_checkpoints,
        measure=session.measure,
    )
