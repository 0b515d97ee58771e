"""Solvers against the exact answer for Gaussian data, whose score is known in closed form."""

import re

import pytest
import torch

from errors import UserError
from pixart.drawing.denoise import NonFiniteLatentsError, denoise, draw_noise, make_generators, require_finite
from pixart.processes.ddpm import DDPM

PROCESS = DDPM()
MEAN, STD = 0.7, 0.4
ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def exact_noise(latents: torch.Tensor, timestep: torch.Tensor, _: int) -> torch.Tensor:
    """Give E[noise | x_t] for x_0 ~ N(MEAN, STD^2), and the lower bound of the variance."""
    alpha_bar = ALPHAS_CUMPROD[timestep.long()].float()
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    noise = (1 - alpha_bar).sqrt() * (latents - alpha_bar.sqrt() * MEAN) / variance
    return torch.cat([noise, -torch.ones_like(noise)], dim=1)


def run(solver: str, num_steps: int, num_images: int = 4) -> torch.Tensor:
    generators = make_generators(list(range(num_images)))
    noise = draw_noise(generators, (4, 16, 16))
    return denoise(exact_noise, noise, PROCESS.scheduler(solver, num_steps), generators=generators)[0]


def test_dpm_solver_converges_to_the_probability_flow():
    # the flow maps x_T to x_0 linearly: same quantile of N(MEAN, STD^2) as of the prior
    noise = draw_noise(make_generators([0, 1, 2, 3]), (4, 16, 16))
    alpha_bar = ALPHAS_CUMPROD[-1]
    start_std = (alpha_bar * STD**2 + 1 - alpha_bar).sqrt()
    expected = MEAN + STD * (noise - alpha_bar.sqrt() * MEAN) / start_std
    errors = [
        (run("dpm-solver++", num_steps) - expected).square().mean().sqrt().item() for num_steps in (5, 10, 20, 50)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1 * STD
    assert errors[-1] < 0.01 * STD


@pytest.mark.parametrize("name", ["dpm-solver++", "sa-solver"])
def test_as_many_steps_as_timesteps_are_refused(name):
    with pytest.raises(UserError, match=rf"sampling\.num_steps 1000: {re.escape(name)} takes fewer than the sche"):
        PROCESS.scheduler(name, 1000)
    timesteps = PROCESS.scheduler(name, 999).timesteps
    assert len(set(timesteps.tolist())) == 999


def test_one_step_of_iddpm_is_refused():
    with pytest.raises(UserError, match=r"sampling\.num_steps 1: iddpm needs at least 2"):
        PROCESS.scheduler("iddpm", 1)


@pytest.mark.parametrize(("solver", "num_steps"), [("iddpm", 200), ("sa-solver", 40)])
def test_stochastic_solvers_reach_the_distribution(solver, num_steps):
    latents = run(solver, num_steps, num_images=16)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert latents.std().item() == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("solver", ["iddpm", "sa-solver"])
def test_more_steps_of_a_stochastic_solver_are_closer(solver):
    errors = [abs(run(solver, num_steps, num_images=4).std().item() - STD) for num_steps in (5, 10, 25, 100)]
    assert errors[:3] == sorted(errors[:3], reverse=True)
    assert errors[3] < 0.1 * STD


def mixture_noise(latents: torch.Tensor, timestep: torch.Tensor, _: int) -> torch.Tensor:
    """Give E[noise | x_t] for x_0 ~ 0.3 N(-1, 0.25^2) + 0.7 N(1, 0.25^2), and the lower bound of the variance."""
    alpha_bar = ALPHAS_CUMPROD[timestep.long()].float()
    variance = alpha_bar * 0.25**2 + 1 - alpha_bar
    means = alpha_bar.sqrt() * torch.tensor([-1.0, 1.0])
    offsets = latents[..., None] - means
    weights = (torch.tensor([0.3, 0.7]).log() - offsets.square() / (2 * variance)).softmax(-1)
    noise = (1 - alpha_bar).sqrt() * (weights * offsets).sum(-1) / variance
    return torch.cat([noise, -torch.ones_like(noise)], dim=1)


@pytest.mark.parametrize(("solver", "num_steps"), [("dpm-solver++", 100), ("iddpm", 250), ("sa-solver", 100)])
def test_both_sides_of_a_mixture_are_found(solver, num_steps):
    generators = make_generators([0, 1, 2, 3])
    noise = draw_noise(generators, (4, 16, 16))
    latents, _ = denoise(mixture_noise, noise, PROCESS.scheduler(solver, num_steps), generators=generators)
    assert (latents > 0).float().mean().item() == pytest.approx(0.7, abs=0.03)
    for side in (latents[latents > 0], -latents[latents < 0]):
        assert side.mean().item() == pytest.approx(1.0, abs=0.02)
        assert side.std().item() == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["dpm-solver++", "iddpm", "sa-solver", "lcm"])
