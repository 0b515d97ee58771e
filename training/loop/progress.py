"""How far a stage has come: what a resume goes on from, beside weights and optimizer."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from training.loop.clock import Clock
from training.loop.health import Health
from training.loop.losses import LossWindow, StepLosses
from training.loop.zero import Update, rank_device
from training.stages.stage import TrainingJob


@dataclass(kw_only=True)
class Progress:
    """Steps launched, the time they took, whether they were sound, and losses since the last line of metrics."""

    step: int
    clock: Clock
    health: Health
    window: LossWindow

    def count(self, losses: StepLosses, update: Update) -> None:
        """Take note of a step."""
        self.step += 1
        self.health.count(losses, update, step=self.step)
        self.window.add(losses, gradient_norm=update.gradient_norm)

    def record(self) -> dict[str, Any]:
        """Return what `trainer.json` keeps of it; waits for the device."""
        num_skipped, num_in_a_row = self.health.counts()
        return {
            "step": self.step,
            "elapsed_seconds": self.clock.elapsed_seconds,
            "device_seconds": self.clock.device_seconds,
            "skipped_steps": num_skipped,
            "skipped_in_a_row": num_in_a_row,
            "window": self.window.state,
        }


def open_progress(job: TrainingJob) -> Progress:
    """Return the progress of the checkpoint a job goes on from, or of one that begins; its clock runs from now on."""
    max_skipped, num_devices, device = job.settings.max_skipped_steps, dist.get_world_size(), rank_device()
    if job.resume is None:
        clock, health = Clock(num_devices=num_devices), Health(max_skipped, device=device)
        return Progress(step=0, clock=clock, health=health, window=LossWindow(device=device))
    kept = job.resume.trainer
    # The ranks' time of a checkpoint made before it was counted by itself.
    device_seconds = kept.get("device_seconds", kept["elapsed_seconds"] * kept["num_ranks"])
    return Progress(
        step=job.resume.step,
        clock=Clock(kept["elapsed_seconds"], device_seconds=device_seconds, num_devices=num_devices),
        health=Health(max_skipped, total=kept["skipped_steps"], in_a_row=kept["skipped_in_a_row"], device=device),
        window=LossWindow(kept.get("window"), device=device),
    )
