import functools

import numpy as np
import pytest
import torch
import torch.fx.experimental._config as shapes
from tiny_encoders import save_codec, save_deep_codec, save_text_encoder

from encoders.latents import require_whole_patches
from encoders.opening import open_codec
from errors import UserError
from toyworld.render import render
from toyworld.scenes import random_scene


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return open_codec(str(save_codec(tmp_path_factory.mktemp("vae"))))


def test_codec_gives_the_distribution_of_diffusers(codec):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8, generator=generator)
    mean, std = codec.encode(images)
    with torch.inference_mode():
        expected = codec.model.encode(images.float() / 127.5 - 1.0).latent_dist
    assert mean.shape == std.shape == (3, 4, 4, 6)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(std, expected.std)
    mean_of_floats, _ = codec.encode(images.float() / 127.5 - 1.0)
    torch.testing.assert_close(mean_of_floats, mean)


def test_codec_carries_the_numbers_of_its_config(codec):
    assert (codec.spec.channels, codec.spec.factor, codec.spec.shift, codec.spec.has_std) == (4, 8, 0.0, True)
    assert codec.spec.scale == pytest.approx(0.45)


def test_decode_gives_rgb_images(codec):
    images = codec.decode(torch.zeros(2, 4, 4, 6))
    assert [(image.mode, image.size) for image in images] == [("RGB", (48, 32))] * 2
    sample = codec.model.decode(torch.zeros(1, 4, 4, 6)).sample[0]
    expected = ((sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(images[0]), expected)


def test_float16_vae_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"vae_dtype float16"):
        open_codec(str(tmp_path), dtype="float16")


def test_a_deep_codec_has_no_deviation_and_gives_what_diffusers_gives(tmp_path):
    codec = open_codec(str(save_deep_codec(tmp_path / "dc")))
    spec = codec.spec
    assert (spec.channels, spec.factor, spec.shift, spec.has_std) == (8, 16, 0.0, False)
    assert (spec.scale, spec.factor) == (pytest.approx(0.41), codec.model.spatial_compression_ratio)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8, generator=generator)
    latents, std = codec.encode(images)
    with torch.inference_mode():
        expected = codec.model.encode(images.float() / 127.5 - 1.0).latent
    assert std is None and latents.shape == (2, 8, 2, 4)
    torch.testing.assert_close(latents, expected)
    assert [image.size for image in codec.decode(latents)] == [(64, 32)] * 2


def test_sides_are_whole_patches_of_the_codecs_latents(tmp_path):
    shallow, deep = open_codec(str(save_codec(tmp_path / "vae"))).spec, open_codec(str(save_deep_codec(tmp_path))).spec
    require_whole_patches(48, shallow, patch_size=2, key="features.stage2.resolution")
    with pytest.raises(
        UserError,
        match=r"^features\.stage2\.resolution 250 is not a multiple of 16 \(VAE factor 8 times patch size 2\)$",
    ):
        require_whole_patches(250, shallow, patch_size=2, key="features.stage2.resolution")
    with pytest.raises(UserError, match=r"48 is not a multiple of 32 \(VAE factor 16 times patch size 2\)"):
        require_whole_patches(48, deep, patch_size=2, key="features.stage2.resolution")


def test_a_model_that_is_no_codec_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"features\.vae_model .* is a t5, not AutoencoderKL or AutoencoderDC"):
        open_codec(str(save_text_encoder(tmp_path / "t5")))
    with pytest.raises(UserError, match=r"is a DiTTransformer2DModel, not AutoencoderKL or AutoencoderDC"):
        open_codec("toyworld/weights/dit")


def test_compiled_blocks_have_the_numbers_of_the_others(codec, tmp_path, monkeypatch):
    before = (torch._dynamo.config.recompile_limit, shapes.use_duck_shape)
    # Without a compiler: what would be compiled is traced and run as it is, for images of any size.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = open_codec(str(save_codec(tmp_path / "vae")))
    compiled.compile_blocks()
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 32, 32), (3, 3, 32, 48)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        torch.testing.assert_close(compiled.encode(images), codec.encode(images))
    # What others in the process compile is as it was.
    assert (torch._dynamo.config.recompile_limit, shapes.use_duck_shape) == before


def test_a_compiled_decoder_has_the_numbers_of_the_other(codec, tmp_path, monkeypatch):
    compiled_calls = []

    def traced(function, **options):
        compiled_calls.append(options)
        return compile_(function, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    compiled = open_codec(str(save_codec(tmp_path / "vae")))
    compiled.compile_decoder()
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, codec.spec.channels, 4, 4), (3, codec.spec.channels, 4, 6), (1, codec.spec.channels, 4, 4)):
        latents = torch.randn(shape, generator=generator)
        torch.testing.assert_close(compiled.pixels(latents), codec.pixels(latents))
    assert compiled_calls, "something is compiled"


def test_the_toy_vae_loses_next_to_nothing_in_bfloat16():
    """Encoded in bfloat16, stored in float16 and decoded as ever: at most 0.05 dB less than of float32."""
    rng = np.random.default_rng(0)
    scenes = [np.array(render(random_scene(rng), 64, 64, rng=rng)) for _ in range(24)]
    images = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)
    exact = open_codec("toyworld/weights/vae")
    psnr_db = {}
    for dtype in ("float32", "bfloat16"):
        mean, _ = open_codec("toyworld/weights/vae", dtype=dtype).encode(images)
        decoded = np.stack([np.asarray(image) for image in exact.decode(mean.half().float())])
        error = np.mean((decoded.astype(np.float64) - np.stack(scenes)) ** 2)
        psnr_db[dtype] = 10 * np.log10(255**2 / error)
    assert psnr_db["float32"] > 25
    assert psnr_db["bfloat16"] > psnr_db["float32"] - 0.05
