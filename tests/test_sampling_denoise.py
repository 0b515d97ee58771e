"""Guidance around both transformers."""

import torch
from sampling_run import DIT, PIXART, randomised

from pixart.dit import DiT
from pixart.drawing.denoise import predict_from_labels, predict_from_text
from pixart.model import PixArt, PixArtConfig

LATENTS = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))
TEXTS = [torch.randn(length, 32, generator=torch.Generator().manual_seed(length)) for length in (5, 2, 9)]
NULL_TEXT = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
TIMESTEP = torch.tensor(321)


class Counting(torch.nn.Module):
    """Count the rows that a model is asked for."""

    def __init__(self, model: PixArt) -> None:
        super().__init__()
        self.model, self.config, self.final, self.num_rows = model, model.config, model.final, 0
        self.read_text = model.read_text

    def forward(self, latents, *arguments):
        self.num_rows += len(latents)
        return self.model(latents, *arguments)


def test_guidance_extrapolates_noise_and_keeps_the_conditional_variance():
    model = randomised(PixArt(PIXART))
    guided = predict_from_text(model, TEXTS, NULL_TEXT, guidance_scale=3.0, size_pixels=(32, 48))(LATENTS, TIMESTEP)
    times = TIMESTEP.expand(1)
    for i, text in enumerate(TEXTS):
        with_text = model(LATENTS[i : i + 1], times, text[None])
        without = model(LATENTS[i : i + 1], times, NULL_TEXT[None])
        expected = without[:, :4] + 3 * (with_text[:, :4] - without[:, :4])
        torch.testing.assert_close(guided[i : i + 1, :4], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(guided[i : i + 1, 4:], with_text[:, 4:], rtol=1e-4, atol=1e-5)


def test_guidance_of_one_halves_the_work():
    model = Counting(randomised(PixArt(PIXART)))
    plain = predict_from_text(model, TEXTS, NULL_TEXT, guidance_scale=1.0, size_pixels=(32, 48))(LATENTS, TIMESTEP)
    assert model.num_rows == 3
    predict_from_text(model, TEXTS, NULL_TEXT, guidance_scale=2.0, size_pixels=(32, 48))(LATENTS, TIMESTEP)
    assert model.num_rows == 9
    torch.testing.assert_close(plain[1:2], model(LATENTS[1:2], TIMESTEP.expand(1), TEXTS[1][None]))


def test_labels_are_guided_away_from_the_null_class():
    model = randomised(DiT(DIT))
    guided = predict_from_labels(model, [0, 4, 4], guidance_scale=2.0)(LATENTS, TIMESTEP)
    times = TIMESTEP.expand(3)
    with_label = model(LATENTS, times, torch.tensor([0, 4, 4]))
    without = model(LATENTS, times, torch.tensor([5, 5, 5]))
    torch.testing.assert_close(guided[:, :4], 2 * with_label[:, :4] - without[:, :4], rtol=1e-4, atol=1e-5)


def test_size_condition_gets_the_size_in_pixels():
    config = PixArtConfig(num_layers=1, num_heads=2, head_dim=12, caption_channels=32, has_size_condition=True)
    model = randomised(PixArt(config))
    actual = predict_from_text(model, TEXTS, NULL_TEXT, guidance_scale=1.0, size_pixels=(32, 48))(LATENTS, TIMESTEP)
    size = torch.tensor([[32.0, 48.0, 32 / 48]])
    expected = model(LATENTS[:1], TIMESTEP.expand(1), TEXTS[0][None], size=size)
    torch.testing.assert_close(actual[:1], expected, rtol=1e-4, atol=1e-5)


def test_bf16_weights_keep_latents_in_fp32():
    model = randomised(PixArt(PIXART)).bfloat16()
    output = predict_from_text(model, TEXTS, NULL_TEXT, guidance_scale=2.0, size_pixels=(32, 48))(LATENTS, TIMESTEP)
    assert output.dtype == torch.float32
