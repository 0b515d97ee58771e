"""Flow of networks that predict the noise: against closed forms and diffusers' solvers of flow and of ddpm."""

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from errors import UserError
from pixart.drawing.denoise import denoise, draw_noise, make_generators
from pixart.processes.ddpm import DDPM
from pixart.processes.flow import Flow
from pixart.processes.noise_flow import NoiseFlow
from pixart.processes.scheduler_configs import spec_of_scheduler
from pixart.processes.specs import ddpm_spec

ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
# flow's sigma at each timestep, and how much larger the line's point is there than what the network sees, [T]
SIGMAS = (1 - ALPHAS_CUMPROD).sqrt() / (ALPHAS_CUMPROD.sqrt() + (1 - ALPHAS_CUMPROD).sqrt())
SCALES = ((1 - SIGMAS).square() + SIGMAS.square()).sqrt()
TIMES = torch.tensor([0, 3, 258, 700, 940, 999])


def draw(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


def output_of(noise_output: torch.Tensor) -> torch.Tensor:
    return torch.cat([noise_output, 0.1 * noise_output], 1)


def test_what_the_network_sees_is_the_point_of_the_line_but_for_its_scale():
    latents, noise = draw(), draw(1)
    on_line = Flow().noisy(latents, noise, 1000 * SIGMAS[TIMES])
    seen = NoiseFlow().noisy(latents, noise, TIMES)
    torch.testing.assert_close(seen, (on_line / SCALES[TIMES][:, None, None, None]).float(), rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_squared_error_of_the_velocity_that_the_noise_makes():
    latents, noise, said = draw().double(), draw(1).double(), draw(2).double()
    sigmas = SIGMAS[TIMES][:, None, None, None]
    on_line = (1 - sigmas) * latents + sigmas * noise
    velocity = (said - on_line) / (1 - sigmas)
    expected = (velocity - (noise - latents)).square().mean((1, 2, 3))
    loss = NoiseFlow().loss(output_of(said.float()), latents.float(), noise.float(), TIMES)
    torch.testing.assert_close(loss.parts["velocity"].double(), expected, rtol=1e-5, atol=0)
    # and of flow's own loss, told the velocity
    told = Flow().loss(velocity.float(), latents.float(), noise.float(), 1000 * SIGMAS[TIMES])
    torch.testing.assert_close(loss.parts["velocity"], told.total, rtol=1e-3, atol=0)


def test_the_estimates_are_those_of_flow_along_that_velocity():
    latents, noise, said = draw(), draw(1), draw(2)
    process, sigmas = NoiseFlow(), SIGMAS[TIMES][:, None, None, None]
    seen = process.noisy(latents, noise, TIMES)
    on_line = (seen * SCALES[TIMES][:, None, None, None]).float()
    velocity = ((said - on_line) / (1 - sigmas)).float()
    clean = process.clean(output_of(said), seen, TIMES)
    torch.testing.assert_close(clean, Flow().clean(velocity, on_line, 1000 * SIGMAS[TIMES]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(said, Flow().noise(velocity, on_line, 1000 * SIGMAS[TIMES]), rtol=1e-4, atol=1e-4)


def test_a_network_that_knows_the_noise_has_no_error_and_the_variance_learns_as_in_ddpm():
    latents, noise = draw(), draw(1)
    output = output_of(noise).requires_grad_()
    loss = NoiseFlow(shift=3.0).loss(output, latents, noise, TIMES)
    assert loss.parts["velocity"].tolist() == loss.parts["mse"].tolist() == [0.0] * 6
    ddpm = DDPM().loss(output, latents, noise, TIMES)
    assert torch.equal(loss.parts["vlb"], ddpm.parts["vlb"])
    ours, theirs = (torch.autograd.grad(each.total.sum(), output, retain_graph=True)[0] for each in (loss, ddpm))
    assert torch.equal(ours, theirs) and ours[:, 4:].abs().min() > 0 == ours[:, :4].abs().max()


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 1.4, 3.0)])
def test_times_are_the_nearest_to_those_of_flow(mean, std, shift):
    draws = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    sigmas = Flow(logit_mean=mean, logit_std=std, shift=shift).times(draws).double() / 1000
    expected = (sigmas.logit()[:, None] - SIGMAS.logit()).abs().argmin(1)
    times = NoiseFlow(logit_mean=mean, logit_std=std, shift=shift).times(draws)
    assert times.dtype == torch.int64 and (times - expected).abs().max() <= 1
    assert (times == expected).double().mean() > 0.995, "all but rounding at the middle of two"


def test_the_ends_of_the_draws_are_the_first_and_the_last_timestep():
    times = NoiseFlow(logit_std=30.0).times(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert times.tolist() == [0, 999]


@pytest.mark.parametrize(("shift", "num_steps"), [(1.0, 20), (1.0, 90), (3.0, 20), (0.5, 4)])
def test_steps_are_equal_before_the_shift_and_fall_from_the_last_timestep(shift, num_steps):
    times = NoiseFlow(shift=shift).scheduler("dpm-solver++", num_steps).timesteps
    unshifted = SIGMAS[times] / (shift - (shift - 1) * SIGMAS[times])
    assert times[0] == 999
    expected = unshifted[0] * torch.linspace(1, 1 / num_steps, num_steps)
    torch.testing.assert_close(unshifted, expected.double(), rtol=0.1, atol=2e-3)


@pytest.mark.parametrize(("shift", "num_steps"), [(1.0, 200), (0.2, 60), (1.0, 999), (9.0, 999)])
def test_steps_nearer_to_each_other_than_timesteps_are_timesteps(shift, num_steps):
    times = NoiseFlow(shift=shift).scheduler("euler", num_steps).timesteps
    assert len(times) == num_steps and times[0] == 999 and times[-1] >= 0
    assert (times[:-1] > times[1:]).all(), "none is taken twice"
    with pytest.raises(UserError, match=r"sampling\.num_steps 1000: euler takes fewer than the schedule's 1000"):
        NoiseFlow(shift=shift).scheduler("euler", 1000)


def mixture_noise(latents: torch.Tensor, time: torch.Tensor, _: int = 0) -> torch.Tensor:
    """Give E[noise | x_t] for x_0 ~ 0.3 N(-1, 0.25^2) + 0.7 N(1, 0.25^2), and a variance."""
    alpha_bar = ALPHAS_CUMPROD[time.long()]
    variance = alpha_bar * 0.25**2 + 1 - alpha_bar
    offsets = latents.double()[..., None] - alpha_bar.sqrt() * torch.tensor([-1.0, 1.0])
    weights = (torch.tensor([0.3, 0.7]).log() - offsets.square() / (2 * variance)).softmax(-1)
    noise = (1 - alpha_bar).sqrt() * (weights * offsets).sum(-1) / variance
    return output_of(noise.float())


def drawn(scheduler: Any) -> torch.Tensor:
    generators = make_generators([0, 1])
    return denoise(mixture_noise, draw_noise(generators, (4, 8, 8)), scheduler, generators=generators)[0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 5, 20])
@pytest.mark.parametrize("solver", ["dpm-solver++", "euler"])
def test_images_are_those_that_diffusers_solvers_of_flow_draw_along_the_velocity(solver, num_steps, shift):
    ours = NoiseFlow(shift=shift).scheduler(solver, num_steps)
    sigmas = SIGMAS[ours.timesteps]
    theirs: Any
    if solver == "euler":
        theirs = FlowMatchEulerDiscreteScheduler(1000)
        theirs.set_timesteps(sigmas=sigmas.tolist())
    else:
        theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        theirs.set_timesteps(num_steps)
        theirs.sigmas = torch.cat([sigmas, torch.zeros(1)]).float()
    theirs.set_begin_index(0)
    x = SCALES[ours.timesteps[0]] * draw_noise(make_generators([0, 1]), (4, 8, 8))  # as the network sees it: noise
    for number, time in enumerate(ours.timesteps):
        noise = mixture_noise(x / SCALES[time], time)[:, :4]
        velocity = (noise - x) / (1 - SIGMAS[time])
        x = theirs.step(velocity.float(), theirs.timesteps[number], x.float(), return_dict=False)[0]
    torch.testing.assert_close(drawn(ours), x, rtol=0, atol=2e-4)


def test_many_steps_draw_what_those_of_ddpm_draw():
    """One flow of probability, along other times: what differs is the solvers' error, which falls with their steps."""
    process, exact = NoiseFlow(), drawn(DDPM().scheduler("dpm-solver++", 990))
    errors = [
        float((drawn(process.scheduler("dpm-solver++", steps)) - exact).square().mean().sqrt())
        for steps in (10, 30, 90)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01, errors
    assert float((drawn(process.scheduler("euler", 90)) - exact).square().mean().sqrt()) < 0.05


def test_the_exported_config_is_that_of_the_network_before():
    process = NoiseFlow(shift=3.0, logit_mean=0.5)
    assert process.scheduler_config() == DDPM().scheduler_config()
    assert spec_of_scheduler(process.scheduler_config()) == ddpm_spec()
    ours, theirs = process.scheduler("iddpm", 7), DDPM().scheduler("iddpm", 7)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.config == theirs.config
