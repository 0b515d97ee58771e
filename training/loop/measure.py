"""Norms over all master weights: what an update really did to them, and whether they are sound."""

import torch
import torch.distributed as dist
from torch import Tensor

from training.loop.zero import ZeroModel


class UpdateMeter:
    """Compares weights and Adam's first moments with what they were when this was made, just before an update."""

    def __init__(self, model: ZeroModel) -> None:
        self._model = model
        self._masters = [master.detach().clone() for master in model.masters]
        self._moments = [moment.clone() for moment in model.first_moments()]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def update_norm(self) -> float:
        """Return the norm of the change of all master weights."""
        pairs = zip(self._model.masters, self._masters, strict=True)
        return total_norm(self._model, [new.detach() - old for new, old in pairs])

    def clipped_gradient_norm(self) -> float:
        """Return the norm of the gradient as Adam got it, clipped: m_new = beta1 * m_old + (1 - beta1) * gradient."""
        beta = self._model.settings.adam_betas[0]
        pairs = zip(self._model.first_moments(), self._moments, strict=True)
        return total_norm(self._model, [(new - beta * old) / (1 - beta) for new, old in pairs])


def total_norm(model: ZeroModel, tensors: list[Tensor]) -> float:
    """Return the norm over all tensors of all ranks that are shaped as `model.masters`; all ranks must call it."""
    return _sum_over_ranks(model, [tensor.square().sum().double() for tensor in tensors]) ** 0.5


def count_non_finite(model: ZeroModel) -> int:
    """Return how many master weights are not finite; all ranks must call it."""
    return int(_sum_over_ranks(model, [master.isfinite().logical_not().sum().double() for master in model.masters]))


def _sum_over_ranks(model: ZeroModel, values: list[Tensor]) -> float:
    total = torch.stack(values).sum()
    if model.is_sharded:
        dist.all_reduce(total)
    return float(total)
