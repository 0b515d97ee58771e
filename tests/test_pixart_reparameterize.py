"""Re-parameterisation keeps what the DiT computes without class at t = 500."""

from dataclasses import replace

import pytest
import torch

from errors import UserError
from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from pixart.reparameterize import reparameterize


def trained_dit(timestep_shift: int = 0, num_heads: int = 2, head_dim: int = 12) -> DiT:
    torch.manual_seed(0)
    dit = DiT(
        DiTConfig(
            num_layers=3,
            num_heads=num_heads,
            head_dim=head_dim,
            num_classes=10,
            sample_size=8,
            timestep_shift=timestep_shift,
        )
    )
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return dit


def config_for(dit: DiT) -> PixArtConfig:
    shape = dit.config
    return PixArtConfig(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        caption_channels=20,
        sample_size=shape.sample_size,
    )


@pytest.mark.parametrize(("timestep_shift", "num_heads", "head_dim"), [(0, 2, 12), (1, 2, 12), (0, 16, 72)])
@pytest.mark.parametrize("timestep", [500, 37])
def test_output_is_the_dits_without_class_at_the_timestep(timestep_shift, num_heads, head_dim, timestep):
    dit = trained_dit(timestep_shift, num_heads, head_dim)
    model = reparameterize(dit, config_for(dit), timestep=timestep)
    latents, text = torch.randn(2, 4, 8, 6), torch.randn(2, 5, 20)
    timesteps = torch.tensor([timestep, timestep])
    expected = dit(latents, timesteps, None)
    torch.testing.assert_close(model(latents, timesteps, text), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep_shift", [0, 1])
def test_per_block_adaln_keeps_the_dits_output(timestep_shift):
    """At every timestep, if both embed it alike, else at the one of the conversion."""
    dit = trained_dit(timestep_shift)
    model = reparameterize(dit, replace(config_for(dit), adaln="per-block"))
    latents, text = torch.randn(2, 4, 8, 6), torch.randn(2, 5, 20)
    for timesteps in (torch.tensor([500, 500]), *([] if timestep_shift else [torch.tensor([3, 980])])):
        expected = dit(latents, timesteps, None)
        torch.testing.assert_close(model(latents, timesteps, text), expected, rtol=1e-5, atol=1e-5)


def test_first_block_is_modulated_as_in_the_dit_at_every_timestep():
    dit = trained_dit()
    model = reparameterize(dit, config_for(dit))
    assert model.blocks[0].modulation.embedding.abs().max() < 1e-5
    expected = dit.blocks[0].modulation(torch.nn.functional.silu(dit.timestep_embed(torch.tensor([3, 800]))))
    actual = model.global_modulation(torch.nn.functional.silu(model.timestep_embed(torch.tensor([3, 800]))))
    torch.testing.assert_close(actual, expected)


def test_dit_is_left_alone_and_nothing_is_shared():
    dit = trained_dit()
    before = {key: value.clone() for key, value in dit.state_dict().items()}
    model = reparameterize(dit, config_for(dit))
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            parameter.add_(1.0)
    for key, value in dit.state_dict().items():
        torch.testing.assert_close(value, before[key])


def test_text_parts_are_as_in_a_new_model():
    dit = trained_dit()
    torch.manual_seed(5)
    model = reparameterize(dit, config_for(dit))
    torch.manual_seed(5)
    new = PixArt(config_for(dit))
    torch.testing.assert_close(model.caption_projection.hidden.weight, new.caption_projection.hidden.weight)
    assert model.blocks[1].cross_attention.out.weight.abs().max() == 0
    assert model.blocks[1].cross_attention.query.weight.abs().max() > 0


def test_other_shapes_are_refused():
    dit = trained_dit()
    with pytest.raises(UserError, match=r"model\.num_layers is 4, but 3"):
        reparameterize(dit, PixArtConfig(num_layers=4, num_heads=2, head_dim=12, sample_size=8))
    with pytest.raises(UserError, match="positions span 8"):
        reparameterize(dit, PixArtConfig(num_layers=3, num_heads=2, head_dim=12, sample_size=16))
