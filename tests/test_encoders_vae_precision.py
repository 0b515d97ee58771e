"""A VAE decodes in bfloat16 where a test picture of its weights comes out as in float32."""

import torch
from diffusers import AutoencoderKL
from tiny_encoders import save_codec

from encoders import vae_precision
from encoders.opening import open_codec
from encoders.vae_precision import holds, open_in_bfloat16_if_it_holds, probe_latents


def choose(folder: str):
    return open_in_bfloat16_if_it_holds(lambda dtype: open_codec(folder, dtype=dtype))


def test_the_embedded_vae_holds_in_bfloat16(monkeypatch):
    # The picture of 64 takes minutes on a CPU without units for bfloat16.
    monkeypatch.setattr(vae_precision, "PROBE_SIZE", 32)
    codec, dtype = choose("toyworld/weights/vae")
    assert dtype == "bfloat16"
    assert codec.pixels(probe_latents(4)).dtype == torch.bfloat16


def test_weights_that_rounding_changes_stay_in_float32(tmp_path):
    vae = AutoencoderKL.from_pretrained(save_codec(tmp_path / "vae"))
    with torch.no_grad():
        # a large offset that the last layer takes away again: bfloat16 has no digits left for what is on top of it
        vae.decoder.conv_norm_out.bias.add_(100)
        vae.decoder.conv_out.weight.sub_(vae.decoder.conv_out.weight.mean(dim=1, keepdim=True))
    vae.save_pretrained(tmp_path / "vae")
    codec, dtype = choose(str(tmp_path / "vae"))
    assert dtype == "float32"
    assert codec.pixels(probe_latents(4)).dtype == torch.float32


def test_the_test_picture_is_always_the_same_and_scaled_as_latents_are():
    assert torch.equal(probe_latents(4), probe_latents(4))
    assert abs(probe_latents(4).std().item() - 1) < 1e-5


def test_bounds_are_levels_of_an_image():
    exact = torch.linspace(-0.9, 0.9, 3 * 64 * 64).view(1, 3, 64, 64)
    assert holds(exact, exact) and holds(exact, exact + 1.2 / 127.5)
    assert not holds(exact, exact + 2 / 127.5)  # 42 dB
    spot = exact.clone()
    spot.view(-1)[:150] += 4 / 127.5  # of 12,288 values
    assert not holds(exact, spot)
    spot = exact.clone()
    spot.view(-1)[:100] += 4 / 127.5
    assert holds(exact, spot)
    spot.view(-1)[0] = torch.nan
    assert not holds(exact, spot)
