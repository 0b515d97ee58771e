"""What every objective says of itself: the networks it works with, what it reads, and the loss of each sample."""

# B samples of a micro-batch

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from training.data.batch import Batch


@dataclass(frozen=True)
class Trained:
    """The network that the stage trains and whose average it exports; an objective has exactly one.

    With `critic`, the name of a frozen network, a copy of that trains beside it by a loss of its own
    (`Losses.critic`): it is the network's module `critic`, and nothing exports it. That of a codec is made with it.
    """

    critic: str | None = None


@dataclass(frozen=True)
class Frozen:
    """A network whose weights `training.<stage>.networks` names and nothing changes, such as a teacher."""


@dataclass(frozen=True)
class Average:
    """The average of the trained network's weights (EMA) after the last update, as a network to run forward with."""


Role = Trained | Frozen | Average


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a micro-batch's samples.

    Attributes:
        total: what is minimised, fp32 [B].
        parts: what it is made of, by the names that metrics give them, fp32 [B] each.
        times: how far each sample is on its way from latents (0) to noise (1), float64 [B]; metrics sort by it.
        critic: what the critic minimises, fp32 [B], where there is one; no weight but its own has a part in it, and it
            has none in the total.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    times: Tensor
    critic: Tensor | None = None

    @property
    def minimised(self) -> Tensor:
        """What is run backward, fp32 [B]: the losses of all that trains, as their gradients do not meet."""
        return self.total if self.critic is None else self.total + self.critic


class Objective(Protocol):
    """What is minimised. Optimizer, average, checkpoints, memory and resume follow from what it says of itself."""

    @property
    def networks(self) -> Mapping[str, Role]:
        """The networks it works with, by the names that `loss` gets them under."""
        ...

    @property
    def families(self) -> tuple[str, ...]:
        """The families of features it reads of a batch: `latents`, and `labels` or `text`; or `pixels`."""
        ...

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Return the losses of a batch's samples, on the device and in the precision the networks have.

        It may ask for a network only where all ranks do: an average is gathered from them when it is asked for.
        """
        ...
