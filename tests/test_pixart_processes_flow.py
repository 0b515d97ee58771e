"""Rectified flow against closed forms, torch.distributions and diffusers' schedulers."""

from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from torch.distributions import Normal

from errors import UserError
from pixart.drawing.denoise import denoise, draw_noise, make_generators
from pixart.processes.flow import Flow
from pixart.processes.specs import flow_student

SOLVERS = ["dpm-solver++", "euler", "heun"]
TIMES = torch.tensor([1000.0, 737.5, 1.0, 0.0])
MEAN, STD = 0.7, 0.4


def draw(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


def test_noisy_latents_lie_on_the_line_to_the_noise():
    latents, noise = draw(), draw(1)
    sigmas = (TIMES / 1000)[:, None, None, None]
    noisy = Flow().noisy(latents, noise, TIMES)
    torch.testing.assert_close(noisy, latents + sigmas * (noise - latents))
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(1000)
    times = scheduler.timesteps[[0, 100, 500, 999]]
    expected = scheduler.scale_noise(latents, times, noise)
    torch.testing.assert_close(Flow().noisy(latents, noise, times), expected)
    assert Flow().noisy(latents.bfloat16(), noise.bfloat16(), TIMES).dtype == torch.float32


def test_clean_and_noise_follow_the_velocity_to_both_ends():
    latents, noise, process = draw(), draw(1), Flow(shift=3.0)
    noisy = process.noisy(latents, noise, TIMES)
    velocity = noise - latents
    torch.testing.assert_close(process.clean(velocity, noisy, TIMES), latents)
    torch.testing.assert_close(process.noise(velocity, noisy, TIMES), noise)


def test_the_loss_is_the_squared_error_of_the_velocity():
    latents, noise, output = draw(), draw(1), draw(2).requires_grad_()
    loss = Flow(shift=2.0).loss(output, latents, noise, TIMES)
    assert loss.parts.keys() == {"mse"} and loss.total is loss.parts["mse"]
    error = output - (noise - latents)
    torch.testing.assert_close(loss.total, error.square().mean(dim=(1, 2, 3)))
    (gradient,) = torch.autograd.grad(loss.total.sum(), output)
    torch.testing.assert_close(gradient, 2 * error / output[0].numel())


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 1.4, 3.0)])
def test_times_are_logit_normal_and_shifted(mean, std, shift):
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    sigmas = Flow(shift=shift, logit_mean=mean, logit_std=std).times(draws).double() / 1000
    unshifted = sigmas / (shift - (shift - 1) * sigmas)
    at_quantiles = Normal(mean, std).cdf(unshifted.logit())
    torch.testing.assert_close(at_quantiles, draws, rtol=0, atol=1e-5)


def test_the_ends_of_the_draws_are_times():
    times = Flow(logit_std=3.0).times(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert times.isfinite().all() and (times >= 0).all() and (times <= 1000).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_euler_and_heun_take_equal_steps_before_one_shift(shift, num_steps):
    process = Flow(shift=shift)
    even = torch.linspace(1, 1 / num_steps, num_steps)
    expected = torch.cat([shift * even / (1 + (shift - 1) * even), torch.zeros(1)])
    euler, heun = process.scheduler("euler", num_steps), process.scheduler("heun", num_steps)
    torch.testing.assert_close(euler.sigmas, expected)
    torch.testing.assert_close(euler.timesteps, 1000 * expected[:-1])
    torch.testing.assert_close(heun.sigmas[:1], expected[:1])
    torch.testing.assert_close(heun.sigmas[1:-1:2], expected[1:-1])
    assert heun.sigmas[-1] == 0 and len(heun.timesteps) == 2 * num_steps - 1


def run(process: Flow, solver: str, num_steps: int, velocity) -> torch.Tensor:
    """Draw four images with the velocity as a function of latents and exact sigma, whatever time it is told."""
    scheduler = process.scheduler(solver, num_steps)
    generators = make_generators([0, 1, 2, 3])

    def predict(latents: torch.Tensor, timestep: torch.Tensor, _: int) -> torch.Tensor:
        at = scheduler.step_index or 0
        return velocity(latents, scheduler.sigmas[at])

    return denoise(predict, draw_noise(generators, (4, 8, 8)), scheduler, generators=generators)[0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 3, 12])
def test_a_single_image_is_reached_exactly(solver, num_steps, shift):
    """All latents one value: the lines are straight, and Euler is exact on them. DPM-Solver++ starts at 0.999."""
    drawn = run(Flow(shift=shift), solver, num_steps, lambda latents, sigma: (latents - MEAN) / sigma)
    torch.testing.assert_close(drawn, torch.full_like(drawn, MEAN), rtol=0, atol=1e-4)


def gaussian_velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[noise - x_0 | x_sigma] for x_0 ~ N(MEAN, STD^2)."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    offset = latents - (1 - sigma) * MEAN
    return (sigma - (1 - sigma) * STD**2) / variance * offset - MEAN


