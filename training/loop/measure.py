"""Norms over all master weights: what an update really did to them, and whether they are sound."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from training.loop.compilation import is_compiled
from training.loop.sizes import PIECE_SIZE
from training.loop.zero import ZeroModel


class UpdateMeter:
    """Measures the next update where it is made: in the optimizer, whose share of the weights ZeRO decides.

    It keeps no copy of anything: what the weights were before is worked out from what AdamW left, piece by piece.
    """

    def __init__(self, model: ZeroModel) -> None:
        self._model = model
        self._is_compiled = is_compiled(model.settings)
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
            pieces = gradient.flatten().split(PIECE_SIZE)
            norms = torch.ops.aten._foreach_norm.Scalar(pieces, 2, torch.float32)
            self._gradient += torch.stack(norms).double().square().sum()

    @torch.no_grad()
    def _add_change(self, adamw: Optimizer) -> None:
        measure = _compiled_change() if self._is_compiled else _square_of_change
        for group, weight, _ in _stepped(adamw):
            (beta1, beta2), state = group["betas"], adamw.state[weight]
            step = state["step"].double()
            # Numbers that differ from step to step are tensors: compiled code takes others without being compiled anew.
            numbers = (
                group["lr"] / (1 - beta1**step),
                1 - beta2**step,
                step.new_full((), group["eps"]),
                step.new_full((), _kept_by_decay(group, weight)),
            )
            size = weight.numel() if self._is_compiled else PIECE_SIZE
            tensors = (weight, state["exp_avg"], state["exp_avg_sq"])
            split = (tensor.detach().flatten().split(size) for tensor in tensors)
            for new, mean, square in zip(*split, strict=True):
                self._change += measure(new, mean, square, *numbers)


def _square_of_change(
    new: Tensor, mean: Tensor, square: Tensor, rate: Tensor, correction: Tensor, epsilon: Tensor, kept: Tensor
) -> Tensor:
    """Return the sum of squares of what a step of AdamW changed, from what it left; numbers are fp64 scalars."""
    # new = kept * old - rate * mean / denominator, rounded twice: so the nearest is what was there.
    denominator = (square.double() / correction).sqrt() + epsilon
    decayed = (new + rate * mean.double() / denominator).to(new.dtype)
    old = (decayed.double() / kept).to(new.dtype)
    return (new - old).double().square().sum()


@cache
def _compiled_change() -> Callable[..., Tensor]:
    return torch.compile(_square_of_change)


def _kept_by_decay(group: dict[str, Any], weight: Tensor) -> float:
    """Return what decoupled decay multiplies weights by; torch's kernel for CPUs rounds it as the weights."""
    kept = 1 - group["lr"] * group["weight_decay"]
    return float(torch.tensor(kept, dtype=weight.dtype)) if weight.device.type == "cpu" else kept


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
