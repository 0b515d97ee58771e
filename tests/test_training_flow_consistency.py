"""Consistency distillation of process flow: its loss by another computation, its limit, whom it trains, and resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_consistency import ROLES, SHAPE, Linear, distilled, said
from test_training_networks import open_job, saved
from test_training_objective import DRAWS, SCALE, SHIFT, make_batch
from torch import Tensor, nn
from training_run import D_TEXT, make_run

from errors import UserError
from pipelines.store.checkpoints import find_checkpoint
from pixart.convert import load_diffusers
from pixart.model import PixArt
from pixart.processes.flow import Flow
from pixart.processes.make import process_of
from pixart.processes.scheduler_configs import spec_of_scheduler
from pixart.processes.specs import flow_spec, flow_student
from training.data.batch import Batch
from training.objectives.choice import choose_objective
from training.objectives.flow_consistency import FlowConsistency
from training.objectives.inputs import NetworkInputs
from training.stages.networks import network_config
from training.stages.starts import starting_network

FLOW_SHAPE = replace(SHAPE, out_channels=4)


class Velocity(Linear):
    def forward(self, noisy: Tensor, *told: Any, **others: Any) -> Tensor:
        return super().forward(noisy, *told, **others)[:, : noisy.shape[1]]


def consistency(low: float, high: float, *, num_teacher_steps: int = 50, shift: float = 1.0) -> FlowConsistency:
    student = flow_student(guidance=(low, high), num_teacher_steps=num_teacher_steps)
    return FlowConsistency(
        process=Flow(shift=shift, student=student),
        inputs=NetworkInputs(scaling_factor=SCALE, shift_factor=SHIFT, null_label=None, dtype=torch.float32),
        null_text=torch.full((2, 8), 0.5, dtype=torch.bfloat16),
        guidance_range=(low, high),
        huber_c=0.001,
    )


@pytest.mark.parametrize(("low", "high", "shift"), [(4.0, 16.0, 1.0), (5.5, 5.5, 3.0)])
def test_the_loss_is_that_of_steps_of_euler(low: float, high: float, shift: float) -> None:
    batch = make_batch(has_text=True)
    student, target, teacher = (Velocity(seed) for seed in (1, 2, 3))
    objective = consistency(low, high, shift=shift)
    losses = objective.loss({"network": student, "target": target, "teacher": teacher}, batch)
    assert batch.text is not None and batch.std is not None and batch.posterior_noise is not None
    text, std = batch.text.values.double().numpy(), batch.std.double().numpy()
    latents = (batch.mean.double().numpy() + std * batch.posterior_noise.double().numpy() - SHIFT) * SCALE
    noise = batch.noise.double().numpy()
    expected, squares, sigmas = [], [], []
    for i, draw in enumerate(DRAWS):
        sigma, before = (shift * at / (1 + (shift - 1) * at) for at in (1 - draw, max(1 - draw - 0.02, 0)))
        scale = low + (high - low) * (draw * 2**20 % 1)
        told = scale if low < high else None
        mean = text[batch.text.offsets[i] : batch.text.offsets[i + 1]].mean()
        x = latents[i] + sigma * (noise[i] - latents[i])
        led, null = said(teacher, x, 1000 * sigma, mean, None), said(teacher, x, 1000 * sigma, 0.5, None)
        nearer = x - (sigma - before) * (null + scale * (led - null))
        wanted = nearer - before * said(target, nearer, 1000 * before, mean, told)
        difference = x - sigma * said(student, x, 1000 * sigma, mean, told) - wanted
        expected.append(np.mean(np.sqrt(difference**2 + 0.001**2) - 0.001))
        squares.append(np.mean(difference**2))
        sigmas.append(sigma)
    torch.testing.assert_close(losses.total.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.parts["mse"].double(), torch.tensor(squares), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.times, torch.tensor(sigmas, dtype=torch.float64), rtol=1e-6, atol=0)
    assert objective.networks == ROLES and objective.families == ("latents", "text")


def test_guidance_is_learnt_from_the_teachers_velocity() -> None:
    batch = make_batch(has_text=True)
    networks: dict[str, nn.Module] = {name: Velocity(seed) for seed, name in enumerate(ROLES)}
    objective = replace(consistency(4.0, 16.0), guided_weight=10.0, num_steps=8)
    losses, plain = objective.loss(networks, batch), consistency(4.0, 16.0).loss(networks, batch)
    times, _, guidance = objective.draws(batch)
    noisy = objective.process.noisy(objective.inputs.latents(batch), batch.noise, times)
    wanted = objective.guided(networks["teacher"], noisy, times, guidance=guidance, batch=batch)
    velocity = objective.inputs.output(networks["network"], noisy, times, batch=batch, guidance=guidance)
    error = (velocity - wanted).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.parts["guided"], error)
    torch.testing.assert_close(losses.total, plain.total + 10 * error)


def test_short_steps_ask_for_the_derivative_of_continuous_time() -> None:
    """N times the difference of N steps tends to the derivative of the estimate along the way of the teacher (sCM)."""
    torch.manual_seed(1)
    network = PixArt(replace(FLOW_SHAPE, caption_channels=8, sample_size=4))
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)
    batch, objective = make_batch(has_text=True), consistency(3.0, 3.0, num_teacher_steps=40_000)
    process, inputs = objective.process, objective.inputs
    losses = objective.loss({"network": network, "target": network, "teacher": network}, batch)
    times, _, _ = objective.draws(batch)
    noisy = process.noisy(inputs.latents(batch), batch.noise, times)
    led, null = (inputs.output(network, noisy, times, batch=each) for each in (batch, objective.without_text(batch)))

    def estimate(x: Tensor, sigmas: Tensor) -> Tensor:
        return process.clean(inputs.output(network, x, 1000 * sigmas, batch=batch), x, 1000 * sigmas)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        along = torch.func.jvp(estimate, (noisy, times / 1000), (null + 3 * (led - null), torch.ones_like(times)))[1]
    wanted = along.square().mean((1, 2, 3)) / 40_000**2
    has_step = times >= 0.025  # nearer to the latents a step ends at them
    torch.testing.assert_close(losses.parts["mse"][has_step], wanted[has_step], rtol=0.03, atol=0)


def test_the_last_step_ends_at_what_the_teacher_says() -> None:
    batch, objective = make_batch(has_text=True), consistency(4.0, 4.0, num_teacher_steps=1)
    times, earlier, _ = objective.draws(batch)
    assert not earlier.any() and times.max() == 1000
    student, target, teacher = (Velocity(seed) for seed in (1, 2, 3))
    networks: dict[str, nn.Module] = {"network": student, "target": target, "teacher": teacher}
    losses = objective.loss(networks, batch)
    networks["target"] = Velocity(9)
    assert torch.equal(objective.loss(networks, batch).total, losses.total), "of no noise an average says nothing"


def test_only_the_student_has_a_gradient_and_is_told_the_guidance() -> None:
    batch = make_batch(has_text=True)
    student, target, teacher = (Velocity(seed) for seed in (1, 2, 3))
    losses = consistency(4.0, 16.0).loss({"network": student, "target": target, "teacher": teacher}, batch)
    losses.total.sum().backward()
    assert student.weight.grad is not None and student.weight.grad.all()
    assert target.weight.grad is None and teacher.weight.grad is None
    (one,), (other,), (led, null) = student.calls, target.calls, teacher.calls
    assert [call["has_gradient"] for call in (one, other, led, null)] == [True, False, False, False]
    assert torch.equal(one["guidance"], other["guidance"]) and led["guidance"] is null["guidance"] is None


def test_a_sample_draws_its_time_and_guidance_without_one_saying_the_other() -> None:
    draws = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    batch: Batch = replace(make_batch(has_text=True), timestep_draws=draws)
    times, earlier, guidance = consistency(4.0, 16.0).draws(batch)
    torch.testing.assert_close(times - earlier, torch.full((4000,), 20.0).minimum(times), rtol=0, atol=1e-3)
    for drawn, low, high in ((times, 0, 1000), (guidance, 4, 16)):
        assert drawn.dtype == torch.float32 and low <= drawn.min() and drawn.max() <= high
        assert abs(float((drawn - low).mean()) / (high - low) - 0.5) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([times, guidance]))[0, 1])) < 0.05


def settings_of(folder: Path, **others: Any) -> dict[str, Any]:
    torch.manual_seed(7)
    network = PixArt(FLOW_SHAPE)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)
    teacher = saved(network, folder / "teacher" / "model")
    (folder / "teacher" / "scheduler").mkdir()
    scheduler = process_of(flow_spec()).scheduler_config()
    (folder / "teacher" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    start = {"starts_from": teacher, "networks.teacher": teacher}
    return {**start, "objective": "consistency", "process": "flow", **others}


def test_a_stage_of_flow_says_what_its_student_is_made_for(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    job, survey = open_job(run, 2, **settings_of(tmp_path, flow_shift=3.0))
    assert job.settings.process_spec == flow_spec(shift=3.0, student=flow_student(guidance=(4.0, 16.0)))
    config = network_config(job, survey)
    assert not job.begins_output_anew and config.out_channels == 4
    student, teacher = starting_network(job, config), load_diffusers(Path(str(job.start.path)))
    assert isinstance(student, PixArt) and isinstance(teacher, PixArt)
    latents, text, times = torch.randn(2, 4, 4, 4), torch.randn(2, 3, D_TEXT), torch.tensor([20.0, 1000.0])
    ours = student(latents, times, text, guidance=torch.tensor([4.0, 16.0]))
    assert torch.equal(ours, teacher(latents, times, text)), "it begins as the teacher"
    objective = choose_objective(job, torch.device("cpu"))
    assert isinstance(objective, FlowConsistency) and objective.process.shift == 3.0


@pytest.mark.slow
def test_a_stage_of_flow_distils_and_resumes_exactly(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, ema_decay=0.95)
    whole = distilled(tmp_path, **settings)
    checkpoint = find_checkpoint(whole / "training" / "stage2")
    assert checkpoint is not None
    assert checkpoint.trainer["process"] == flow_spec(student=flow_student(guidance=(4.0, 16.0)))
    student = load_diffusers(checkpoint.weights)
    assert isinstance(student, PixArt) and student.guidance_embed.out.weight.any(), "it has learnt what it is told"
    scheduler = json.loads((checkpoint.path / "scheduler" / "scheduler_config.json").read_text())
    assert spec_of_scheduler(scheduler) == flow_spec(student=flow_student(guidance=None))
    taught = settings | {"networks.teacher": str(checkpoint.path)}
    with pytest.raises(UserError, match=r"networks\.teacher = .* is itself a student, distilled by lcm to few steps"):
        open_job(make_run(tmp_path / "again"), 2, **taught)
