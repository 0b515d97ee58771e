"""AdamW as torch fuses it, with moments in fp32."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.config import StageTraining
from training.loop.layout import Layout
from training.loop.optimizers.rule import weight_groups
from training.loop.sizes import PIECE_SIZE


class TorchAdamW:
    """Measured without a copy of anything: what weights were is worked out from what a step left, piece by piece."""

    def make(self, weights: Mapping[str, nn.Parameter], settings: StageTraining) -> Optimizer:
        """Return torch's fused AdamW."""
        return torch.optim.AdamW(
            weight_groups(weights, settings),
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def place(self, optimizer: Optimizer, layouts: Sequence[Layout], *, device: torch.device) -> None:
        """Do nothing: it is element by element."""

    def prepare(self, optimizer: Optimizer) -> None:
        """Do nothing: all state is in the precision of the masters."""

    def first_moment(self, optimizer: Optimizer, weight: Tensor) -> Tensor:
        """Return the state itself."""
        return optimizer.state.get(weight, {}).get("exp_avg", torch.zeros_like(weight))

    def measure(self, optimizer: Optimizer, change: Tensor, *, is_compiled: bool) -> Callable[[], None]:
        """Add to `change` after each step, from what it left."""
        hook = optimizer.register_step_post_hook(lambda adamw, *_: _add_change(adamw, change, is_compiled=is_compiled))
        return hook.remove


@torch.no_grad()
def _add_change(adamw: Optimizer, change: Tensor, *, is_compiled: bool) -> None:
    measure = _compiled_change() if is_compiled else _square_of_change
    for group, weight in _stepped(adamw):
        (beta1, beta2), state = group["betas"], adamw.state[weight]
        step = state["step"].double()
        # Numbers that differ from step to step are tensors: compiled code takes others without being compiled anew.
        numbers = (
            group["lr"] / (1 - beta1**step),
            1 - beta2**step,
            step.new_full((), group["eps"]),
            step.new_full((), _kept_by_decay(group, weight)),
        )
        size = weight.numel() if is_compiled else PIECE_SIZE
        tensors = (weight, state["exp_avg"], state["exp_avg_sq"])
        split = (tensor.detach().flatten().split(size) for tensor in tensors)
        for new, mean, square in zip(*split, strict=True):
            change += measure(new, mean, square, *numbers)


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


def _stepped(adamw: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield group and weight of what a step was of."""
    for group in adamw.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                yield group, weight
