"""Norms over all master weights: what an update really did to them, and whether they are sound."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from training.loop.compilation import is_step_compiled
from training.loop.sizes import PIECE_SIZE
from training.loop.zero import ZeroModel


class UpdateMeter:
    """Measures the next update where it is made: in the optimizer, whose share of the weights ZeRO decides.

    It keeps no copy of anything: the optimizer's rule knows what a step changed.
    """

    def __init__(self, model: ZeroModel) -> None:
        self._model = model
        self._gradient = torch.zeros((), dtype=torch.float64, device=model.device)  # sums of squares
        self._change = torch.zeros_like(self._gradient)
        self._end = model.rule.measure(model.optimizer, self._change, is_compiled=is_step_compiled(model.settings))
        self._hook = model.optimizer.register_step_pre_hook(lambda optimizer, *_: self._add_gradient(optimizer))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def norms(self) -> tuple[float, float]:
        """Return the norms of the change of all masters and of the gradient as it was stepped with; ends measuring.

        Both are 0 for an update that was skipped; all ranks must call it.
        """
        self._hook.remove()
        self._end()
        optimizer = vars(self._model.optimizer)
        squares = torch.stack([self._change, self._gradient / optimizer["grad_scale"].double().square()])
        sums = _sum_over_ranks(self._model, torch.where(optimizer["found_inf"].to(self.device) == 0, squares, 0.0))
        change, gradient = sums.sqrt().tolist()
        return change, gradient

    @torch.no_grad()
    def _add_gradient(self, optimizer: Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for gradient in [weight.grad for weight in weights if weight.grad is not None]:
            pieces = gradient.flatten().split(PIECE_SIZE)
            norms = torch.ops.aten._foreach_norm.Scalar(pieces, 2, torch.float32)
            self._gradient += torch.stack(norms).double().square().sum()


def total_norm(model: ZeroModel, tensors: Iterable[Tensor]) -> float:
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
