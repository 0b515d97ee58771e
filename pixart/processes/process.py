"""What every process can do; `ddpm.py`, `flow.py` and `noise_flow.py` are those there are.

`make.py` makes one of its spec.
"""

# B batch, C latent channels, h x w latent size

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class ProcessLoss:
    """Losses of each sample, fp32 [B]: `total` is what to minimise, `parts` what it is made of, by name.

    Every process has the part `mse`, the squared error of what the network predicts.
    """

    total: Tensor
    parts: Mapping[str, Tensor]


class Process(Protocol):
    """A way from latents to noise, and what a network learns of it in order to go back.

    `times` [B] are what the network is told: between 0, where there is no noise, and `num_times`, where there is
    nothing else. `output` is what the network says, [B, out_channels(C), h, w].
    """

    @property
    def spec(self) -> dict[str, Any]:
        """All that makes this process again, as JSON: name, prediction, schedule and what else it was made with."""
        ...

    @property
    def num_times(self) -> int:
        """The largest time, exclusive where times are whole numbers."""
        ...

    def out_channels(self, channels: int) -> int:
        """Channels of the output of a network for latents of so many channels."""
        ...

    def times(self, draws: Tensor) -> Tensor:
        """Times [B] to train at, from `draws` [B] that are uniform in [0, 1)."""
        ...

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents [B, C, h, w] as they are at `times` with this noise [B, C, h, w], fp32."""
        ...

    def loss(self, output: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> ProcessLoss:
        """Loss of what the network said of `noisy(latents, noise, times)`."""
        ...

    def clean(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Estimate of the latents [B, C, h, w] without noise, fp32."""
        ...

    def noise(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Estimate of the noise [B, C, h, w], fp32."""
        ...

    def scheduler(self, solver: str, num_steps: int, *, times: Sequence[int] | None = None) -> Any:
        """Diffusers' scheduler of a solver, its timesteps set; good for one batch, for it remembers earlier steps.

        `times` are those of the steps, where the solver lets them be chosen: lcm alone.

        Raises:
            UserError: the solver is not one of this process, or takes not so many steps.
        """
        ...

    def scheduler_config(self) -> dict[str, Any]:
        """What `scheduler/scheduler_config.json` must say for diffusers to draw with the default solver."""
        ...
