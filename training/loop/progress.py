"""How far a stage has come: what a resume goes on from, beside weights and optimizer."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from training.loop.clock import Clock
from training.loop.health import SkipCounter
from training.loop.losses import LossWindow, StepLosses
from training.loop.zero import Update
from training.stages.stage import TrainingJob


@dataclass(kw_only=True)
class Progress:
    """Steps done, the time they took, updates that were skipped, and losses since the last line of metrics."""

    step: int
    clock: Clock
    skips: SkipCounter
    window: LossWindow

    def count(self, losses: StepLosses, update: Update) -> None:
        """Take note of a step.

        Raises:
            UnhealthyTrainingError: too many updates were skipped one after the other.
        """
        self.step += 1
        self.skips.count(update, step=self.step)
        self.window.add(losses, gradient_norm=update.gradient_norm)

    def record(self) -> dict[str, Any]:
        """Return what `trainer.json` keeps of it."""
        return {
            "step": self.step,
            "elapsed_seconds": self.clock.elapsed_seconds,
            "device_seconds": self.clock.device_seconds,
            "skipped_steps": self.skips.total,
            "skipped_in_a_row": self.skips.in_a_row,
            "window": self.window.state,
        }


def open_progress(job: TrainingJob) -> Progress:
    """Return the progress of the checkpoint a job goes on from, or of one that begins; its clock runs from now on."""
    max_skipped, num_devices = job.settings.max_skipped_steps, dist.get_world_size()
    if job.resume is None:
        clock, skips = Clock(num_devices=num_devices), SkipCounter(max_skipped)
        return Progress(step=0, clock=clock, skips=skips, window=LossWindow())
    kept = job.resume.trainer
    # The ranks' time of a checkpoint made before it was counted by itself.
    device_seconds = kept.get("device_seconds", kept["elapsed_seconds"] * kept["num_ranks"])
    return Progress(
        step=job.resume.step,
        clock=Clock(kept["elapsed_seconds"], device_seconds=device_seconds, num_devices=num_devices),
        skips=SkipCounter(max_skipped, total=kept["skipped_steps"], in_a_row=kept["skipped_in_a_row"]),
        window=LossWindow(kept.get("window")),
    )
