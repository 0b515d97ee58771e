"""Losses of a step over all ranks, and their sums until the next line of metrics."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.data.batch import Batch
from training.objectives.objective import Losses

NUM_TIMESTEP_BINS = 10


class StepLosses:
    """Losses of one optimizer step: this rank's samples at first, sums over all ranks after `share`."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._shards: list[str] = []
        self._buckets: list[str] = []
        self._times: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._parts: dict[str, list[Tensor]] = {}
        self.has_non_finite = False
        self.parts: dict[str, float] = {}
        self.sums = [0.0] * NUM_TIMESTEP_BINS
        self.counts = [0.0] * NUM_TIMESTEP_BINS

    def add(self, batch: Batch, losses: Losses) -> None:
        """Add a micro-batch and the losses of its samples."""
        self._keys += batch.keys
        self._shards += batch.shards
        self._buckets += [batch.bucket] * len(batch.keys)
        self._times.append(losses.times)
        self._totals.append(losses.total.detach())
        for name, part in losses.parts.items():
            self._parts.setdefault(name, []).append(part.detach())

    def share(self, *, is_stopping: bool) -> bool:
        """Sum over all ranks; returns whether any rank is to stop. One small exchange per step carries it all."""
        times, totals = torch.cat(self._times), torch.cat(self._totals).double()
        # The last bin holds pure noise, too, where a process has that.
        bins = (times * NUM_TIMESTEP_BINS).long().clamp(max=NUM_TIMESTEP_BINS - 1)
        sums = totals.new_zeros(NUM_TIMESTEP_BINS).index_add_(0, bins, totals)
        counts = totals.new_zeros(NUM_TIMESTEP_BINS).index_add_(0, bins, torch.ones_like(totals))
        first = [totals.new_tensor(float(is_stopping)), totals.isfinite().logical_not().sum().double()]
        parts = [torch.cat(values).double().sum() for values in self._parts.values()]
        row = torch.cat([sums, counts, torch.stack([*first, *parts])])
        dist.all_reduce(row)
        values = row.tolist()
        self.sums, self.counts = values[:NUM_TIMESTEP_BINS], values[NUM_TIMESTEP_BINS : 2 * NUM_TIMESTEP_BINS]
        num_stopping, num_non_finite, *part_sums = values[2 * NUM_TIMESTEP_BINS :]
        self.has_non_finite = num_non_finite > 0
        self.parts = dict(zip(self._parts, part_sums, strict=True))
        return num_stopping > 0

    def gather_samples(self) -> list[dict[str, Any]]:
        """Return key, shard, bucket, time and loss of all ranks' samples, and their place in the global batch.

        All ranks must call it.
        """
        times, losses = torch.cat(self._times).tolist(), torch.cat(self._totals).tolist()
        mine = [
            {"key": key, "shard": shard, "bucket": bucket, "time": time, "loss": loss}
            for key, shard, bucket, time, loss in zip(
                self._keys, self._shards, self._buckets, times, losses, strict=True
            )
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        # A rank has one stretch of the global batch, micro-batch by micro-batch.
        return [{"position": i, **sample} for i, sample in enumerate(sample for mine in everyone for sample in mine)]


class LossWindow:
    """Sums of losses since the last line, by bin of the timestep; part of a checkpoint, so that a resume loses none."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self._state = {
            "sums": [0.0] * NUM_TIMESTEP_BINS,
            "counts": [0.0] * NUM_TIMESTEP_BINS,
            "parts": {},
            "num_steps": 0,
            "max_gradient_norm": 0.0,
        } | (state or {})
        # Checkpoints made before losses had parts with names kept one of them.
        if "squared_error" in self._state:
            self._state["parts"] = {"mse": self._state.pop("squared_error")}

    @property
    def state(self) -> dict[str, Any]:
        """What to keep in a checkpoint."""
        return self._state

    def add(self, losses: StepLosses, *, gradient_norm: float = 0.0) -> None:
        """Add the shared losses of a step, and the norm of its gradient before clipping, which may be infinite."""
        state = self._state
        # A window that such a checkpoint began has no more parts than it.
        names = state["parts"] if state["num_steps"] else losses.parts
        self._state = {
            "sums": [total + value for total, value in zip(state["sums"], losses.sums, strict=True)],
            "counts": [total + value for total, value in zip(state["counts"], losses.counts, strict=True)],
            "parts": {name: state["parts"].get(name, 0.0) + losses.parts[name] for name in names},
            "num_steps": state["num_steps"] + 1,
            "max_gradient_norm": max(state["max_gradient_norm"], gradient_norm if math.isfinite(gradient_norm) else 0),
        }

    def flush(self) -> tuple[dict[str, Any], int]:
        """Return mean losses and the number of steps they are of, and start anew.

        The losses are `loss` (what is minimised), its parts by name (`mse` of what is predicted; `vlb`, the bound, of
        a ddpm), and `loss_by_timestep`, one value per tenth of the way to noise, null where none fell.
        """
        state = self._state
        self._state = LossWindow().state
        num_samples = sum(state["counts"])
        pairs = zip(state["sums"], state["counts"], strict=True)
        losses = {
            "loss": sum(state["sums"]) / num_samples,
            **{name: total / num_samples for name, total in state["parts"].items()},
            "loss_by_timestep": [total / count if count else None for total, count in pairs],
        }
        return losses, state["num_steps"]
