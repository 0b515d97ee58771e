"""What this room's trainings share: Muon for matrices, AdamW for the rest, one curve of rates, averaged weights."""

import math
from collections.abc import Iterable
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, "Muon"


def _orthogonalize(update: Tensor) -> Tensor:
    """Replace the singular values of a matrix by about one (five Newton-Schulz steps in bf16)."""
    a, b, c = _NEWTON_SCHULZ
    x = update.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for weights of two or more dimensions (convolutions are flattened).

    In the toy world it reaches a given loss in about a third of AdamW's steps; torch's own takes only matrices.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = 0.2 * math.sqrt(max(nesterov.shape))  # the size of an AdamW update
                weight.add_(_orthogonalize(nesterov).view_as(weight), alpha=-group["lr"] * scale)


class Trainer(Generic[ModelT]):
    """Optimizers, learning-rate curve and averaged weights of one training of fixed length."""

    def __init__(self, model: ModelT, *, num_steps: int, learning_rate: float, average_decay: float = 0.99) -> None:
        weights = [p for p in model.parameters() if p.requires_grad]
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in weights if p.ndim >= 2 and id(p) not in embeddings]
        others = [p for p in weights if p.ndim < 2 or id(p) in embeddings]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=learning_rate),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._model = model
        self._weights = weights
        self._num_steps = num_steps
        self._learning_rate = learning_rate
        self._num_done = 0
        self._averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(average_decay)
        )

    def step(self, loss: Tensor) -> None:
        """One update from this loss: clip to norm 1, step, average."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate * self._lr_factor()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._num_done += 1
        self._averaged.update_parameters(self._model)

    @property
    def averaged(self) -> ModelT:
        """The model with averaged weights: what is shipped."""
        return cast(ModelT, self._averaged.module)

    def _lr_factor(self) -> float:
        warm_up = min(1.0, (self._num_done + 1) / 50)
        return warm_up * 0.5 * (1 + math.cos(math.pi * self._num_done / self._num_steps))