def error(solver: str, num_steps: int) -> float:
    """Distance to the end of the flow, which is linear here: the same quantile of N(MEAN, STD^2) as of the noise."""
    noise = draw_noise(make_generators([0, 1, 2, 3]), (4, 8, 8))
    return float((run(Flow(), solver, num_steps, gaussian_velocity) - (MEAN + STD * noise)).square().mean().sqrt())


def test_dpm_solver_converges_to_the_flow():
    errors = [error("dpm-solver++", num_steps) for num_steps in (5, 10, 20, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.015 * STD < error("euler", 20)  # in as many steps
    assert errors[3] < 0.005 * STD


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_to_the_flow_by_their_order(solver, order):
    errors = [error(solver, num_steps) for num_steps in (16, 32, 64)]
    assert errors[0] < 0.1 * STD
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.35), errors


def test_a_solver_may_take_as_many_steps_as_there_are_times():
    """Whole timesteps of diffusers' DPM-Solver++ repeat then; no step may be left out."""
    drawn = run(Flow(shift=3.0), "dpm-solver++", 1000, gaussian_velocity)
    noise = draw_noise(make_generators([0, 1, 2, 3]), (4, 8, 8))
    torch.testing.assert_close(drawn, MEAN + STD * noise, rtol=0, atol=0.02)


def test_the_exported_config_is_that_of_the_default_solver():
    config = Flow(shift=2.5).scheduler_config()
    ours, theirs = Flow(shift=2.5).scheduler("dpm-solver++", 20), DPMSolverMultistepScheduler.from_config(config)
    theirs.set_timesteps(20)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    even = 0.999 * torch.linspace(1, 0.05, 20)
    torch.testing.assert_close(theirs.sigmas[:-1], 2.5 * even / (1 + 1.5 * even))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("times", [None, [800, 350, 1]])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_lcm_adds_noise_to_what_it_estimates(shift, num_steps, times):
    """What is noisy at sigma s, given x_0, is what a step from t > s gives: one Gaussian, whose noise is partly new."""
    times = None if times is None else times[:num_steps]
    process = Flow(shift=shift)
    (generator,), (other,) = make_generators([5]), make_generators([5])
    x, noise = (draw_noise([each], (4, 8, 8)).double() for each in (generator, other))
    even = 0.999 * torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    sigmas = shift * even / (1 + (shift - 1) * even) if times is None else torch.tensor(times) / 1000
    told = []

    def predict(latents: torch.Tensor, timestep: torch.Tensor, _: int) -> torch.Tensor:
        told.append(int(timestep))
        return 0.3 * latents + 0.1

    scheduler = process.scheduler("lcm", num_steps, times=times)
    drawn, _ = denoise(predict, noise.float(), scheduler, generators=[other])
    for sigma, following in pairwise([*sigmas.tolist(), 0.0]):
        clean = x - sigma * (0.3 * x + 0.1)
        new = torch.randn((4, 8, 8), generator=generator).double()
        kept = following**2 * (1 - sigma) / (sigma**2 * (1 - following))  # of what is noisy now
        spread = following**2 - (kept * sigma) ** 2
        x = kept * x + (1 - following - kept * (1 - sigma)) * clean + spread**0.5 * new
    torch.testing.assert_close(drawn.double(), x, rtol=0, atol=1e-4)
    assert told == pytest.approx((1000 * sigmas).tolist(), abs=1.01)


def test_lcm_begins_as_diffusers_scheduler_of_flow_that_adds_new_noise_alone():
    ours, theirs = Flow().scheduler("lcm", 2), FlowMatchLCMScheduler()
    theirs.set_timesteps(sigmas=ours.sigmas[:-1].tolist())
    x, velocity = draw(), draw(1)
    (one,), (other,) = (make_generators([3]) for _ in range(2))
    first = ours.step(velocity, ours.timesteps[0], x, generator=one, return_dict=False)[0]
    expected = theirs.step(velocity, theirs.timesteps[0], x, generator=other, return_dict=False)[0]
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-3)  # ours keeps a thousandth of what it begins with
    assert not hasattr(theirs, "init_noise_sigma"), "which pipelines of PixArt ask for: they cannot drive it"


def test_times_of_lcm_have_noise():
    with pytest.raises(UserError, match=r"sampling\.times \[500, 0\] end at 0, where images of process flow have no"):
        Flow().scheduler("lcm", 2, times=[500, 0])
    with pytest.raises(UserError, match=r"sampling\.times \[1000\] are not all below the schedule's 1000"):
        Flow().scheduler("lcm", 1, times=[1000])


def test_the_exported_config_of_a_student_is_that_of_lcm():
    process = Flow(shift=2.5, student=flow_student(guidance=4.5))
    ours, theirs = process.scheduler("lcm", 4), DPMSolverMultistepScheduler.from_config(process.scheduler_config())
    theirs.set_timesteps(4)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    assert (theirs.config.algorithm_type, theirs.config.solver_order) == ("sde-dpmsolver++", 1)


@pytest.mark.parametrize("values", [{"shift": 0.0}, {"logit_std": 0.0}])
def test_values_without_meaning_are_refused(values):
    with pytest.raises(UserError, match=r"process flow: shift .* and logit_std .* must be positive"):
        Flow(**values)
