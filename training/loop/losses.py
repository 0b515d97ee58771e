"""Losses of a step over all ranks, and their sums until the next line of metrics."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.data.batch import Batch
from training.objectives.objective import Losses

NUM_TIMESTEP_BINS = 10
# What a window is that has seen no step.
BLANK: dict[str, Any] = {
    "sums": [0.0] * NUM_TIMESTEP_BINS,
    "counts": [0.0] * NUM_TIMESTEP_BINS,
    "parts": {},
    "num_steps": 0,
    "max_gradient_norm": 0.0,
}


class StepLosses:
    """Losses of one optimizer step: this rank's samples at first, sums over all ranks after `share`; on the device.

    Attributes, after `share`, float64:
        sums, counts: losses and samples by bin of the timestep, [NUM_TIMESTEP_BINS].
        parts: sums of the parts by name.
        num_non_finite: samples whose loss is not finite.
        num_stopping: ranks that are to stop.
    """

    sums: Tensor
    counts: Tensor
    parts: dict[str, Tensor]
    num_non_finite: Tensor
    num_stopping: Tensor

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._shards: list[str] = []
        self._buckets: list[str] = []
        self._times: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, batch: Batch, losses: Losses) -> None:
        """Add a micro-batch and the losses of its samples."""
        self._keys += batch.keys
        self._shards += batch.shards
        self._buckets += [batch.bucket] * len(batch.keys)
        self._times.append(losses.times)
        self._totals.append(losses.total.detach())
        for name, part in losses.parts.items():
            self._parts.setdefault(name, []).append(part.detach())

    def share(self, *, is_stopping: bool) -> None:
        """Sum over all ranks, by one small exchange for which the host does not wait on a GPU."""
        times, totals = torch.cat(self._times), torch.cat(self._totals).double()
        # The last bin holds pure noise, too, where a process has that.
        bins = (times * NUM_TIMESTEP_BINS).long().clamp(max=NUM_TIMESTEP_BINS - 1)
        sums = totals.new_zeros(NUM_TIMESTEP_BINS).index_add_(0, bins, totals)
        counts = totals.new_zeros(NUM_TIMESTEP_BINS).index_add_(0, bins, torch.ones_like(totals))
        # Filled on the device: a tensor made of a number on the host would wait for its copy.
        first = [totals.new_full((), float(is_stopping)), totals.isfinite().logical_not().sum().double()]
        parts = [torch.cat(values).double().sum() for values in self._parts.values()]
        row = torch.cat([sums, counts, torch.stack([*first, *parts])])
        dist.all_reduce(row)
        self.sums, self.counts, rest = row.split([NUM_TIMESTEP_BINS, NUM_TIMESTEP_BINS, len(first) + len(parts)])
        self.num_stopping, self.num_non_finite, *part_sums = rest.unbind()
        self.parts = dict(zip(self._parts, part_sums, strict=True))

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
    """Sums of losses since the last line, by bin of the timestep; part of a checkpoint, so that a resume loses none.

    They are on the device, in float64, and `state` and `flush` wait for it.
    """

    def __init__(self, state: dict[str, Any] | None = None, *, device: torch.device) -> None:
        self._device = device
        self._begin(BLANK | (state or {}))

    def _begin(self, kept: dict[str, Any]) -> None:
        # Checkpoints made before losses had parts with names kept one of them.
        if "squared_error" in kept:
            kept = kept | {"parts": {"mse": kept["squared_error"]}}
        self._num_steps: int = kept["num_steps"]
        self._sums, self._counts, self._max_norm = (
            self._to_device(kept[name]) for name in ("sums", "counts", "max_gradient_norm")
        )
        self._parts = {name: self._to_device(total) for name, total in kept["parts"].items()}

    def _to_device(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    @property
    def state(self) -> dict[str, Any]:
        """What to keep in a checkpoint."""
        scalars = torch.stack([self._max_norm, *self._parts.values()])
        values = torch.cat([self._sums, self._counts, scalars]).tolist()
        max_norm, *parts = values[2 * NUM_TIMESTEP_BINS :]
        return {
            "sums": values[:NUM_TIMESTEP_BINS],
            "counts": values[NUM_TIMESTEP_BINS : 2 * NUM_TIMESTEP_BINS],
            "parts": dict(zip(self._parts, parts, strict=True)),
            "num_steps": self._num_steps,
            "max_gradient_norm": max_norm,
        }

    def add(self, losses: StepLosses, *, gradient_norm: Tensor | None = None) -> None:
        """Add the shared losses of a step, and the norm of its gradient before clipping, which may be infinite."""
        self._sums = self._sums + losses.sums
        self._counts = self._counts + losses.counts
        # A window that an earlier checkpoint began has no more parts than it.
        names = self._parts if self._num_steps else losses.parts
        self._parts = {name: self._parts.get(name, 0.0) + losses.parts[name] for name in names}
        self._num_steps += 1
        if gradient_norm is not None:
            finite = gradient_norm.where(gradient_norm.isfinite(), 0.0)
            self._max_norm = torch.maximum(self._max_norm, finite)

    def flush(self, *, has_times: bool) -> tuple[dict[str, Any], int]:
        """Return mean losses and the number of steps they are of, and start anew.

        The losses are `loss` (what is minimised), its parts by name (`mse` of what is predicted; `vlb`, the bound, of
        a ddpm), and of samples that have times `loss_by_timestep`, a value per tenth of the way to noise, null where
        none fell.
        """
        state = self.state
        self._begin(BLANK)
        num_samples = sum(state["counts"])
        pairs = zip(state["sums"], state["counts"], strict=True)
        losses = {
            "loss": sum(state["sums"]) / num_samples,
            **{name: total / num_samples for name, total in state["parts"].items()},
        }
        if has_times:
            losses["loss_by_timestep"] = [total / count if count else None for total, count in pairs]
        return losses, state["num_steps"]
