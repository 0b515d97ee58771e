import numpy as np
import pytest
import torch
from tiny_encoders import save_codec

from encoders.opening import open_codec


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
    with pytest.raises(ValueError, match=r"vae_dtype float16"):
        open_codec(str(tmp_path), dtype="float16")
