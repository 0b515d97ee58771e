"""Watching over training: stopping before bad weights are made or kept."""

import json
import math
from typing import NoReturn

import torch.distributed as dist

from errors import UserError, run_argument
from pipelines.store.files import atomic_write_bytes
from training.loop.losses import StepLosses
from training.loop.measure import count_non_finite, total_norm
from training.loop.zero import Update, ZeroModel
from training.stages.stage import TrainingJob


class UnhealthyTrainingError(UserError):
    """Training was stopped because going on would waste or ruin it; says what was seen and where to look."""


def stop_on_non_finite(losses: StepLosses, model: ZeroModel, job: TrainingJob, *, step: int) -> NoReturn:
    """Write the batch and the state of the weights to `non-finite-step-<k>.json` and stop before the update spoils any.

    Raises:
        UnhealthyTrainingError: always.
    """
    samples, num_spoilt = losses.gather_samples(), count_non_finite(model)
    weights = {"norm": total_norm(model, model.masters), "num_non_finite": num_spoilt}
    moments = {"norm": total_norm(model, model.first_moments())}
    bad = [sample for sample in samples if not math.isfinite(sample["loss"])]
    path = job.directory / f"non-finite-step-{step}.json"
    if dist.get_rank() == 0:
        # `NaN` and `Infinity` as Python's json writes them: which of the two it was is half the diagnosis.
        dump = {"step": step, "non_finite": [sample["key"] for sample in bad], "samples": samples}
        dump |= {"weights": weights, "first_moments": moments}
        atomic_write_bytes(path, json.dumps(dump, indent=1).encode())
    first, asked = bad[0], dict.fromkeys(run_argument(each.run) for each in job.features.datasets)
    runs = " and ".join(f"`make verify {run}`" for run in asked)
    raise UnhealthyTrainingError(
        f"step {step}: the loss of {len(bad)} samples is not finite, first {first['key']} of shard {first['shard']}; "
        f"{path} lists the batch. No weights were changed by it; {num_spoilt} of them are not finite themselves. "
        f"{runs} finds features that are damaged; if none are, lower training.learning_rate"
    )


class SkipCounter:
    """Counts updates that were skipped because their gradient was not finite."""

    def __init__(self, max_in_a_row: int, *, total: int = 0, in_a_row: int = 0) -> None:
        self._max_in_a_row = max_in_a_row
        self.total = total
        self.in_a_row = in_a_row

    def count(self, update: Update, *, step: int) -> None:
        """Take note of a step's update.

        Raises:
            UnhealthyTrainingError: too many were skipped one after the other.
        """
        self.total += update.is_skipped
        self.in_a_row = self.in_a_row + 1 if update.is_skipped else 0
        if self.in_a_row >= self._max_in_a_row:
            raise UnhealthyTrainingError(
                f"step {step}: the last {self.in_a_row} updates were skipped because the gradient was not finite, "
                f"as training.max_skipped_steps {self._max_in_a_row} allows at most; no weights have changed since. "
                "Lower training.learning_rate or use training.dtype fp32"
            )
