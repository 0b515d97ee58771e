"""What the loop asks of an optimizer beyond what torch's are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.config import StageTraining
from training.loop.layout import Layout
from training.stages.critics import PREFIX as CRITICS

# Of a group of weights: what the stage's learning rate is multiplied by for them.
RATE_FACTOR = "rate_factor"


def weight_groups(weights: Mapping[str, nn.Parameter], settings: StageTraining) -> list[dict[str, Any]]:
    """Return weights as torch's optimizers take them: those of a critic are a group at a rate of its own."""
    critics = [weight for name, weight in weights.items() if name.startswith(CRITICS)]
    groups: list[dict[str, Any]] = [
        {"params": [weight for name, weight in weights.items() if not name.startswith(CRITICS)]}
    ]
    if critics:
        factor = settings.critic_learning_rate / settings.learning_rate
        groups.append({"params": critics, RATE_FACTOR: factor})
    return groups


def networks_of(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return for each of an optimizer's groups the number of the network it is of: 0, or 1 of a critic."""
    return [int(RATE_FACTOR in group) for group in groups]


def let_zero_shard(kind: type[Optimizer]) -> None:
    """Tell DeepSpeed that an optimizer of ours may be given shares of weights."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if kind not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(kind)


class Rule(Protocol):
    """How an optimizer is made and measured.

    Its step divides gradients by its attribute `grad_scale` and changes nothing where `found_inf` is 1: scalars beside
    the masters, which the host does not see, as torch's GradScaler gives them to its fused optimizers.
    """

    def make(self, weights: Mapping[str, nn.Parameter], settings: StageTraining) -> Optimizer:
        """Return the optimizer of a stage's weights, which come by name."""
        ...

    def place(self, optimizer: Optimizer, layouts: Sequence[Layout], *, device: torch.device) -> None:
        """Tell the optimizer where in masters weights lie, once ZeRO has shared them out; networks are on `device`."""
        ...

    def prepare(self, optimizer: Optimizer) -> None:
        """Bring the state in its own form, before one is loaded and after: what loading needs to know of it is there.

        DeepSpeed loads a state of other ranks as if it were AdamW's.
        """
        ...

    def first_moment(self, optimizer: Optimizer, weight: Tensor) -> Tensor:
        """Return the average of a weight's gradients, fp32 in its shape; zeros before the first step."""
        ...

    def measure(self, optimizer: Optimizer, change: Tensor, *, is_compiled: bool) -> Callable[[], None]:
        """Let steps add the sum of squares of what they change to `change`, a scalar; what is returned ends it."""
        ...
