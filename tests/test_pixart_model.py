"""PixArt against diffusers' PixArtTransformer2DModel, and the properties that text and batches must have."""

from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from errors import UserError
from pixart import model as presets
from pixart.layouts import load_weights, pixart_diffusers_layout
from pixart.model import PixArt, PixArtConfig

TINY = PixArtConfig(num_layers=3, num_heads=2, head_dim=12, caption_channels=20, sample_size=8)
SCALED = replace(TINY, sample_size=24, interpolation_scale=2.0)
SIZED = replace(TINY, has_size_condition=True)
PER_BLOCK = replace(TINY, adaln="per-block")
REAL_WIDTH = PixArtConfig(num_layers=2, caption_channels=64, sample_size=16)


def reference_for(config: PixArtConfig, seed: int = 0) -> PixArtTransformer2DModel:
    """diffusers' model with random weights everywhere, zero-initialised layers included."""
    torch.manual_seed(seed)
    reference = PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        cross_attention_dim=config.width,
        caption_channels=config.caption_channels,
        sample_size=config.sample_size,
        interpolation_scale=config.interpolation_scale,
        use_additional_conditions=config.has_size_condition,
    )
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return reference


def ours_from(reference: PixArtTransformer2DModel, config: PixArtConfig) -> PixArt:
    model = load_weights(config, reference.state_dict(), pixart_diffusers_layout(config), where="diffusers")
    assert isinstance(model, PixArt)
    return model


def randomised(config: PixArtConfig) -> PixArt:
    if config.adaln == "single":
        return ours_from(reference_for(config), config)
    torch.manual_seed(0)
    model = PixArt(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return model


def inputs_for(config: PixArtConfig, height: int, width: int, num: int = 3):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(num, config.in_channels, height, width, generator=generator)
    text = torch.randn(num, 7, config.caption_channels, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 3, 1])[:num, None]
    return latents, torch.tensor([0, 417, 999])[:num], text, mask


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [(TINY, 8, 8), (TINY, 6, 14), (SCALED, 20, 24), (SIZED, 12, 16), (REAL_WIDTH, 16, 8)],
    ids=["square", "wide", "scaled positions", "size condition", "real width"],
)
def test_outputs_and_gradients_equal_diffusers(config, height, width):
    reference = reference_for(config)
    model = ours_from(reference, config)
    latents, timesteps, text, mask = inputs_for(config, height, width)
    size = torch.tensor([[64.0, 96.0, 0.6], [96.0, 64.0, 1.5], [64.0, 64.0, 1.0]])
    added = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]} if config.has_size_condition else None
    latents.requires_grad_()
    expected = reference(
        latents,
        encoder_hidden_states=text,
        timestep=timesteps,
        encoder_attention_mask=mask,
        added_cond_kwargs=added,
    ).sample
    actual = model(latents, timesteps, text, mask, size if config.has_size_condition else None)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) / expected[0].numel() ** 0.5
    (expected_input,) = torch.autograd.grad((expected * weights).sum(), latents, retain_graph=True)
    (actual_input,) = torch.autograd.grad((actual * weights).sum(), latents, retain_graph=True)
    torch.testing.assert_close(actual_input, expected_input, rtol=1e-5, atol=1e-5)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    parameters = dict(model.named_parameters())
    for theirs, (name,) in pixart_diffusers_layout(config).items():
        gradient = parameters.pop(name).grad
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[theirs], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not parameters


@pytest.mark.parametrize("config", [TINY, PER_BLOCK], ids=["single", "per-block"])
def test_padding_changes_nothing(config):
    model = randomised(config)
    latents, timesteps, text, mask = inputs_for(TINY, 8, 8)
    expected = model(latents, timesteps, text, mask)
    garbage = torch.where(mask[..., None], text, 1e4)
    torch.testing.assert_close(model(latents, timesteps, garbage, mask), expected)
    longer = torch.cat([text, torch.full((3, 5, 20), 9.0)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(model(latents, timesteps, longer, longer_mask), expected)


@pytest.mark.parametrize("config", [TINY, PER_BLOCK], ids=["single", "per-block"])
def test_batch_equals_singles(config):
    model = randomised(config)
    latents, timesteps, text, mask = inputs_for(TINY, 8, 12)
    together = model(latents, timesteps, text, mask)
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = model(latents[i : i + 1], timesteps[i : i + 1], text[i : i + 1, :length])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, PER_BLOCK], ids=["single", "per-block"])
def test_order_of_padding_and_integer_masks_do_not_matter(config):
    model = randomised(config)
    latents, timesteps, text, mask = inputs_for(TINY, 8, 8)
    expected = model(latents, timesteps, text, mask)
    flipped = model(latents, timesteps, text.flip(1), mask.flip(1).long())
    torch.testing.assert_close(flipped, expected, rtol=1e-5, atol=1e-5)


def test_new_model_predicts_zero_and_ignores_text_until_trained():
    model = PixArt(TINY)
    latents, timesteps, text, mask = inputs_for(TINY, 8, 8)
    assert model(latents, timesteps, text, mask).abs().max() == 0
    torch.nn.init.xavier_uniform_(model.final.weight)
    output = model(latents, timesteps, text, mask)
    torch.testing.assert_close(output, model(latents, timesteps, -text, mask))
    assert output.abs().max() > 0


def test_bf16_weights_take_fp32_timesteps():
    model = randomised(TINY)
    latents, timesteps, text, mask = inputs_for(TINY, 8, 8)
    expected = model(latents, timesteps, text, mask)
    actual = model.bfloat16()(latents.bfloat16(), timesteps, text.bfloat16(), mask)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()


def test_positions_are_not_stored():
    assert not list(PixArt(TINY).buffers())


def test_size_must_fit_the_config():
    latents, timesteps, text, mask = inputs_for(TINY, 8, 8)
    with pytest.raises(ValueError, match="has_size_condition is False"):
        PixArt(TINY)(latents, timesteps, text, mask, torch.ones(3, 3))


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (presets.PIXART_XL_2, 611),
        (presets.PIXART_XL_2_1024, 611),
        (presets.PIXART_L_2, 416),
        (presets.PIXART_B_2, 122),
        (presets.PIXART_S_2, 31),
        (replace(presets.PIXART_XL_2, adaln="per-block"), 833),
    ],
)
def test_parameter_counts(config, millions):
    with torch.device("meta"):
        model = PixArt(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_impossible_shapes_are_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        PixArtConfig(num_heads=1, head_dim=10)
    with pytest.raises(UserError, match="sample_size 9"):
        PixArtConfig(sample_size=9)


@pytest.mark.parametrize("config", [TINY, PER_BLOCK], ids=["single", "per-block"])
def test_text_may_be_read_beforehand(config):
    model = randomised(config)
    latents, timesteps, text, mask = inputs_for(config, 8, 8)
    expected = model(latents, timesteps, text, mask)
    assert torch.equal(model(latents, timesteps, model.read_text(text, mask), mask), expected)


def test_per_block_adaln_sees_the_text():
    """Without cross-attention the text acts through the condition alone, where adaLN-single has none of it."""
    for config in (TINY, PER_BLOCK):
        model = randomised(config)
        for block in model.blocks:
            torch.nn.init.zeros_(block.cross_attention.out.weight)
        latents, timesteps, text, mask = inputs_for(config, 8, 8)
        difference = model(latents, timesteps, text, mask) - model(latents, timesteps, 2 * text, mask)
        assert (difference.abs().max() > 1e-3) == (config.adaln == "per-block")
