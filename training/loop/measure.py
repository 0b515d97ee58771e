"""Norms over all master weights: what an update really did to them, and whether they are sound."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from training.loop.zero import ZeroModel

# Elements that are measured at a time: what it takes beside the weights is a few times as many in fp64.
PIECE_SIZE = 1 << 20


class UpdateMeter:
    """Measures the next update where it is made: in the optimizer, whose share of the weights ZeRO decides.

    It keeps no copy of anything: what the weights were before is worked out from what AdamW left, piece by piece.
    """

    def __init__(self, model: ZeroModel) -> None:
        self._model = model
        self._gradient = torch.zeros((), dtype=torch.float64, device=model.device)  # sums of squares
        self._change = torch.zeros_like(self._gradient)
        self._hooks = (
            model.adamw.register_step_pre_hook(lambda adamw, *_: self._add_gradient(adamw)),
            model.adamw.register_step_post_hook(lambda adamw, *_: self._add_change(adamw)),
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def norms(self) -> tuple[float, float]:
        """Return the norms of the change of all masters and of the gradient as AdamW got it, clipped; ends measuring.

        Both are 0 for an update that was skipped; all ranks must call it.
        """
        for hook in self._hooks:
            hook.remove()
        adamw = vars(self._model.adamw)
        squares = torch.stack([self._change, self._gradient / adamw["grad_scale"].double().square()])
        sums = _sum_over_ranks(self._model, torch.where(adamw["found_inf"] == 0, squares, 0.0))
        change, gradient = sums.sqrt().tolist()
        return change, gradient

    @torch.no_grad()
    def _add_gradient(self, adamw: Optimizer) -> None:
        for _, _, gradient in _stepped(adamw):
            for piece in gradient.flatten().split(PIECE_SIZE):
                self._gradient += piece.double().square().sum()

    @torch.no_grad()
    def _add_change(self, adamw: Optimizer) -> None:
        for group, weight, _ in _stepped(adamw):
            (beta1, beta2), state = group["betas"], adamw.state[weight]
            step = state["step"].double()
            rate, kept = group["lr"] / (1 - beta1**step), _kept_by_decay(group, weight)
            tensors = (weight, state["exp_avg"], state["exp_avg_sq"])
            for new, mean, square in zip(*(tensor.flatten().split(PIECE_SIZE) for tensor in tensors), strict=True):
                # new = kept * old - rate * mean / denominator, rounded twice: so the nearest is what was there.
                denominator = (square.double() / (1 - beta2**step)).sqrt() + group["eps"]
                decayed = (new + rate * mean.double() / denominator).to(new.dtype)
                old = (decayed.double() / kept).to(new.dtype)
                self._change += (new - old).double().square().sum()


def _kept_by_decay(group: dict[str, Any], weight: Tensor) -> Tensor:
    """Return what decoupled decay multiplies weights by, fp64; torch's kernel for CPUs rounds it as the weights."""
    kept = torch.tensor(1 - group["lr"] * group["weight_decay"], dtype=torch.float64)
    return kept.to(weight.dtype).double() if weight.device.type == "cpu" else kept


def _stepped(adamw: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    """Yield group, weight and gradient of what a step is of."""
    for group in adamw.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                yield group, weight, weight.grad


def total_norm(model: ZeroModel, tensors: list[Tensor]) -> float:
    """Return the norm over all tensors of all ranks that are shaped as `model.masters`; all ranks must call it."""
    return float(_sum_over_ranks(model, _sum(tensor.square().sum().double() for tensor in tensors)).sqrt())


def count_non_finite(model: ZeroModel) -> int:
    """Return how many master weights are not finite; all ranks must call it."""
    counts = (master.isfinite().logical_not().sum().double() for master in model.masters)
    return int(_sum_over_ranks(model, _sum(counts)))


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def _sum_over_ranks(model: ZeroModel, values: Tensor) -> Tensor:
    if model.is_sharded:
        dist.all_reduce(values)
    return values
