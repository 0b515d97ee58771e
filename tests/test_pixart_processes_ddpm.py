"""The diffusion process against closed forms, torch.distributions and diffusers' schedule."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch.distributions import Normal, kl_divergence

from errors import UserError
from pixart.processes.ddpm import DDPM, EIGHT_BIT_STEP
from pixart.processes.specs import DDPM_SCHEDULE

ALL_TIMESTEPS = torch.tensor([1, 2, 10, 250, 500, 998, 999])
LATENTS = torch.zeros(0)  # which the loss does not look at


@pytest.fixture(scope="module")
def process() -> DDPM:
    return DDPM()


def draw(num: int, seed: int = 0, channels: int = 4) -> torch.Tensor:
    return torch.randn(num, channels, 3, 5, generator=torch.Generator().manual_seed(seed))


def reverse_means(process: DDPM, noise: torch.Tensor, noise_output: torch.Tensor, t: torch.Tensor):
    """Means of q(x_{t-1} | x_t, x_0) by DDPM eq. 7 and of the model by eq. 11, in fp64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    cumprod = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), cumprod[:-1]])
    beta, alpha_bar, alpha_bar_previous = (x[t][:, None, None, None] for x in (betas, cumprod, previous))
    start = draw(len(t), seed=7).double()
    noisy = alpha_bar.sqrt() * start + (1 - alpha_bar).sqrt() * noise.double()
    posterior = (alpha_bar_previous.sqrt() * beta * start) / (1 - alpha_bar) + (
        (1 - beta).sqrt() * (1 - alpha_bar_previous) * noisy
    ) / (1 - alpha_bar)
    predicted = (noisy - beta / (1 - alpha_bar).sqrt() * noise_output.double()) / (1 - beta).sqrt()
    return start, posterior, predicted, beta * (1 - alpha_bar_previous) / (1 - alpha_bar), beta


def test_schedule_equals_diffusers(process):
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(process.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)
    latents, noise, timesteps = draw(7), draw(7, 1), ALL_TIMESTEPS
    expected = scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(process.noisy(latents, noise, timesteps), expected, rtol=1e-4, atol=1e-5)


def test_noisy_is_fp32_for_bf16_inputs(process):
    noisy = process.noisy(draw(2).bfloat16(), draw(2, 1).bfloat16(), torch.tensor([0, 999]))
    assert noisy.dtype == torch.float32


def test_variance_bounds(process):
    t = ALL_TIMESTEPS
    *_, posterior_variance, beta = reverse_means(process, draw(7), draw(7), t)
    ones = torch.ones(7, 4, 3, 5)
    upper = process.log_variance(ones, t).double().exp()
    lower = process.log_variance(-ones, t).double().exp()
    torch.testing.assert_close(upper, beta.expand_as(upper), rtol=1e-5, atol=0)
    torch.testing.assert_close(lower, posterior_variance.expand_as(lower), rtol=1e-5, atol=0)


def test_vlb_term_is_the_divergence_of_gaussians(process):
    t = ALL_TIMESTEPS
    noise, noise_output = draw(7, 1), draw(7, 2)
    variance_output = draw(7, 3).tanh()
    _, posterior, predicted, posterior_variance, _ = reverse_means(process, noise, noise_output, t)
    model_scale = (0.5 * process.log_variance(variance_output, t).double()).exp()
    expected = kl_divergence(
        Normal(posterior, posterior_variance.sqrt().expand_as(posterior)), Normal(predicted, model_scale)
    )
    expected_bits = expected.flatten(1).mean(1) / math.log(2)
    actual = process.vlb_term(noise_output - noise, variance_output, t)
    torch.testing.assert_close(actual.double(), expected_bits, rtol=1e-4, atol=1e-6)


def test_vlb_term_at_zero_is_the_likelihood(process):
    t = torch.zeros(2, dtype=torch.long)
    noise, noise_output = draw(2, 1), draw(2, 2)
    variance_output = draw(2, 3).tanh()
    start, _, predicted, _, _ = reverse_means(process, noise, noise_output, t)
    model_scale = (0.5 * process.log_variance(variance_output, t).double()).exp()
    likelihood = Normal(predicted, model_scale).log_prob(start) + math.log(EIGHT_BIT_STEP)
    actual = process.vlb_term(noise_output - noise, variance_output, t)
    torch.testing.assert_close(actual.double(), -likelihood.flatten(1).mean(1) / math.log(2), rtol=1e-3, atol=1e-3)


