"""Images decoded a tile at a time: the pixels of the whole, in less memory."""

import math
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from encoders import vae_tiles
from encoders.dc import DCCodec
from encoders.kl import KLCodec
from encoders.latents import DiffusersCodec
from encoders.living_bytes import LivingBytes, fused_attention
from encoders.opening import open_codec
from encoders.vae_precision import probe_latents

KL = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 32],
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
DC = {
    "_class_name": "AutoencoderDC",
    "latent_channels": 8,
    "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [16, 32, 32],
    "decoder_block_out_channels": [16, 32, 32],
    "encoder_layers_per_block": [1, 1, 1],
    "decoder_layers_per_block": [2, 2, 1],
    "encoder_qkv_multiscales": [[], [], [5]],
    "decoder_qkv_multiscales": [[], [], [5]],
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "attention_head_dim": 16,
}
INTERPOLATED = DC | {"upsample_block_type": "interpolate", "decoder_layers_per_block": [0, 2, 1]}
CONFIGS = {"kl": KL, "kl-shallow": KL | {"use_post_quant_conv": False}, "dc": DC, "dc-interpolated": INTERPOLATED}


def codec_of(config: dict) -> DiffusersCodec:
    torch.manual_seed(0)
    is_kl = config["_class_name"] == "AutoencoderKL"
    codec_class, model_class = (KLCodec, AutoencoderKL) if is_kl else (DCCodec, AutoencoderDC)
    model: nn.Module = model_class.from_config(config)
    for weight in model.parameters():
        if weight.dim() == 1:
            nn.init.normal_(weight, mean=0.5, std=0.3)  # norms and biases at their start hide what is left out
    return codec_class(codec_class.read_spec(config, identity=""), model.eval().requires_grad_(False), "test")


def latents_of(codec: DiffusersCodec) -> Tensor:
    return torch.randn(2, codec.spec.channels, 10, 7, generator=torch.Generator().manual_seed(1)) + 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tile_bytes", [1, 40_000, 2**26], ids=["rows", "tiles", "whole"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels-last"])
def test_tiles_have_the_pixels_of_the_whole(name, tile_bytes, layout, monkeypatch):
    monkeypatch.setattr(vae_tiles, "TILE_BYTES", tile_bytes)
    codec = codec_of(CONFIGS[name])
    codec.model.to(memory_format=layout)
    assert codec.can_tile
    latents = latents_of(codec)
    whole, tiled = codec.pixels(latents), codec.pixels(latents, is_tiled=True)
    assert tiled.stride() == whole.stride()
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["kl", "dc"])
def test_in_bfloat16_tiles_are_as_far_from_float32_as_the_whole(name, monkeypatch):
    monkeypatch.setattr(vae_tiles, "TILE_BYTES", 40_000)
    codec = codec_of(CONFIGS[name])
    latents = latents_of(codec)
    exact = codec.pixels(latents)
    nn.Module.to(codec.model, torch.bfloat16)
    errors = [(codec.pixels(latents, is_tiled=is_tiled).float() - exact).norm() for is_tiled in (False, True)]
    assert 0 < errors[1] <= 1.1 * errors[0]


def test_other_blocks_are_left_whole():
    assert not codec_of(KL | {"up_block_types": ["AttnUpDecoderBlock2D", *KL["up_block_types"][1:]]}).can_tile


def psnr(first: Tensor, second: Tensor) -> float:
    error = (first.clamp(-1, 1) - second.clamp(-1, 1)).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def test_a_trained_decoder_shows_no_seam_and_diffusers_tiles_do():
    codec = open_codec("toyworld/weights/vae")
    latents = probe_latents(4) / codec.spec.scale
    whole, tiled = codec.pixels(latents), codec.pixels(latents, is_tiled=True)
    assert psnr(tiled, whole) > 100
    model = open_codec("toyworld/weights/vae").model
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = 32, 256
    with torch.inference_mode():
        assert psnr(model.decode(latents).sample, whole) < 50


@pytest.mark.parametrize("name", ["kl", "dc"])
def test_what_decoding_takes_is_reckoned_by_shapes(name: str, tmp_path: Path):
    codec = codec_of(CONFIGS[name])
    latents = torch.zeros(1, codec.spec.channels, 32, 24)
    for is_tiled in (False, True):
        meter = LivingBytes()
        with fused_attention(), meter.watching(ignored=[latents, *codec.model.parameters()]):
            codec.pixels(latents, is_tiled=is_tiled)
        reckoned = codec.decoding_bytes(latents.shape, is_tiled=is_tiled)
        assert reckoned == pytest.approx(meter.peak_bytes, rel=0.02)


def test_a_published_vae_takes_half_by_tiles():
    config = KL | {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "norm_num_groups": 32,
    }
    codec = KLCodec.blank(config, dtype=torch.bfloat16)
    for side, whole, tiled in ((128, 1.61, 1.08), (256, 6.44, 3.43)):
        reckoned = [codec.decoding_bytes((1, 4, side, side), is_tiled=is_tiled) / 1e9 for is_tiled in (False, True)]
        assert reckoned == pytest.approx([whole, tiled], rel=0.02)
