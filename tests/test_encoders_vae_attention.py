"""The attention of a VAE's middle by parts, against diffusers' own processors."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from encoders import vae_attention
from encoders.kl import KLCodec, LatentSpec
from encoders.opening import open_codec
from encoders.vae_attention import WideAttention, widen_attention

WIDTH = 160


def make_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    model_class: type = AutoencoderKL
    vae = model_class(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, WIDTH),
        norm_num_groups=8,
        latent_channels=4,
    )
    return vae.eval().requires_grad_(False)


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    module = Attention(
        WIDTH,
        heads=1,
        dim_head=WIDTH,
        norm_num_groups=8,
        bias=True,
        residual_connection=True,
        rescale_output_factor=2.0,
    )
    with torch.no_grad():
        module.to_q.weight.mul_(8)  # scores that differ
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("max_scores", [1, 2 * 60 * 7, vae_attention.MAX_SCORES], ids=["rows", "parts", "whole"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_cut_gives_what_diffusers_gives(attention, max_scores, layout, monkeypatch):
    monkeypatch.setattr(vae_attention, "MAX_SCORES", max_scores)
    hidden = torch.randn(2, WIDTH, 6, 10).to(memory_format=layout)
    expected = attention(hidden, temb=None)
    assert len(widen_attention(attention)) == 1
    found = attention(hidden, temb=None)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


def test_in_bfloat16_it_is_no_farther_from_float32_than_diffusers(attention):
    hidden = torch.randn(2, WIDTH, 16, 16)
    exact = attention(hidden)
    rounded = attention.to(torch.bfloat16)
    theirs = (rounded(hidden.bfloat16()).float() - exact).norm()
    widen_attention(rounded)
    ours = (rounded(hidden.bfloat16()).float() - exact).norm()
    assert 0 < ours <= 1.05 * theirs


def test_a_codec_on_a_gpu_encodes_and_decodes_by_it_with_the_same_numbers():
    model = make_vae()
    plain = copy.deepcopy(model)
    spec = LatentSpec(channels=4, factor=2, scale=1.0, shift=0.0, has_std=True, identity="")
    codec = KLCodec(spec, model, "test")
    codec.adapt_to_gpu()
    processors = [module.processor for module in model.modules() if isinstance(module, Attention)]
    assert [type(processor) for processor in processors] == [WideAttention] * 2
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    expected = plain.encode(images).latent_dist.mean
    torch.testing.assert_close(codec.encode(images)[0], expected)
    torch.testing.assert_close(codec.pixels(expected), plain.decode(expected).sample)


def test_channels_come_last_in_the_half_that_is_compiled_alone():
    codec = KLCodec(
        LatentSpec(channels=4, factor=2, scale=1.0, shift=0.0, has_std=True, identity=""), make_vae(), "test"
    )
    codec.adapt_to_gpu()
    halves = [codec.model.encoder, codec.model.decoder]
    assert [half.conv_in.weight.is_contiguous() for half in halves] == [True, True]
    codec.compile_decoder()
    last = [half.conv_in.weight.is_contiguous(memory_format=torch.channels_last) for half in halves]
    assert last == [False, True]


def test_narrow_attention_is_left_to_kernels_that_are_made_for_it():
    assert widen_attention(open_codec("toyworld/weights/vae").model) == []
    narrow = Attention(WIDTH, heads=2, dim_head=WIDTH // 2, norm_num_groups=8, residual_connection=True)
    without_sum = Attention(WIDTH, heads=1, dim_head=WIDTH, norm_num_groups=8)
    assert widen_attention(narrow) == widen_attention(without_sum) == []
