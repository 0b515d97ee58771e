"""Weights that move on to another VAE beside a teacher, the weights of before, which sees the former latents."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import training_run
from test_training_networks import open_job, saved
from test_training_other_vae import images, patches, random_pixart
from training_run import D_TEXT, make_run, metrics, train, write_latents

from errors import UserError
from pixart.model import PackedText
from pixart.processes.ddpm import DDPM
from training.data.batch import Batch
from training.objectives.choice import choose_objective
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Frozen, Trained
from training.objectives.realignment import Realignment
from training.stages.other_vae import Bridge, bridged

FORMER_SCALE, NUM_STEPS = 0.5, 10


def make_batch(mean: torch.Tensor, former: torch.Tensor, *, step: int) -> Batch:
    num_samples = len(mean)
    text = PackedText(torch.randn(num_samples * 3, D_TEXT), torch.arange(num_samples + 1).int() * 3, 3)
    return Batch(
        step=step,
        bucket="32x32",
        keys=["a"] * num_samples,
        shards=["laion_0"] * num_samples,
        mean=mean,
        std=torch.zeros_like(mean),
        posterior_noise=torch.randn_like(mean),
        noise=torch.randn_like(mean),
        timestep_draws=torch.rand(num_samples, dtype=torch.float64),
        is_dropped=torch.zeros(num_samples, dtype=torch.bool),
        is_prior=torch.zeros(num_samples, dtype=torch.bool),
        size=torch.zeros(num_samples, 3),
        text=text,
        labels=None,
        tensors={"former_latents.mean": former, "former_latents.std": torch.zeros_like(former)},
    )


def realignment(bridge: torch.Tensor) -> Realignment:
    inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=None, dtype=torch.float32)
    return Realignment(
        denoise=Denoise(process=DDPM(), inputs=inputs),
        former_inputs=dataclasses.replace(inputs, scaling_factor=FORMER_SCALE),
        bridge=bridge,
        patch_size=2,
        num_blocks=2,
        num_steps=NUM_STEPS,
    )


def test_a_network_that_sees_what_the_teacher_sees_has_its_tokens() -> None:
    """New latents are the former ones turned; noise that is turned back reaches the teacher as it does the network."""
    teacher, turn = random_pixart(channels=4), torch.linalg.qr(torch.randn(16, 16))[0]
    network = bridged(teacher, Bridge(turn.T, torch.zeros(16), 1.0))
    former = torch.randn(5, 4, 4, 4)
    batch = make_batch(images(patches(former) @ turn.T), former / FORMER_SCALE, step=0)
    objective, networks = realignment(turn.T.contiguous()), {"network": network, "teacher": teacher}
    assert objective.networks == {"network": Trained(), "teacher": Frozen()}
    assert objective.families == ("latents", "text", "former_latents")
    losses = objective.loss(networks, batch)
    assert losses.parts["teacher"].shape == (5,)
    torch.testing.assert_close(losses.parts["teacher"], torch.zeros(5), rtol=0, atol=1e-6)
    other = realignment(torch.eye(16)).loss(networks, batch).parts["teacher"]
    assert (other > 1e-3).all(), "other noise, other tokens"


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (4, 0.6), (NUM_STEPS, 0.0)])
def test_the_teacher_counts_less_from_step_to_step(step: int, weight: float) -> None:
    teacher = random_pixart(channels=4)
    network = random_pixart(channels=8)
    batch = make_batch(torch.randn(3, 8, 4, 4), torch.randn(3, 4, 4, 4), step=step)
    objective = realignment(torch.linalg.qr(torch.randn(32, 16))[0].T.contiguous())
    losses = objective.loss({"network": network, "teacher": teacher}, batch)
    plain = objective.denoise.loss({"network": network}, batch)
    torch.testing.assert_close(losses.total, plain.total + weight * losses.parts["teacher"])
    losses.parts["teacher"].sum().backward()
    assert network.patch_embed.projection.weight.grad is not None
    assert all(each.grad is None for each in teacher.parameters())


def write_former(folder: Path, shards: dict[str, int], *, channels: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "CHANNELS", channels)
        write_latents(folder / "run", 32, shards, buckets=["32x32"], is_bucketed=False)
    return str(folder / "run" / "features" / "latent-32")


def settings_of(tmp_path: Path, *, shards: dict[str, int], channels: int = 2) -> Any:
    folder = saved(random_pixart(channels=channels), tmp_path / "former")
    latents = write_former(tmp_path / "latents", shards, channels=channels)
    settings = {"starts_from": folder, "departs_in": ["vae"], "former_latents": latents}
    return settings | {"objective": "realign", "networks.teacher": folder}


def test_what_it_needs_is_asked_for(tmp_path: Path) -> None:
    run, both = make_run(tmp_path / "own"), {"laion_0": 40, "laion_1": 23}
    settings = settings_of(tmp_path / "two", shards=both)
    with pytest.raises(UserError, match=r"former_latents names no latents of the former VAE, which .*realign"):
        open_job(run, 2, **{key: value for key, value in settings.items() if key != "former_latents"})
    with pytest.raises(UserError, match=r"former_latents = .* lacks shard laion_1, which"):
        open_job(run, 2, **settings_of(tmp_path / "one", shards={"laion_0": 40}))
    job, _ = open_job(run, 2, **settings_of(tmp_path / "eight", shards=both, channels=8))
    with pytest.raises(UserError, match="they have 4 channels where its have 8: choose 'denoise'"):
        choose_objective(job, torch.device("cpu"))


@pytest.mark.slow
def test_a_stage_learns_beside_its_teacher_and_resumes_exactly(tmp_path: Path) -> None:
    settings: Any = settings_of(tmp_path, shards={"laion_0": 40, "laion_1": 23}) | {"optimizer": "muon"}
    whole = make_run(tmp_path / "whole")
    said = train(whole, 2, **settings, checkpoint_every=6)
    assert "networks that run forward alone" in said
    cut, other = tmp_path / "cut" / whole.name, make_run(tmp_path / "other")
    shutil.copytree(whole.parent, cut.parent)
    stage = cut / "training" / "stage2"
    shutil.rmtree(stage / "step-12")
    (stage / "latest").write_text("step-6\n")
    train(cut, 2, **settings, checkpoint_every=6)
    weights = [run / "training/stage2/step-12/model/diffusion_pytorch_model.safetensors" for run in (whole, cut)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    train(other, 2, **settings, num_processes=1)
    lines, again = metrics(whole, 2), metrics(other, 2)
    assert len(lines) == 6
    for line, same in zip(lines, again, strict=True):
        assert line["teacher"] > 0
        for name in ("loss", "mse", "teacher"):
            assert same[name] == pytest.approx(line[name], rel=1e-3), "whatever the number of ranks"
