"""What a stage says while it trains: a line of metrics every so many steps, and the bar."""

import math
import resource
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from pipelines.engine.progress import ProgressBar, progress_bar
from pipelines.store.previews import Pictures
from training.codec_keys import CODEC
from training.config import StageTraining
from training.loop.boards import open_boards
from training.loop.flops import device_peak_teraflops
from training.loop.measure import UpdateMeter
from training.loop.metrics import MetricsLog, costs
from training.loop.progress import Progress
from training.loop.schedule import is_due
from training.loop.zero import Update, ZeroModel
from training.stages.stage import TrainingJob

GIGABYTE = 1e9
KIBIBYTE = 1024  # unit of ru_maxrss on Linux


class StepLog:
    """Measures steps on all ranks; `metrics` and `bar` are rank 0's alone."""

    def __init__(
        self, settings: StageTraining, progress: Progress, *, metrics: MetricsLog | None, bar: ProgressBar | None
    ) -> None:
        self._settings = settings
        self._progress = progress
        self._metrics = metrics
        self._bar = bar

    def meter(self, model: ZeroModel) -> UpdateMeter | None:
        """Return a meter for the next update if a line will be written of it; all ranks must call it."""
        step, settings = self._progress.step + 1, self._settings
        return UpdateMeter(model) if is_due(step, every=settings.log_every, last=settings.num_steps) else None

    def step(self, update: Update, meter: UpdateMeter | None, *, learning_rate: float) -> None:
        """Take note of a step that was counted; all ranks must call it."""
        if meter is not None:
            self._write_line(update, meter, learning_rate=learning_rate)
        if self._bar is not None:
            self._bar.advance()

    def write(self, record: dict[str, object]) -> None:
        """Write a line about the current step."""
        if self._metrics is not None:
            self._metrics.write({"step": self._progress.step, **record})

    def show(self, pictures: Pictures) -> None:
        """Show previews of the current step, which rank 0 alone has."""
        if self._metrics is not None:
            self._metrics.show(pictures, step=self._progress.step)

    def _write_line(self, update: Update, meter: UpdateMeter, *, learning_rate: float) -> None:
        settings, progress = self._settings, self._progress
        update_norm, clipped_norm = meter.norms()
        num_skipped, _ = progress.health.counts()
        max_norm = progress.window.state["max_gradient_norm"]
        losses, num_steps = progress.window.flush(has_times=settings.network != CODEC)
        peak_teraflops = settings.device_peak_teraflops or device_peak_teraflops(meter.device)
        speed = progress.clock.lap(num_steps * settings.global_batch_size, peak_teraflops=peak_teraflops)
        norm, is_skipped = float(update.gradient_norm), bool(update.is_skipped)
        self.write(
            {
                "num_samples_seen": progress.step * settings.global_batch_size,
                **losses,
                "gradient_norm": norm if math.isfinite(norm) else None,
                "max_gradient_norm": max_norm,
                "clipped_gradient_norm": None if is_skipped else clipped_norm,
                "update_norm": update_norm,
                "skipped_steps": num_skipped,
                "learning_rate": learning_rate,
                **rate_of_matrices(settings, learning_rate),
                **speed,
                "peak_memory_gigabytes": _peak_memory_gigabytes(meter.device),
                **costs(settings, device_seconds=progress.clock.device_seconds),
            }
        )
        if self._bar is not None:
            self._bar.note = f"loss {losses['loss']:.4f} · data wait {speed['data_wait_fraction']:.0%}"


def rate_of_matrices(settings: StageTraining, learning_rate: float) -> dict[str, float]:
    """Return Muon's rate where it is another one than AdamW's `learning_rate` of the same step."""
    if settings.optimizer != "muon" or settings.muon_learning_rate is None:
        return {}
    return {"muon_learning_rate": learning_rate / settings.learning_rate * settings.muon_learning_rate}


def open_log(job: TrainingJob, progress: Progress, stack: ExitStack, *, description: Mapping[str, Any]) -> StepLog:
    """Return this rank's log, closed with `stack`; `description` is what `trainer.json` says of the stage."""
    if dist.get_rank() != 0:
        return StepLog(job.settings, progress, metrics=None, bar=None)
    num_steps = job.settings.num_steps - progress.step
    boards = open_boards(job, step=progress.step, description=description)
    return StepLog(
        job.settings,
        progress,
        metrics=stack.enter_context(MetricsLog(job.directory, step=progress.step, boards=boards)),
        bar=stack.enter_context(progress_bar(f"training {job.command.stage_name}", num_steps, unit="steps")),
    )


def _peak_memory_gigabytes(device: torch.device) -> float:
    """Return the most memory this rank has used so far: of its GPU, or of its process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE / GIGABYTE
