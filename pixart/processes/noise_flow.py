"""Rectified flow of a network that predicts the noise: weights of process ddpm go on as flow, with all they know.

A point of flow's line, x_sigma = (1 - sigma) x_0 + sigma noise, is one of ddpm's but for a factor: of the timestep at
which sqrt(1 - alpha_bar) / sqrt(alpha_bar) = sigma / (1 - sigma), it is sqrt((1 - sigma)^2 + sigma^2) times as large
(Diff2Flow, Schusterbauer et al. 2025). So the network stays in its own coordinates. It sees ddpm's noisy latents and is
told ddpm's timesteps, and what it says of the noise is a velocity: (noise - x_sigma) / (1 - sigma), whose error is that
of the noise divided by 1 - sigma. Flow says where it trains, how much an error counts, and which steps are drawn at.
"""

# B batch, T number of timesteps

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pixart.processes.ddpm import DDPM
from pixart.processes.dpm_solver import dpm_solver
from pixart.processes.flow import Flow
from pixart.processes.process import ProcessLoss
from pixart.processes.specs import DDPM_SCHEDULE, NOISE_FLOW_SOLVERS, noise_flow_spec, require_solver


class NoiseFlow(DDPM):
    """Process ddpm with flow's times, flow's loss and flow's steps.

    Each sigma is taken to the timestep that is nearest to it in signal to noise: a network knows whole timesteps alone,
    and the line has no others that count. They end at sigma 0.01 and 0.994 (of the published schedule), between which
    1 / (1 - sigma) is at most 158; beyond the last one a velocity cannot be told from any network's error of the noise.
    `shift`, `logit_mean` and `logit_std` are as of `Flow`; `network_schedule` is the one that the network was trained
    with, in the words of diffusers' schedulers.
    """

    def __init__(
        self,
        *,
        shift: float = 1.0,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        network_schedule: Mapping[str, Any] = DDPM_SCHEDULE,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(network_schedule, device=device)
        self.flow = Flow(shift=shift, logit_mean=logit_mean, logit_std=logit_std)
        # noise by signal at each timestep: sigma / (1 - sigma) [T]
        self.noise_per_signal = self.sqrt_one_minus_alphas_cumprod / self.sqrt_alphas_cumprod
        self._between = (self.noise_per_signal[1:] * self.noise_per_signal[:-1]).sqrt()

    @property
    def spec(self) -> dict[str, Any]:
        """All that makes this process again, as JSON."""
        flow = self.flow
        return noise_flow_spec(
            shift=flow.shift, logit_mean=flow.logit_mean, logit_std=flow.logit_std, network_schedule=self.schedule
        )

    def times(self, draws: Tensor) -> Tensor:
        """Timesteps int64 [B] from uniform `draws` [B]: those nearest to logit-normal sigmas, shifted."""
        return self._nearest(self.flow.times(draws) / self.flow.num_times)

    def loss(self, output: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> ProcessLoss:
        """Squared error of the velocity, and the variational bound, from which the variance alone learns (IDDPM).

        Its parts are `velocity`, `vlb` and, of the noise that the network predicts, `mse`.
        """
        parts = super().loss(output, latents, noise, times).parts
        # d velocity / d noise = 1 / (1 - sigma) = 1 + sigma / (1 - sigma)
        velocity = (1 + self.noise_per_signal[times]).square() * parts["mse"]
        return ProcessLoss(velocity + self.num_times / 1000 * parts["vlb"], {**parts, "velocity": velocity})

    def scheduler(self, solver: str, num_steps: int, *, times: Sequence[int] | None = None) -> Any:
        """Diffusers' scheduler of a solver, its timesteps set.

        "dpm-solver++" and "euler" take flow's steps. DPM-Solver++ knows of a step its two ratios of signal to noise
        alone, so that in ddpm's coordinates it is what it is in flow's; at first order it is Euler's step of flow, from
        and to what the network says of latents and noise. "iddpm" and "sa-solver" are as of ddpm.

        Raises:
            UserError: the solver is of another process, or takes not so many steps.
        """
        require_solver(self.spec, solver, num_steps=num_steps, times=times)
        if solver not in NOISE_FLOW_SOLVERS[:2]:
            return super().scheduler(solver, num_steps, times=times)
        order = {"solver_order": 1} if solver == "euler" else {}
        return dpm_solver({**self.schedule, **order}, num_steps, times=self._steps(num_steps))

    def _steps(self, num_steps: int) -> list[int]:
        """Return the timesteps of equal steps of sigma before the shift, from the last timestep's down.

        Where these are nearer to each other than timesteps are, the steps are timesteps.
        """
        flow, last = self.flow, float(self.noise_per_signal[-1])
        first = last / (last + flow.shift)  # its sigma before the shift
        sigmas = flow.shifted(first * torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64))
        numbers = torch.arange(num_steps)
        falling = (self._nearest(sigmas.float().to(self._between.device)).cpu() + numbers).cummin(0).values - numbers
        return falling.maximum(numbers.flip(0)).tolist()

    def _nearest(self, sigmas: Tensor) -> Tensor:
        """Return the timesteps int64 that are nearest to sigmas in the logarithm of noise by signal."""
        return torch.bucketize(sigmas / (1 - sigmas), self._between)
