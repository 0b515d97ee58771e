"""Consistency distillation: its loss by the published formulas, whom it trains, and what of a recipe is refused."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from test_training_networks import open_job, saved
from test_training_objective import SCALE, SHIFT, make_batch
from torch import Tensor, nn
from training_run import CHANNELS, D_TEXT, make_run, metrics, train

from errors import UserError
from pipelines.store.checkpoints import find_checkpoint
from pixart.convert import load_diffusers
from pixart.guidance_condition import with_guidance_condition
from pixart.model import PackedText, PixArt, PixArtConfig
from pixart.processes.ddpm import DDPM
from pixart.processes.specs import ddpm_spec, flow_student, lcm_student
from training.consistency import ConsistencySettings
from training.loop.flops import StepFlops
from training.objectives.choice import choose_objective
from training.objectives.consistency import Consistency
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Average, Frozen, Trained
from training.stages.networks import blank_copy, count_parameters, count_weights, network_config
from training.stages.starts import objective_networks, starting_network

SHAPE = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=D_TEXT, sample_size=4)
ROLES = {"network": Trained(), "target": Average(), "teacher": Frozen()}


class Linear(nn.Module):
    """Gives noise that depends on all that it is told, by weights of its own."""

    has_size_condition = False

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(seed)))
        self.calls: list[dict[str, Any]] = []

    def forward(
        self, noisy: Tensor, times: Tensor, text: PackedText, *, size: Tensor | None, guidance: Tensor | None = None
    ) -> Tensor:
        self.calls.append({"text": text, "guidance": guidance, "has_gradient": torch.is_grad_enabled()})
        means = torch.stack(
            [
                text.values[first:last].float().mean()
                for first, last in zip(text.offsets, text.offsets[1:], strict=False)
            ]
        )
        shift = self.weight[1] * means + self.weight[2] * times / 1000
        shift = shift if guidance is None else shift + 0.1 * guidance
        noise = self.weight[0] * noisy + shift[:, None, None, None]
        return torch.cat([noise, torch.full_like(noise, 1e6)], dim=1)


def consistency(
    low: float, high: float, *, num_teacher_steps: int = 50, huber_c: float = 0.001, guided_weight: float = 0.0
) -> Consistency:
    student = lcm_student(guidance=(low, high), num_teacher_steps=num_teacher_steps)
    return Consistency(
        process=DDPM(student=student),
        inputs=NetworkInputs(scaling_factor=SCALE, shift_factor=SHIFT, null_label=None, dtype=torch.float32),
        null_text=torch.full((2, 8), 0.5, dtype=torch.bfloat16),
        guidance_range=(low, high),
        huber_c=huber_c,
        guided_weight=guided_weight,
        num_steps=8,
    )


def said(network: Linear, x: np.ndarray, time: int, mean: float, guidance: float | None) -> np.ndarray:
    weight = network.weight.detach().double().numpy()
    shift = weight[1] * mean + weight[2] * time / 1000 + (0 if guidance is None else 0.1 * guidance)
    return weight[0] * x + shift


@pytest.mark.parametrize(("low", "high"), [(4.0, 16.0), (5.5, 5.5)])
def test_the_loss_is_the_published_one(low: float, high: float) -> None:
    """Published: x + w (x - x_uncond), w = scale - 1; scalings of t / 0.1; the mean of the pseudo-Huber distance."""
    batch = make_batch(has_text=True)
    student, target, teacher = (Linear(seed) for seed in (1, 2, 3))
    objective = consistency(low, high)
    losses = objective.loss({"network": student, "target": target, "teacher": teacher}, batch)
    signals = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert batch.text is not None
    text, std = batch.text.values.double().numpy(), batch.std.double().numpy()
    latents = (batch.mean.double().numpy() + std * batch.posterior_noise.double().numpy() - SHIFT) * SCALE
    expected, squares = [], []
    for i, draw in enumerate(batch.timestep_draws.tolist()):
        index = int(draw * 50)
        time, before = 20 * index + 19, max(20 * index - 1, 0)
        scale = low + (high - low) * (50 * draw - index)
        told, w = scale if low < high else None, scale - 1
        mean = text[batch.text.offsets[i] : batch.text.offsets[i + 1]].mean()
        x = np.sqrt(signals[time]) * latents[i] + np.sqrt(1 - signals[time]) * batch.noise[i].double().numpy()
        conditional, null = said(teacher, x, time, mean, None), said(teacher, x, time, 0.5, None)
        noise = conditional + w * (conditional - null)
        clean = (x - np.sqrt(1 - signals[time]) * noise) / np.sqrt(signals[time])
        earlier = np.sqrt(signals[before]) * clean + np.sqrt(1 - signals[before]) * noise

        def estimate(network: Linear, x: np.ndarray, time: int) -> np.ndarray:
            scaled = time / 0.1
            skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
            noise = said(network, x, time, mean, told)  # noqa: B023
            return skip * x + out * (x - np.sqrt(1 - signals[time]) * noise) / np.sqrt(signals[time])

        wanted = estimate(target, earlier, before)
        if index == 0:
            assert time == 19 and before == 0
            np.testing.assert_array_equal(wanted, earlier), "at timestep 0 an estimate is what is seen"
        difference = estimate(student, x, time) - wanted
        expected.append(np.mean(np.sqrt(difference**2 + 0.001**2) - 0.001))
        squares.append(np.mean(difference**2))
    torch.testing.assert_close(losses.total.double(), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.parts["mse"].double(), torch.tensor(squares), rtol=1e-4, atol=1e-6)
    assert losses.times.tolist() == [0.019, 0.039, 0.519, 0.999]
    assert objective.networks == ROLES and objective.families == ("latents", "text")


@pytest.mark.parametrize(("step", "weight"), [(0, 10.0), (6, 2.5), (8, 0.0), (9, 0.0)])
def test_guidance_is_learnt_from_the_teacher_itself_the_less_the_later(step: int, weight: float) -> None:
    batch = replace(make_batch(has_text=True), step=step)
    student, target, teacher = (Linear(seed) for seed in (1, 2, 3))
    networks: dict[str, nn.Module] = {"network": student, "target": target, "teacher": teacher}
    plain = consistency(4.0, 16.0).loss(networks, batch)
    objective = consistency(4.0, 16.0, guided_weight=10.0)
    student.calls.clear(), target.calls.clear(), teacher.calls.clear()
    losses = objective.loss(networks, batch)
    calls = [len(each.calls) for each in (student, target, teacher)]
    assert calls == [1, 1, 2], "the teacher's step has computed it: no pass is more"
    times, _, guidance = objective.draws(batch)
    noisy = objective.process.noisy(objective.inputs.latents(batch), batch.noise, times).double().numpy()
    assert batch.text is not None
    text, expected = batch.text.values.double().numpy(), list[float]()
    for i, (x, time, scale) in enumerate(zip(noisy, times.tolist(), guidance.tolist(), strict=True)):
        mean = text[batch.text.offsets[i] : batch.text.offsets[i + 1]].mean()
        led, null = said(teacher, x, time, mean, None), said(teacher, x, time, 0.5, None)
        difference = said(student, x, time, mean, scale) - (null + scale * (led - null))
        expected.append(np.mean(difference**2))
    torch.testing.assert_close(losses.parts["guided"].double(), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert torch.equal(losses.parts["mse"], plain.parts["mse"]) and "guided" not in plain.parts
    torch.testing.assert_close(losses.total, plain.total + weight * losses.parts["guided"])
    (gradient,) = torch.autograd.grad(losses.total.sum(), student.weight, retain_graph=True)
    (less,) = torch.autograd.grad(plain.total.sum(), student.weight)
    assert torch.allclose(gradient, less) == (weight == 0)
    losses.total.sum().backward()
    assert target.weight.grad is None and teacher.weight.grad is None


def test_only_the_student_has_a_gradient_and_is_told_the_guidance() -> None:
    batch = make_batch(has_text=True)
    student, target, teacher = (Linear(seed) for seed in (1, 2, 3))
    losses = consistency(4.0, 16.0).loss({"network": student, "target": target, "teacher": teacher}, batch)
    losses.total.sum().backward()
    assert student.weight.grad is not None and student.weight.grad.all()
    assert target.weight.grad is None and teacher.weight.grad is None
    (one,), (other,), (led, null) = student.calls, target.calls, teacher.calls
    assert [call["has_gradient"] for call in (one, other, led, null)] == [True, False, False, False]
    assert torch.equal(one["guidance"], other["guidance"]) and led["guidance"] is null["guidance"] is None
    draws = batch.timestep_draws * 50
    torch.testing.assert_close(one["guidance"], (4 + 12 * (draws - draws.floor())).float())
    assert null["text"].values.unique().tolist() == [0.5] and null["text"].offsets.tolist() == [0, 2, 4, 6, 8]
    assert torch.equal(led["text"].values, one["text"].values)
    plain = consistency(5.5, 5.5).loss
    student.calls.clear()
    plain({"network": student, "target": target, "teacher": teacher}, batch)
    assert student.calls[0]["guidance"] is None


def test_a_student_whose_answers_agree_with_the_teachers_has_no_loss() -> None:
    """A teacher that says the noise there is leads back along a line, on which all estimates are one."""

    class Knowing(nn.Module):
        has_size_condition = False

        def forward(self, noisy: Tensor, *_: Any, size: Any) -> Tensor:
            return torch.cat([batch.noise, batch.noise], dim=1)

    batch = make_batch(has_text=True)
    networks = {name: Knowing() for name in ROLES}
    losses = consistency(5.5, 5.5).loss(networks, batch)
    assert float(losses.total.max()) < 0.05, "but for the scalings, of which more is seen the earlier it is"


def test_a_step_takes_twice_what_denoising_takes() -> None:
    """A pass forward and two back of the student, one forward of its average and two of the teacher."""
    inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=None, dtype=torch.float32)
    process = DDPM(student=lcm_student(guidance=(4.0, 16.0)), device="meta")
    null = torch.empty(5, D_TEXT, dtype=torch.bfloat16, device="meta")
    distil = Consistency(process=process, inputs=inputs, null_text=null, guidance_range=(4.0, 16.0), huber_c=0.001)
    plain, told = (PixArt(replace(SHAPE, has_guidance_condition=is_told)) for is_told in (False, True))
    networks = {"network": told, "target": copy.deepcopy(told).requires_grad_(False)}
    networks["teacher"] = copy.deepcopy(plain).requires_grad_(False)
    pairs = ((Denoise(process=process, inputs=inputs), {"network": plain}), (distil, networks))
    denoising, distilling = (
        StepFlops(
            objective, {name: blank_copy(each) for name, each in used.items()}, in_channels=CHANNELS, text_width=D_TEXT
        ).of_samples(1, height=16, width=16, num_text_tokens=5)
        for objective, used in pairs
    )
    assert distilling == pytest.approx(2 * denoising, rel=0.02)
    counts = count_weights(distil.networks, networks)
    assert counts.trained == count_parameters(told)
    assert counts.beside == count_parameters(told) + count_parameters(plain)


def settings_of(tmp_path: Path, **others: Any) -> dict[str, Any]:
    torch.manual_seed(7)
    network = PixArt(SHAPE)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)
    folder = saved(network, tmp_path / "teacher")
    return {"starts_from": folder, "objective": "consistency", "networks.teacher": folder, **others}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("job"))


def test_a_stage_says_what_its_student_is_made_for(run: Path, tmp_path: Path) -> None:
    job, survey = open_job(run, 2, **settings_of(tmp_path))
    assert job.settings.process_spec == ddpm_spec(student=lcm_student(guidance=(4.0, 16.0)))
    config = network_config(job, survey)
    assert isinstance(config, PixArtConfig) and config.has_guidance_condition
    student, teacher = starting_network(job, config), load_diffusers(Path(str(job.start.path)))
    assert isinstance(student, PixArt) and isinstance(teacher, PixArt)
    latents, text, times = torch.randn(2, 4, 4, 4), torch.randn(2, 3, D_TEXT), torch.tensor([19, 999])
    ours = student(latents, times, text, guidance=torch.tensor([4.0, 16.0]))
    assert torch.equal(ours, teacher(latents, times, text)), "it begins as the teacher"
    assert "training.consistency" not in job.fingerprint.fields
    objective = choose_objective(job, torch.device("cpu"))
    assert isinstance(objective, Consistency) and objective.null_text.shape == (2, D_TEXT)
    assert objective.null_text.dtype == torch.bfloat16 and (objective.null_text == 1).all()
    assert (objective.guided_weight, objective.num_steps) == (1.0, job.settings.num_steps)
    fixed, survey = open_job(run, 2, **settings_of(tmp_path), **{"consistency.guidance_range": [5.5, 5.5]})
    assert fixed.settings.process_spec == ddpm_spec(student=lcm_student(guidance=5.5))
    assert fixed.fingerprint.fields["training.consistency"] == {"guidance_range": [5.5, 5.5]}
    config = network_config(fixed, survey)
    assert isinstance(config, PixArtConfig) and not config.has_guidance_condition
    alone = choose_objective(fixed, torch.device("cpu"))
    assert isinstance(alone, Consistency) and alone.guided_weight == 0, "a guidance that is not told is learnt as LCM's"
    plain, _ = open_job(run, 2, starts_from="scratch", **{"consistency.huber_c": 0.01})
    assert "training.consistency" not in plain.fingerprint.fields


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"process": "flow", "consistency.timestep_scaling": 10.0},
            r"consistency\.timestep_scaling = 10 is for process ddpm, but .*process is 'flow', whose .*: leave it out",
        ),
        ({"trains": "lora"}, r"trains = 'lora' has no place for an embedding of the guidance, .* \[4\.0, 16\.0\]"),
        ({"trains": "control"}, r"'consistency' follows a teacher, which no image leads, .*sampling\.control_branch"),
        ({"consistency.guidance_range": [16.0, 4.0]}, r"a range is \[low, high\] with 1 <= low <= high"),
        ({"consistency.guidance_range": [0.5, 4.0]}, r"a range is \[low, high\] with 1 <= low <= high"),
        ({"consistency.num_teacher_steps": 0}, r"consistency\.num_teacher_steps"),
        (
            {"consistency.guided_weight": 3.0, "consistency.guidance_range": [5.5, 5.5]},
            r"consistency\.guided_weight = 3 is for a range of guidance, .*range is \[5\.5, 5\.5\]: leave it out",
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused(run: Path, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_job(run, 2, **(settings_of(tmp_path) | settings))


def test_it_is_for_a_network_that_reads_text(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective = 'consistency' is for a PixArt, but .*network is 'dit'"):
        open_job(run, 1, **settings_of(tmp_path))


def test_a_new_condition_must_train(run: Path, tmp_path: Path) -> None:
    job, survey = open_job(run, 2, **settings_of(tmp_path, trains=["blocks.*"]))
    with pytest.raises(UserError, match=r"trains leaves out guidance_embed\.hidden\.weight, which begins at zero"):
        starting_network(job, network_config(job, survey))
    job, survey = open_job(run, 2, **settings_of(tmp_path, trains=["blocks.*", "guidance_embed.*"]))
    starting_network(job, network_config(job, survey))


def test_a_teacher_that_is_told_its_guidance_is_a_student_whatever_is_said_of_it(run: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    teacher = load_diffusers(Path(settings["networks.teacher"]))
    assert isinstance(teacher, PixArt)
    told = saved(with_guidance_condition(teacher), tmp_path / "told")
    job, survey = open_job(run, 2, **settings | {"networks.teacher": told})
    with pytest.raises(
        UserError, match=r"networks\.teacher \(.*\) is told its guidance, as students alone are: name the"
    ):
        objective_networks(job, ROLES, starting_network(job, network_config(job, survey)))


def test_a_teacher_of_another_noise_schedule_is_refused(run: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "plain")
    scaled = tmp_path / "scaled" / "transformer"
    shutil.copytree(settings["networks.teacher"], scaled)
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scaled" / "scheduler")
    job, survey = open_job(run, 2, **settings | {"networks.teacher": str(scaled)})
    said = r"networks\.teacher \(.*\) was trained with beta_schedule scaled_linear of its noise schedule, .* is linear"
    with pytest.raises(UserError, match=said):
        objective_networks(job, ROLES, starting_network(job, network_config(job, survey)))


def test_lora_has_one_guidance(run: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, trains="lora") | {"consistency.guidance_range": [5.5, 5.5], "lora.rank": 2}
    job, survey = open_job(run, 2, **settings)
    config = network_config(job, survey)
    assert isinstance(config, PixArtConfig) and not config.has_guidance_condition
    starting_network(job, config)


def test_settings_are_those_published() -> None:
    settings = ConsistencySettings()
    assert settings.student("ddpm") == lcm_student(guidance=(4.0, 16.0))
    assert settings.student("flow") == flow_student(guidance=(4.0, 16.0))
    assert settings.has_range and settings.huber_c == 0.001


def distilled(folder: Path, **settings: Any) -> Path:
    """Distil in stage 2, once more with a cut in the middle, and on two ranks; return the first run, all are alike."""
    whole, held_out = make_run(folder / "whole"), {"validation_shards": ["laion_1"], "validate_every": 6}
    out = train(whole, 2, **settings, **held_out, checkpoint_every=6)
    assert "networks that run forward alone" in out
    cut, other = folder / "cut" / whole.name, make_run(folder / "other")
    shutil.copytree(whole.parent, cut.parent)
    stage = cut / "training" / "stage2"
    shutil.rmtree(stage / "step-12")
    (stage / "latest").write_text("step-6\n")
    train(cut, 2, **settings, **held_out, checkpoint_every=6)
    weights = [run / "training/stage2/step-12/model/diffusion_pytorch_model.safetensors" for run in (whole, cut)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    train(other, 2, **settings, **held_out, num_processes=2, zero_stage=2)
    lines, again, resumed = metrics(whole, 2), metrics(other, 2), metrics(cut, 2)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines], "the target is part of the resume"
    for line, same in zip(lines, again, strict=True):
        for name in ("loss", "mse"):
            assert same[name] == pytest.approx(line[name], rel=1e-3), "whatever is sharded"
    return whole


@pytest.mark.slow
def test_a_stage_distils_and_resumes_exactly(tmp_path: Path) -> None:
    settings: Any = settings_of(tmp_path, ema_decay=0.95)
    whole = distilled(tmp_path, **settings)
    checkpoint = find_checkpoint(whole / "training" / "stage2")
    assert checkpoint is not None
    assert checkpoint.trainer["process"] == ddpm_spec(student=lcm_student(guidance=(4.0, 16.0)))
    student = load_diffusers(checkpoint.weights)
    assert isinstance(student, PixArt) and student.config.has_guidance_condition
    assert student.guidance_embed.out.weight.any(), "it has learnt what it is told"
    scheduler = (checkpoint.path / "scheduler" / "scheduler_config.json").read_text()
    assert "LCMScheduler" in scheduler

    taught = settings | {"networks.teacher": str(checkpoint.path)}
    with pytest.raises(UserError, match=r"networks\.teacher = .* is itself a student, distilled by lcm to few steps"):
        open_job(make_run(tmp_path / "again"), 2, **taught)
    job, survey = open_job(tmp_path / "again" / "run", 2, starts_from=str(checkpoint.path))
    assert any("were distilled by lcm to few steps" in line for line in job.departures)
    config = network_config(job, survey)
    former, folded = load_diffusers(checkpoint.weights), starting_network(job, config)
    assert isinstance(former, PixArt) and isinstance(folded, PixArt) and not folded.config.has_guidance_condition
    latents, text, times = torch.randn(2, 4, 4, 4), torch.randn(2, 3, D_TEXT), torch.tensor([19, 999])
    expected = former(latents, times, text, guidance=torch.tensor([4.5, 4.5]))
    torch.testing.assert_close(folded(latents, times, text), expected, rtol=1e-4, atol=1e-5)
    few = {
        "starts_from": str(checkpoint.path),
        "objective": "distribution_matching",
        "networks.teacher": settings["networks.teacher"],
    }
    job, survey = open_job(tmp_path / "again" / "run", 2, **few)
    nearest = former(latents, times, text, guidance=torch.tensor([4.0, 4.0]))
    folded = starting_network(job, network_config(job, survey))
    assert isinstance(folded, PixArt), "of 4 to 16 what is nearest to the stage's own 1.5"
    torch.testing.assert_close(folded(latents, times, text), nearest, rtol=1e-4, atol=1e-5)
    on = {"starts_from": str(checkpoint.path), "trains": "lora"}
    job, survey = open_job(tmp_path / "again" / "run", 2, **on)
    with pytest.raises(UserError, match=r"is told its guidance, and .*trains = 'lora' leaves weights as they are"):
        starting_network(job, network_config(job, survey))
    assert with_guidance_condition(former) is former
