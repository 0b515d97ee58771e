"""The process PixArt trains on: noise in discrete timesteps, noise prediction, learned variance, hybrid loss.

DDPM is Ho et al. 2020, IDDPM is Nichol & Dhariwal 2021, min-SNR is Hang et al. 2023, LCM is Luo et al. 2023.
"""

# B batch, C latent channels, h x w latent size, T number of timesteps

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from pixart.processes.dpm_solver import dpm_solver
from pixart.processes.process import ProcessLoss
from pixart.processes.specs import DDPM_SCHEDULE, ddpm_spec, lcm_student, require_solver
from pixart.processes.timesteps import timestep_probabilities

NATS_PER_BIT = math.log(2.0)
EIGHT_BIT_STEP = 2 / 255  # one of 256 levels when values span [-1, 1]
# zero to fp32; at zero itself SA-Solver's coefficients are not finite
LAST_SIGMA = 1e-8


class DDPM:
    """Forward process q and training loss for T discrete timesteps 0 ... T-1, all in fp32.

    `schedule` is in the words of diffusers' schedulers. `min_snr_gamma` caps the squared error's weight at high
    signal-to-noise ratio (min-SNR, 5 is usual). `sampler` sets diffusers' DPM-Solver++ otherwise than it is by itself.
    `times_density` makes the timesteps trained at logit-normal, as `ddpm_spec` says; without it all are alike.
    `student` says what a network that was distilled was made for, see `lcm_student`; it is drawn with LCM.
    """

    def __init__(
        self,
        schedule: Mapping[str, Any] = DDPM_SCHEDULE,
        *,
        min_snr_gamma: float | None = None,
        times_density: Mapping[str, Any] | None = None,
        sampler: Mapping[str, Any] | None = None,
        student: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        betas = _betas(schedule)
        alphas_cumprod = (1 - betas).cumprod(0)
        previous_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = betas * (1 - previous_cumprod) / (1 - alphas_cumprod)  # DDPM eq. 7
        # zero at t = 0, where x_0 is known: the next one stands in so that the log exists
        posterior[0] = posterior[1]

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.schedule = dict(schedule)
        self.min_snr_gamma = min_snr_gamma
        self.sampler = dict(sampler or {})
        self.student = None if student is None else dict(student)
        self.num_times = len(betas)
        self.times_density = None if times_density is None else dict(times_density)
        self._cumulative, self._importance = None, None
        if times_density is not None:
            probabilities = timestep_probabilities(self.num_times, **times_density)
            self._cumulative = probabilities.cumsum(0).to(device)
            self._importance = table(1 / (self.num_times * probabilities)) if times_density["is_weighted"] else None
        self.alphas_cumprod = table(alphas_cumprod)
        self.sqrt_alphas_cumprod = table(alphas_cumprod.sqrt())
        self.sqrt_one_minus_alphas_cumprod = table((1 - alphas_cumprod).sqrt())
        self.log_betas = table(betas.log())
        self.log_posterior_variances = table(posterior.log())
        # d mean / d noise in the reverse step, DDPM eq. 11
        self.mean_per_noise = table(betas / ((1 - betas) * (1 - alphas_cumprod)).sqrt())

    @property
    def spec(self) -> dict[str, Any]:
        """All that makes this process again, as JSON."""
        return ddpm_spec(
            self.schedule,
            min_snr_gamma=self.min_snr_gamma,
            times_density=self.times_density,
            sampler=self.sampler,
            student=self.student,
        )

    def out_channels(self, channels: int) -> int:
        """Channels of the output: those of the noise, and as many of the variance."""
        return 2 * channels

    def times(self, draws: Tensor) -> Tensor:
        """Timesteps int64 [B] from uniform `draws` [B]: each as likely as any other, or as `times_density` says."""
        if self._cumulative is None:
            return (draws * self.num_times).long()
        times = torch.searchsorted(self._cumulative, draws.double(), right=True)
        return times.clamp(max=self.num_times - 1)  # the sum of all probabilities is rounded

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noisy latents at timesteps `times` [B], fp32 [B, C, h, w] (DDPM eq. 4)."""
        signal = _per_sample(self.sqrt_alphas_cumprod, times)
        spread = _per_sample(self.sqrt_one_minus_alphas_cumprod, times)
        return signal * latents.float() + spread * noise.float()

    def clean(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Estimate of the latents [B, C, h, w] without noise, fp32 (DDPM eq. 4, solved for x_0)."""
        spread = _per_sample(self.sqrt_one_minus_alphas_cumprod, times) * self.noise(output, noisy, times)
        return (noisy.float() - spread) / _per_sample(self.sqrt_alphas_cumprod, times)

    def noise(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Estimate of the noise [B, C, h, w], fp32: the output's first half."""
        return output[:, : noisy.shape[1]].float()

    def log_variance(self, variance_output: Tensor, times: Tensor) -> Tensor:
        """Log variance of the reverse step, between its two bounds as the model says (IDDPM eq. 15).

        `variance_output` [B, C, h, w] is -1 at the lower bound (the posterior's variance) and 1 at the upper (beta).
        """
        fraction = (variance_output.float() + 1) / 2
        upper = _per_sample(self.log_betas, times)
        lower = _per_sample(self.log_posterior_variances, times)
        return fraction * upper + (1 - fraction) * lower

    def loss(self, output: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> ProcessLoss:
        """Hybrid loss of a model's output [B, 2C, h, w] for `noise` [B, C, h, w] (IDDPM eq. 16).

        Its parts are `mse` of the noise and `vlb`, the variational bound in bits per value. The noise learns from its
        squared error alone, the variance from the bound alone. The bound of one timestep is weighted T/1000: IDDPM's
        lambda = 0.001 times the T terms one of them stands for. `latents` do not matter once the noise is known.
        Where `times_density` is weighted, a loss counts as much more as its timestep is less likely than on average.
        """
        noise_output, variance_output = output.float().chunk(2, dim=1)
        noise_error = noise_output - noise.float()
        mse = noise_error.square().flatten(1).mean(1)
        vlb = self.vlb_term(noise_error.detach(), variance_output, times)
        weight = 1.0
        if self.min_snr_gamma is not None:
            snr = self.alphas_cumprod[times] / (1 - self.alphas_cumprod[times])
            weight = snr.clamp(max=self.min_snr_gamma) / snr
        total = weight * mse + self.num_times / 1000 * vlb
        if self._importance is not None:
            total = self._importance[times] * total
        return ProcessLoss(total, {"mse": mse, "vlb": vlb})

    def vlb_term(self, noise_error: Tensor, variance_output: Tensor, times: Tensor) -> Tensor:
        """Term of the variational bound at each sample's timestep, bits per value [B] (IDDPM eq. 4-6).

        For t > 0 KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), whose means differ by a multiple of the noise's error.
        For t = 0 the negative log likelihood of x_0: the density times an 8-bit step, where IDDPM integrates the
        density over 256 bins of which the outer two are open. The two differ: latents are continuous, lie outside
        [-1, 1], too, and their deviation at t = 0, sqrt(beta_0) = 0.01, is little more than a bin.
        """
        log_variance = self.log_variance(variance_output, times)
        squared_distance = (_per_sample(self.mean_per_noise, times) * noise_error).square()
        log_posterior = _per_sample(self.log_posterior_variances, times)
        log_ratio = log_variance - log_posterior
        divergence = 0.5 * (log_ratio + torch.exp(-log_ratio) - 1 + squared_distance * torch.exp(-log_variance))
        surprise = 0.5 * (math.log(2 * math.pi) + log_variance + squared_distance * torch.exp(-log_variance))
        surprise = surprise - math.log(EIGHT_BIT_STEP)
        is_first = (times == 0)[:, None, None, None]
        return torch.where(is_first, surprise, divergence).flatten(1).mean(1) / NATS_PER_BIT

    def scheduler(self, solver: str, num_steps: int, *, times: Sequence[int] | None = None) -> Any:
        """Diffusers' scheduler of one of the paper's three sampling algorithms (A.5) or of LCM, its timesteps set.

        "dpm-solver++" is second-order multistep DPM-Solver++ (Lu et al. 2022), "iddpm" the ancestral sampler with
        learned variance and respaced timesteps (Nichol & Dhariwal 2021), "sa-solver" stochastic Adams (Xue et al.
        2023). "lcm" is for students: each step estimates the clean latents and adds the noise of the next (Luo et al.
        2023), at `times` where they are given.

        Raises:
            UserError: the solver is of another process, or takes not so many steps.
        """
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        from diffusers.schedulers.scheduling_lcm import LCMScheduler
        from diffusers.schedulers.scheduling_sasolver import SASolverScheduler

        require_solver(self.spec, solver, num_steps=num_steps, times=times)
        match solver:
            case "iddpm":
                scheduler = DDPMScheduler(
                    **self.schedule, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
                )
            case "sa-solver":
                scheduler = SASolverScheduler(**self.schedule)
            case "lcm":
                scheduler = LCMScheduler(**self.schedule, **self._lcm_settings())
            case _:
                return dpm_solver({**self.schedule, **self.sampler}, num_steps)
        scheduler.set_timesteps(num_steps)
        if times is not None:
            # As diffusers sets them, which would say with every batch that they are not the usual ones.
            scheduler.timesteps = torch.tensor(times)
        if solver == "sa-solver":
            scheduler.sigmas[-1] = LAST_SIGMA  # diffusers leaves in the noise of timestep 0
        return scheduler

    def scheduler_config(self) -> dict[str, Any]:
        """What `scheduler/scheduler_config.json` must say for diffusers to draw: by LCM or by DPM-Solver++."""
        if self.student is not None:
            return {
                "_class_name": "LCMScheduler",
                **self.schedule,
                **self._lcm_settings(),
                "prediction_type": "epsilon",
            }
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            **self.schedule,
            **self.sampler,
            "prediction_type": "epsilon",
        }

    def _lcm_settings(self) -> dict[str, Any]:
        """Return the settings of diffusers' LCM; of a network that nobody says is a student those as published."""
        student = self.student or lcm_student(guidance=None)
        return {
            "original_inference_steps": student["num_teacher_steps"],
            "timestep_scaling": student["timestep_scaling"],
        }


def _betas(schedule: Mapping[str, Any]) -> Tensor:
    """Variance that each timestep adds, fp64 [T]; schedules other than ours are computed by diffusers, in fp32."""
    if schedule["beta_schedule"] == "linear":
        return torch.linspace(
            schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"], dtype=torch.float64
        )
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    try:
        return DDPMScheduler(**schedule).betas.double()
    except NotImplementedError:
        raise UserError(f"process ddpm: beta_schedule {schedule['beta_schedule']} is not known") from None


def _per_sample(table: Tensor, times: Tensor) -> Tensor:
    return table[times][:, None, None, None]  # [B, 1, 1, 1]