def test_every_step_count_ends_finite_and_without_noise(solver, dtype):
    """Data that are one value, so that all noise left over would be seen; bfloat16 is that of the network's output."""

    def predict(latents: torch.Tensor, timestep: torch.Tensor, _: int) -> torch.Tensor:
        alpha_bar = ALPHAS_CUMPROD[timestep.long()].float()
        noise = ((latents - alpha_bar.sqrt() * MEAN) / (1 - alpha_bar).sqrt()).to(dtype)
        return torch.cat([noise, -torch.ones_like(noise)], dim=1).float()

    for num_steps in range(2 if solver == "iddpm" else 1, 51):
        generators = make_generators([num_steps])
        noise = draw_noise(generators, (1, 2, 2))
        latents, _ = denoise(predict, noise, PROCESS.scheduler(solver, num_steps), generators=generators)
        assert latents.isfinite().all()
        if dtype == torch.float32:
            torch.testing.assert_close(latents, torch.full_like(latents, MEAN), rtol=0, atol=2e-4)
        else:
            assert (latents - MEAN).abs().max() < (1 if num_steps < 5 else 0.2)


@pytest.mark.parametrize("solver", ["dpm-solver++", "iddpm", "sa-solver", "lcm"])
def test_an_image_does_not_depend_on_its_batch(solver):
    together = run(solver, 7, num_images=3)
    generators = make_generators([2])
    noise = draw_noise(generators, (4, 16, 16))
    alone, _ = denoise(exact_noise, noise, PROCESS.scheduler(solver, 7), generators=generators)
    torch.testing.assert_close(together[2:], alone)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 7])
def test_lcm_draws_as_published(num_steps):
    """Estimate what is clean by the boundary scalings, and add noise to the next of the student's times."""
    (generator,), drawn = make_generators([5]), run("lcm", num_steps, num_images=6)[5]
    x = torch.randn((4, 16, 16), generator=generator).double()
    times = [999 - 20 * (50 * step // num_steps) for step in range(num_steps)]
    for step, time in enumerate(times):
        signal = ALPHAS_CUMPROD[time]
        noise = exact_noise(x[None].float(), torch.tensor(time), 0)[0, : len(x)].double()
        clean = (x - (1 - signal).sqrt() * noise) / signal.sqrt()
        scaled = 10.0 * time
        x = 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25) ** 0.5 * clean
        if step + 1 < num_steps:
            following = ALPHAS_CUMPROD[times[step + 1]]
            x = following.sqrt() * x + (1 - following).sqrt() * torch.randn((4, 16, 16), generator=generator)
    torch.testing.assert_close(drawn.double(), x, rtol=0, atol=1e-4)


def test_non_finite_latents_are_refused():
    scheduler = PROCESS.scheduler("dpm-solver++", 3)
    num_asked = 0

    def predict(latents, timestep, number):
        nonlocal num_asked
        num_asked += 1
        spoilt = torch.tensor([0.0, torch.nan if num_asked == 2 else 0.0, 0.0])
        return torch.zeros(3, 8, 2, 2) + spoilt[:, None, None, None]

    _, is_finite = denoise(predict, torch.zeros(3, 4, 2, 2), scheduler, generators=make_generators([0, 1, 2]))
    with pytest.raises(NonFiniteLatentsError, match=r"not finite, at pass 2 of 3$") as error:
        require_finite(is_finite)
    assert error.value.image == 1
