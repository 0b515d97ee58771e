"""What a model is given of a batch and what its loss is, against the formulas written out."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixart.model import PackedText
from pixart.processes.ddpm import DDPM
from pixart.processes.specs import DDPM_SCHEDULE as SCHEDULE
from training.data.batch import Batch
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Losses, Trained

NULL_LABEL = 10
SCALE, SHIFT = 0.25, 0.5
DRAWS = (0.0, 0.0376, 0.5, 0.99999)
STEPS = SCHEDULE["num_train_timesteps"]
TIMESTEPS = torch.tensor([math.floor(draw * STEPS) for draw in DRAWS])


class Recorder(nn.Module):
    """Keeps what it is called with and always gives the same output."""

    has_size_condition = False

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []
        self.output = torch.randn(len(DRAWS), 8, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)

    def forward(self, *inputs: Tensor, size: Tensor | None = None) -> Tensor:
        assert size is None
        self.calls.append(inputs)
        return self.output


def make_batch(*, has_text: bool) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = (len(DRAWS), 4, 4, 6)
    condition: dict[str, Any] = {"text": None, "labels": torch.tensor([3, 0, 9, 3])}
    if has_text:
        offsets = torch.tensor([0, 5, 6, 9, 11], dtype=torch.int32)
        condition = {"text": PackedText(normal(16, 8).bfloat16(), offsets, max_length=5), "labels": None}
    return Batch(
        step=0,
        bucket="32x48",
        keys=list("abcd"),
        shards=["laion_0"] * 4,
        mean=(2 * normal(*latents) + 1).half(),
        std=normal(*latents).abs().half(),
        posterior_noise=normal(*latents),
        noise=normal(*latents),
        timestep_draws=torch.tensor(DRAWS, dtype=torch.float64),
        is_dropped=torch.tensor([True, False, False, True]),
        is_prior=torch.tensor([False, True, False, True]),
        size=torch.zeros(4, 3),
        **condition,
    )


def denoise(batch: Batch, dtype: torch.dtype, **settings: Any) -> tuple[Recorder, Losses]:
    null_label = NULL_LABEL if batch.text is None else None
    inputs = NetworkInputs(scaling_factor=SCALE, shift_factor=SHIFT, null_label=null_label, dtype=dtype)
    objective = replace(Denoise(process=DDPM(), inputs=inputs), **settings)
    assert objective.networks == {"network": Trained()}
    assert objective.families == ("latents", "labels" if batch.text is None else "text")
    model = Recorder(dtype)
    return model, objective.loss({"network": model}, batch)


def expected_noisy_latents(batch: Batch) -> Tensor:
    """fp64, by DDPM's equation 4 on a sample of the VAE's posterior."""
    betas = torch.linspace(SCHEDULE["beta_start"], SCHEDULE["beta_end"], STEPS, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)[TIMESTEPS, None, None, None]
    sample = batch.mean.double() + batch.std.double() * batch.posterior_noise
    return signal.sqrt() * (sample - SHIFT) * SCALE + (1 - signal).sqrt() * batch.noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_text", [False, True], ids=["labels", "text"])
def test_a_model_sees_noisy_samples_of_the_scaled_posterior(has_text: bool, dtype: torch.dtype) -> None:
    batch = make_batch(has_text=has_text)
    model, _ = denoise(batch, dtype)
    ((noisy, timesteps, *_),) = model.calls
    assert noisy.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]  # bf16: half a unit of its last place
    torch.testing.assert_close(noisy.double(), expected_noisy_latents(batch), rtol=tolerance, atol=1e-6)
    assert timesteps.dtype == torch.int64 and torch.equal(timesteps, TIMESTEPS)


def test_a_dropped_label_is_the_null_label() -> None:
    batch = make_batch(has_text=False)
    model, _ = denoise(batch, torch.float32)
    ((_, _, labels),) = model.calls
    assert labels.tolist() == [NULL_LABEL, 0, 9, NULL_LABEL]
    assert batch.labels is not None and batch.labels.tolist() == [3, 0, 9, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_text_reaches_the_model_packed(dtype: torch.dtype) -> None:
    batch = make_batch(has_text=True)
    assert batch.text is not None
    model, _ = denoise(batch, dtype)
    ((_, _, text),) = model.calls
    assert isinstance(text, PackedText)
    assert text.values.dtype == dtype and torch.equal(text.values, batch.text.values.to(dtype))
    assert text[1:] == batch.text[1:], "the same offsets"


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("has_text", [False, True], ids=["labels", "text"])
def test_the_loss_of_each_sample_is_that_of_the_added_noise(has_text: bool, gamma: float | None) -> None:
    batch = make_batch(has_text=has_text)
    model, actual = denoise(batch, torch.bfloat16, process=DDPM(min_snr_gamma=gamma))
    expected = DDPM(min_snr_gamma=gamma).loss(model.output, batch.mean, batch.noise, TIMESTEPS)
    assert actual.parts.keys() == {"mse", "vlb"}
    assert (actual.times * STEPS).tolist() == TIMESTEPS.tolist()
    pairs = [(actual.parts[name], expected.parts[name]) for name in actual.parts]
    for ours, theirs in [(actual.total, expected.total), *pairs]:
        assert ours.shape == (len(DRAWS),) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)
    by_hand = (model.output[:, :4].double() - batch.noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(actual.parts["mse"].double(), by_hand, rtol=1e-5, atol=0)
