"""Losses of a step over all ranks, and their sums until the next line of metrics."""

# B samples of a micro-batch

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.data.batch import Batch

NUM_TIMESTEP_BINS = 10


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


class LossWindow:
    """Sums of losses since the last line, by bin of the timestep; part of a checkpoint, so that a resume loses none."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self._state = {
            "sums": [0.0] * NUM_TIMESTEP_BINS,
            "counts": [0.0] * NUM_TIMESTEP_BINS,
            "squared_error": 0.0,
            "num_steps": 0,
            "max_gradient_norm": 0.0,
        } | (state or {})

    @property
    def state(self) -> dict[str, Any]:
        """What to keep in a checkpoint."""
        return self._state

    def add(self, losses: StepLosses, *, gradient_norm: float = 0.0) -> None:
        """Add the shared losses of a step, and the norm of its gradient before clipping, which may be infinite."""
        state = self._state
        self._state = {
            "sums": [total + value for total, value in zip(state["sums"], losses.sums, strict=True)],
            "counts": [total + value for total, value in zip(state["counts"], losses.counts, strict=True)],
            "squared_error": state["squared_error"] + losses.squared_error,
            "num_steps": state["num_steps"] + 1,
            "max_gradient_norm": max(state["max_gradient_norm"], gradient_norm if math.isfinite(gradient_norm) else 0),
        }

    def flush(self) -> tuple[dict[str, Any], int]:
        """Return mean losses and the number of steps they are of, and start anew.

        The losses are `loss` (what is minimised), `mse` (of the noise alone) and `loss_by_timestep`, one value per
        tenth of the timesteps, null where none fell.
        """
        state = self._state
        self._state = LossWindow().state
        num_samples = sum(state["counts"])
        pairs = zip(state["sums"], state["counts"], strict=True)
        losses = {
            "loss": sum(state["sums"]) / num_samples,
            "mse": state["squared_error"] / num_samples,
            "loss_by_timestep": [total / count if count else None for total, count in pairs],
        }
        return losses, state["num_steps"]
