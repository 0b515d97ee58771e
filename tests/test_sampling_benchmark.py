"""The sampler's benchmark on a tiny model: the GPU's cases, compiled too, give the pipeline's images."""

from functools import partial

import torch
from diffusers import AutoencoderKL
from tiny_encoders import save_codec

from benchmarks.sample import Case, measure, random_model
from pixart.model import PixArtConfig


def test_cases_of_the_1024px_model_draw_equal_images(tmp_path, monkeypatch):
    # dynamo traces as it does for a GPU, without the minutes of generating code
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = random_model(
        PixArtConfig(
            num_layers=1,
            num_heads=2,
            head_dim=12,
            caption_channels=96,
            sample_size=128,
            interpolation_scale=2.0,
            has_size_condition=True,
        )
    )
    vae = AutoencoderKL.from_pretrained(save_codec(tmp_path / "vae"))
    cases = [Case(pixels=32, batch_size=2), Case(pixels=32, batch_size=1, is_compiled=True)]
    figures = measure(model, vae, cases, num_steps=2, num_rounds=1)
    assert list(figures) == ["32px, batch 2", "32px, batch 1, compiled"]
    for values in figures.values():
        assert values["max_difference"] <= 2
        assert values["ratio"] > 0
