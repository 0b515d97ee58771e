"""The diffusion process PixArt trains on: linear schedule, noise prediction, learned variance, hybrid loss.

DDPM is Ho et al. 2020, IDDPM is Nichol & Dhariwal 2021, min-SNR is Hang et al. 2023.
"""

# B batch, C latent channels, h x w latent size, T number of timesteps

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NATS_PER_BIT = math.log(2.0)
EIGHT_BIT_STEP = 2 / 255  # one of 256 levels when values span [-1, 1]


@dataclass(frozen=True)
class DiffusionLoss:
    """Losses of each sample, fp32 [B]: `total` is what to minimise, `mse` of the noise, `vlb` in bits per value."""

    total: Tensor
    mse: Tensor
    vlb: Tensor


class Diffusion:
    """Forward process q and training loss for T discrete timesteps 0 ... T-1, all in fp32."""

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        device: torch.device | str = "cpu",
    ) -> None:
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        alphas_cumprod = (1 - betas).cumprod(0)
        previous_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = betas * (1 - previous_cumprod) / (1 - alphas_cumprod)  # DDPM eq. 7
        # zero at t = 0, where x_0 is known: the next one stands in so that the log exists
        posterior[0] = posterior[1]

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.num_train_timesteps = num_train_timesteps
        self.alphas_cumprod = table(alphas_cumprod)
        self.sqrt_alphas_cumprod = table(alphas_cumprod.sqrt())
        self.sqrt_one_minus_alphas_cumprod = table((1 - alphas_cumprod).sqrt())
        self.log_betas = table(betas.log())
        self.log_posterior_variances = table(posterior.log())
        # d mean / d noise in the reverse step, DDPM eq. 11
        self.mean_per_noise = table(betas / ((1 - betas) * (1 - alphas_cumprod)).sqrt())

    def q_sample(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at `timesteps` [B], fp32 [B, C, h, w] (DDPM eq. 4)."""
        signal = _per_sample(self.sqrt_alphas_cumprod, timesteps)
        spread = _per_sample(self.sqrt_one_minus_alphas_cumprod, timesteps)
        return signal * latents.float() + spread * noise.float()

    def log_variance(self, variance_output: Tensor, timesteps: Tensor) -> Tensor:
        """Log variance of the reverse step, between its two bounds as the model says (IDDPM eq. 15).

        `variance_output` [B, C, h, w] is -1 at the lower bound (the posterior's variance) and 1 at the upper (beta).
        """
        fraction = (variance_output.float() + 1) / 2
        upper = _per_sample(self.log_betas, timesteps)
        lower = _per_sample(self.log_posterior_variances, timesteps)
        return fraction * upper + (1 - fraction) * lower

    def loss(
        self, output: Tensor, noise: Tensor, timesteps: Tensor, *, min_snr_gamma: float | None = None
    ) -> DiffusionLoss:
        """Hybrid loss of a model's output [B, 2C, h, w] for `noise` [B, C, h, w] (IDDPM eq. 16).

        The noise learns from its squared error alone, the variance from the variational bound alone. The bound of
        one timestep is weighted T/1000: IDDPM's lambda = 0.001 times the T terms one of them stands for.
        `min_snr_gamma` caps the squared error's weight at high signal-to-noise ratio (min-SNR, 5 is usual).
        """
        noise_output, variance_output = output.float().chunk(2, dim=1)
        noise_error = noise_output - noise.float()
        mse = noise_error.square().flatten(1).mean(1)
        vlb = self.vlb_term(noise_error.detach(), variance_output, timesteps)
        weight = 1.0
        if min_snr_gamma is not None:
            snr = self.alphas_cumprod[timesteps] / (1 - self.alphas_cumprod[timesteps])
            weight = snr.clamp(max=min_snr_gamma) / snr
        return DiffusionLoss(weight * mse + self.num_train_timesteps / 1000 * vlb, mse, vlb)

    def vlb_term(self, noise_error: Tensor, variance_output: Tensor, timesteps: Tensor) -> Tensor:
        """Term of the variational bound at each sample's timestep, bits per value [B] (IDDPM eq. 4-6).

        For t > 0 KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), whose means differ by a multiple of the noise's error.
        For t = 0 the negative log likelihood of x_0; latents are continuous and not confined to [-1, 1], so the
        density times an 8-bit step takes the place of IDDPM's 256 clipped bins (equal wherever those apply).
        """
        log_variance = self.log_variance(variance_output, timesteps)
        squared_distance = (_per_sample(self.mean_per_noise, timesteps) * noise_error).square()
        log_posterior = _per_sample(self.log_posterior_variances, timesteps)
        log_ratio = log_variance - log_posterior
        divergence = 0.5 * (log_ratio + torch.exp(-log_ratio) - 1 + squared_distance * torch.exp(-log_variance))
        surprise = 0.5 * (math.log(2 * math.pi) + log_variance + squared_distance * torch.exp(-log_variance))
        surprise = surprise - math.log(EIGHT_BIT_STEP)
        is_first = (timesteps == 0)[:, None, None, None]
        return torch.where(is_first, surprise, divergence).flatten(1).mean(1) / NATS_PER_BIT


def _per_sample(table: Tensor, timesteps: Tensor) -> Tensor:
    return table[timesteps][:, None, None, None]  # [B, 1, 1, 1]
