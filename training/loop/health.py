"""Watching over training: the losses of a step over all ranks, and stopping before bad weights are made or kept."""

# B samples of a micro-batch

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.store.files import atomic_write_bytes
from training.data.batch import Batch
from training.loop.measure import count_non_finite, total_norm
from training.loop.metrics import NUM_TIMESTEP_BINS
from training.loop.zero import Update, ZeroModel


class UnhealthyTrainingError(ValueError):
    """Training was stopped because going on would waste or ruin it; says what was seen and where to look."""


class StepLosses:
    """Losses of one optimizer step: this rank's samples at first, sums over all ranks after `share`."""

    def __init__(self, num_timesteps: int) -> None:
        self._num_timesteps = num_timesteps
        self._keys: list[str] = []
        self._buckets: list[str] = []
        self._timesteps: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._squared_errors: list[Tensor] = []
        self.has_non_finite = False
        self.squared_error = 0.0
        self.sums = [0.0] * NUM_TIMESTEP_BINS
        self.counts = [0.0] * NUM_TIMESTEP_BINS

    def add(self, batch: Batch, timesteps: Tensor, *, total: Tensor, mse: Tensor) -> None:
        """Add a micro-batch: timesteps, loss and squared error of its samples, each [B]."""
        self._keys += batch.keys
        self._buckets += [batch.bucket] * len(batch.keys)
        self._timesteps.append(timesteps)
        self._totals.append(total.detach())
        self._squared_errors.append(mse.detach())

    def share(self, *, is_stopping: bool) -> bool:
        """Sum over all ranks; returns whether any rank is to stop. One small exchange per step carries it all."""
        timesteps, totals = torch.cat(self._timesteps), torch.cat(self._totals).double()
        bins = timesteps * NUM_TIMESTEP_BINS // self._num_timesteps
        row = totals.new_zeros(3 + 2 * NUM_TIMESTEP_BINS)
        row[0] = is_stopping
        row[1] = totals.isfinite().logical_not().sum()
        row[2] = torch.cat(self._squared_errors).double().sum()
        row[3 : 3 + NUM_TIMESTEP_BINS].index_add_(0, bins, totals)
        row[3 + NUM_TIMESTEP_BINS :].index_add_(0, bins, torch.ones_like(totals))
        dist.all_reduce(row)
        stopping, num_non_finite, self.squared_error, *rest = row.tolist()
        self.has_non_finite = num_non_finite > 0
        self.sums, self.counts = rest[:NUM_TIMESTEP_BINS], rest[NUM_TIMESTEP_BINS:]
        return stopping > 0

    def gather_samples(self) -> list[dict[str, Any]]:
        """Return key, bucket, timestep and loss of all ranks' samples, rank by rank; all ranks must call it."""
        timesteps, losses = torch.cat(self._timesteps).tolist(), torch.cat(self._totals).tolist()
        mine = [
            {"key": key, "bucket": bucket, "timestep": timestep, "loss": loss}
            for key, bucket, timestep, loss in zip(self._keys, self._buckets, timesteps, losses, strict=True)
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return [sample for samples in everyone for sample in samples]


def stop_on_non_finite(losses: StepLosses, model: ZeroModel, directory: Path, *, step: int) -> NoReturn:
    """Write the batch and the state of the weights to `non-finite-step-<k>.json` and stop before the update spoils any.

    Raises:
        UnhealthyTrainingError: always.
    """
    samples, num_spoilt = losses.gather_samples(), count_non_finite(model)
    weights = {"norm": total_norm(model, model.masters), "num_non_finite": num_spoilt}
    moments = {"norm": total_norm(model, model.first_moments())}
    bad = [sample["key"] for sample in samples if not math.isfinite(sample["loss"])]
    path = directory / f"non-finite-step-{step}.json"
    if dist.get_rank() == 0:
        # `NaN` and `Infinity` as Python's json writes them: which of the two it was is half the diagnosis.
        dump = {"step": step, "non_finite": bad, "samples": samples}
        dump |= {"weights": weights, "first_moments": moments}
        atomic_write_bytes(path, json.dumps(dump, indent=1).encode())
    raise UnhealthyTrainingError(
        f"step {step}: the loss of {len(bad)} samples is not finite, first {bad[0]}; {path} lists the batch. "
        f"No weights were changed by it; {num_spoilt} of them are not finite themselves"
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
