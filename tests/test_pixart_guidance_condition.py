"""The guidance that a network is told: what it begins as, how one is folded into the weights, and who refuses it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from torch import Tensor, nn

from errors import UserError
from pixart.convert import load_diffusers, original_weights, save_diffusers
from pixart.guidance_condition import fold_guidance, with_guidance_condition
from pixart.layers import frequency_embedding
from pixart.model import PixArt, PixArtConfig, told_guidance

CONFIG = PixArtConfig(num_layers=2, num_heads=2, head_dim=24, caption_channels=20, sample_size=8)
SHAPES = {
    "plain": CONFIG,
    "sized": replace(CONFIG, has_size_condition=True),
    "compressed": replace(CONFIG, kv_compressed_blocks=(1,)),
    "per-block": replace(CONFIG, adaln="per-block"),
}


def network_of(config: PixArtConfig) -> PixArt:
    torch.manual_seed(0)
    network = PixArt(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def output_of(network: PixArt, *scales: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 20, generator=generator)
    size = torch.tensor([[64.0, 96.0, 0.67]]).repeat(2, 1) if network.config.has_size_condition else None
    guidance, dtype = torch.tensor(scales) if scales else None, network.final.weight.dtype
    return network(latents.to(dtype), torch.tensor([10, 700]), text.to(dtype), size=size, guidance=guidance)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_a_guidance_folded_into_the_weights_is_the_guidance_that_is_told(config: PixArtConfig) -> None:
    network = network_of(replace(config, has_guidance_condition=True)).double()
    former = network.timestep_embed.out.bias.clone()
    for scale in (1.0, 4.5, 16.0):
        folded = fold_guidance(network, scale)
        assert folded.config == config
        torch.testing.assert_close(output_of(folded), output_of(network, scale, scale), rtol=0, atol=1e-9)
    assert torch.equal(network.timestep_embed.out.bias, former), "the network itself stays as it is"
    apart = (output_of(network, 4.0, 9.0) - output_of(network, 9.0, 9.0)).abs().amax(dim=(1, 2, 3))
    assert apart[0] > 1e-3 and apart[1] == 0, "each sample has its own"


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_it_begins_as_the_weights_it_is_put_on(config: PixArtConfig) -> None:
    network = network_of(config)
    told = with_guidance_condition(network)
    assert told.config == replace(config, has_guidance_condition=True)
    assert torch.equal(output_of(told, 4.0, 16.0), output_of(network))
    output_of(told, 4.0, 16.0).square().sum().backward()
    assert told.guidance_embed.out.weight.grad is not None and told.guidance_embed.out.weight.grad.any()
    fresh = PixArt(told.config)
    assert not fresh.guidance_embed.out.weight.any() and fresh.guidance_embed.hidden.weight.any()
    assert with_guidance_condition(told) is told


def test_it_is_told_what_diffusers_tells_its_latent_consistency_models() -> None:
    scales = torch.tensor([1.0, 4.0, 5.5, 16.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=256)
    ours = frequency_embedding(told_guidance(scales), shift=1)  # theirs has sines first
    torch.testing.assert_close(ours.roll(128, dims=1), theirs, rtol=0, atol=2e-2)
    torch.testing.assert_close(ours[0], torch.cat([torch.ones(128), torch.zeros(128)]))


def test_who_is_told_it_and_who_is_not() -> None:
    with pytest.raises(ValueError, match="has_guidance_condition is False"):
        output_of(network_of(CONFIG), 4.0, 4.0)
    with pytest.raises(ValueError, match="has_guidance_condition is True"):
        output_of(network_of(replace(CONFIG, has_guidance_condition=True)))
    with pytest.raises(ValueError, match="is told no guidance"):
        fold_guidance(network_of(CONFIG), 4.0)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_a_folder_keeps_it_and_diffusers_refuses_it(config: PixArtConfig, tmp_path: Path) -> None:
    network = network_of(replace(config, has_guidance_condition=True))
    save_diffusers(network, tmp_path)
    loaded = load_diffusers(tmp_path)
    assert loaded.config == network.config
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(NotImplementedError, match=r"ada_norm_single|ada_norm_zero"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)


def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    save_diffusers(network_of(replace(CONFIG, has_guidance_condition=True)), tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for changed, message in (
        ({"guidance_condition": False}, r"norm_type is 'ada_norm_single_guidance', which .*False contradicts"),
        ({"norm_type": "ada_norm_single"}, r"norm_type is 'ada_norm_single', which .*guidance_condition True"),
        ({"guidance_condition": 4.5}, r"guidance_condition is 4\.5, not true or false"),
    ):
        path.write_text(json.dumps(stored | changed))
        with pytest.raises(UserError, match=message):
            load_diffusers(tmp_path)


def test_an_original_file_has_no_place_for_it() -> None:
    with pytest.raises(UserError, match="no place for a guidance condition"):
        original_weights(network_of(replace(CONFIG, has_guidance_condition=True)))