def test_best_variance_makes_the_bound_vanish_for_perfect_noise(process):
    noise = draw(7, 1)
    vlb = process.vlb_term(torch.zeros_like(noise), -torch.ones_like(noise), ALL_TIMESTEPS)
    torch.testing.assert_close(vlb, torch.zeros(7))


def test_loss_gives_noise_and_variance_separate_gradients(process):
    output = draw(7, 4, channels=8).requires_grad_()
    noise = draw(7, 5)
    loss = process.loss(output, LATENTS, noise, ALL_TIMESTEPS)
    assert loss.total.shape == loss.parts["mse"].shape == loss.parts["vlb"].shape == (7,)
    torch.testing.assert_close(loss.total, loss.parts["mse"] + loss.parts["vlb"])
    (gradient,) = torch.autograd.grad(loss.total.sum(), output)
    mse = process.loss(output, LATENTS, noise, ALL_TIMESTEPS).parts["mse"]
    (mse_gradient,) = torch.autograd.grad(mse.sum(), output)
    torch.testing.assert_close(gradient[:, :4], mse_gradient[:, :4])
    assert gradient[:, 4:].abs().max() > 0
    assert mse_gradient[:, 4:].abs().max() == 0


def test_vlb_is_weighted_by_the_number_of_timesteps():
    process = DDPM(DDPM_SCHEDULE | {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2})
    loss = process.loss(draw(2, 4, channels=8), LATENTS, draw(2, 5), torch.tensor([3, 99]))
    torch.testing.assert_close(loss.total, loss.parts["mse"] + 0.1 * loss.parts["vlb"])


def test_min_snr_weights_only_clean_timesteps(process):
    timesteps = torch.tensor([0, 100, 900])
    output, noise = draw(3, 4, channels=8), draw(3, 5)
    plain = process.loss(output, LATENTS, noise, timesteps)
    weighted = DDPM(min_snr_gamma=5.0).loss(output, LATENTS, noise, timesteps)
    snr = process.alphas_cumprod[timesteps] / (1 - process.alphas_cumprod[timesteps])
    torch.testing.assert_close(
        (weighted.total - weighted.parts["vlb"]) / plain.parts["mse"], snr.clamp(max=5) / snr, rtol=1e-4, atol=1e-5
    )
    assert (snr[:2] > 5).all() and snr[2] < 5


def test_timesteps_do_not_mix_within_a_batch(process):
    timesteps = torch.tensor([0, 3, 999])
    output, noise = draw(3, 4, channels=8), draw(3, 5)
    together = process.loss(output, LATENTS, noise, timesteps).total
    alone = torch.cat(
        [process.loss(output[i : i + 1], LATENTS, noise[i : i + 1], timesteps[i : i + 1]).total for i in range(3)]
    )
    torch.testing.assert_close(together, alone)


def test_clean_and_noise_undo_noisy(process):
    latents, noise = draw(7), draw(7, 1)
    noisy = process.noisy(latents, noise, ALL_TIMESTEPS)
    output = torch.cat([noise, draw(7, 2)], dim=1)
    torch.testing.assert_close(process.noise(output, noisy, ALL_TIMESTEPS), noise)
    # at t = 999 the latents are a hundredth and a half of the noise in size
    torch.testing.assert_close(process.clean(output, noisy, ALL_TIMESTEPS), latents, rtol=1e-3, atol=1e-4)


def test_times_are_uniform_whole_numbers(process):
    draws = torch.tensor([0.0, 0.0009999, 0.001, 0.5, 0.9999999], dtype=torch.float64)
    assert process.times(draws).tolist() == [0, 0, 1, 500, 999]
    assert process.times(draws).dtype == torch.int64


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_schedules_of_others_are_those_of_diffusers(beta_schedule):
    schedule = DDPM_SCHEDULE | {"beta_schedule": beta_schedule}
    expected = DPMSolverMultistepScheduler(**schedule).alphas_cumprod
    torch.testing.assert_close(DDPM(schedule).alphas_cumprod, expected, rtol=1e-4, atol=1e-9)
    with pytest.raises(UserError, match="beta_schedule cubic is not known"):
        DDPM(DDPM_SCHEDULE | {"beta_schedule": "cubic"})
