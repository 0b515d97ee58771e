"""Rectified flow: straight lines from latents to noise, of which the network predicts the velocity.

Rectified flow is Liu et al. 2022; logit-normal times and the shift are Esser et al. 2024 (Stable Diffusion 3); LCM is
Luo et al. 2023.
"""

# B batch, C latent channels, h x w latent size

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from pixart.processes.dpm_solver import dpm_solver
from pixart.processes.process import ProcessLoss
from pixart.processes.specs import FLOW_LCM_SAMPLER, FLOW_NUM_TIMES, flow_spec, require_solver

# Keeps the normal quantile of a uniform draw finite; 53 bits of it are random.
SMALLEST_DRAW = 2.0**-53


class Flow:
    """x_sigma = (1 - sigma) x_0 + sigma noise for sigma in [0, 1], in fp32; the network is told sigma * 1000.

    Sigmas to train at are logit-normal, sigmoid(`logit_mean` + `logit_std` * normal), and then shifted, as are those
    that are drawn at: shift * sigma / (1 + (shift - 1) * sigma) (SD3 eq. 23). A larger `shift` trains and draws more
    among the noisy ones, as larger images want. `sampler` sets diffusers' DPM-Solver++ otherwise than it is by itself.
    `student` says what a network that was distilled was made for, see `flow_student`; it is drawn with "lcm".
    """

    num_times = FLOW_NUM_TIMES

    def __init__(
        self,
        *,
        shift: float = 1.0,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        sampler: Mapping[str, Any] | None = None,
        student: Mapping[str, Any] | None = None,
    ) -> None:
        if not (shift > 0 and logit_std > 0):
            raise UserError(f"process flow: shift {shift} and logit_std {logit_std} must be positive")
        self.shift = shift
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.sampler = dict(sampler or {})
        self.student = None if student is None else dict(student)

    @property
    def spec(self) -> dict[str, Any]:
        """All that makes this process again, as JSON."""
        return flow_spec(
            shift=self.shift,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            sampler=self.sampler,
            student=self.student,
        )

    def out_channels(self, channels: int) -> int:
        """Channels of the output: as many as the latents have."""
        return channels

    def times(self, draws: Tensor) -> Tensor:
        """Times fp32 [B] from uniform `draws` [B]: a logit-normal sigma, shifted (SD3 eq. 19 and 23)."""
        normal = torch.special.ndtri(draws.double().clamp(SMALLEST_DRAW, 1 - SMALLEST_DRAW))
        sigmas = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return (self.num_times * self.shifted(sigmas)).float()

    def shifted(self, sigmas: Tensor) -> Tensor:
        """Sigmas moved towards the noise by the shift, 0 and 1 staying where they are (SD3 eq. 23)."""
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The point of the line from latents to noise at `times` [B], fp32 [B, C, h, w]."""
        sigmas = self._sigmas(times)
        return (1 - sigmas) * latents.float() + sigmas * noise.float()

    def loss(self, output: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> ProcessLoss:
        """Squared error of the velocity, d x_sigma / d sigma = noise - latents; its only part is `mse`."""
        mse = (output.float() - (noise.float() - latents.float())).square().flatten(1).mean(1)
        return ProcessLoss(mse, {"mse": mse})

    def clean(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Estimate of the latents [B, C, h, w] without noise, fp32: back along the velocity to sigma 0."""
        return noisy.float() - self._sigmas(times) * output.float()

    def noise(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Estimate of the noise [B, C, h, w], fp32: on along the velocity to sigma 1."""
        return noisy.float() + (1 - self._sigmas(times)) * output.float()

    def scheduler(self, solver: str, num_steps: int, *, times: Sequence[int] | None = None) -> Any:
        """Diffusers' scheduler of a solver of the velocity's equation, its timesteps set.

        "dpm-solver++" is second-order multistep DPM-Solver++ (Lu et al. 2022) on flow's sigmas; "euler" and "heun" go
        down equal steps of sigma before the shift. Heun asks the network twice a step, but once for the last. "lcm" is
        for students: each step estimates the clean latents and adds noise to the next sigma (Luo et al. 2023), all of
        it new in the first and in later ones but a part: the first order of DPM-Solver++'s stochastic equation. Its
        every step keeps what is noisy in distribution, as adding new noise alone does, for which diffusers has
        FlowMatchLCMScheduler; but no pipeline of PixArt can drive that, and its last step is taken at sigma 0.001.

        Raises:
            UserError: the solver is of another process, or takes not so many steps.
        """
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
        from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler

        require_solver(self.spec, solver, num_steps=num_steps, times=times)
        match solver:
            case "euler":
                scheduler = FlowMatchEulerDiscreteScheduler(self.num_times, shift=self.shift)
                scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
            case "heun":
                scheduler = FlowMatchHeunDiscreteScheduler(self.num_times, shift=self.shift)
                # diffusers would shift the smallest sigma twice, and take a step of its own from it
                scheduler.sigma_min, scheduler.sigma_max = 1 / num_steps, 1.0
                scheduler.set_timesteps(num_steps)
            case "lcm":
                scheduler = dpm_solver(self._dpm_solver_settings(FLOW_LCM_SAMPLER), num_steps)
                if times is not None:
                    scheduler.timesteps = torch.tensor(times)
                    scheduler.sigmas = torch.tensor([*times, 0]) / self.num_times
            case _:
                scheduler = dpm_solver(self._dpm_solver_settings(self.sampler), num_steps)
        # its whole timesteps may repeat, and diffusers would look up where it is
        scheduler.set_begin_index(0)
        return scheduler

    def scheduler_config(self) -> dict[str, Any]:
        """What `scheduler/scheduler_config.json` must say for diffusers to draw: with DPM-Solver++, as students are."""
        sampler = self.sampler if self.student is None else FLOW_LCM_SAMPLER
        return {"_class_name": "DPMSolverMultistepScheduler", **self._dpm_solver_settings(sampler)}

    def _dpm_solver_settings(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "num_train_timesteps": self.num_times,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": self.shift,
            **sampler,
        }

    def _sigmas(self, times: Tensor) -> Tensor:
        return (times.float() / self.num_times)[:, None, None, None]  # [B, 1, 1, 1]
