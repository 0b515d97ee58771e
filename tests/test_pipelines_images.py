import io

import numpy as np
import pytest
from PIL import Image

from pipelines.images import SampleReject, aspect_buckets, decode_image, nearest_bucket, resize_and_crop

MAX_PIXELS = 1_000_000


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def left_red_right_blue(mode: str = "RGB") -> Image.Image:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8, 0] = pixels[:, 8:, 2] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(("mode", "file_format"), [("RGB", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG")])
def test_colour_modes_keep_their_colours(mode: str, file_format: str) -> None:
    decoded = np.asarray(decode_image(encode(left_red_right_blue(mode), file_format), max_pixels=MAX_PIXELS))
    assert decoded.shape == (8, 16, 3)
    assert decoded[4, 2].tolist() == [255, 0, 0]
    assert decoded[4, 13].tolist() == [0, 0, 255]


def test_cmyk_jpeg_keeps_its_colours_roughly() -> None:
    data = encode(left_red_right_blue().convert("CMYK"), "JPEG", quality=95)
    decoded = np.asarray(decode_image(data, max_pixels=MAX_PIXELS)).astype(int)
    assert decoded[4, 2, 0] > 200 > 60 > decoded[4, 2, 2]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (4, 1))
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp), "PNG"), max_pixels=MAX_PIXELS))
    np.testing.assert_allclose(decoded[0, :, 0], np.linspace(0, 255, 64), atol=1)


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encode(clear, "PNG"), max_pixels=MAX_PIXELS).getpixel((1, 1)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = left_red_right_blue()
    exif = image.getexif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    decoded = decode_image(encode(image, "PNG", exif=exif), max_pixels=MAX_PIXELS)
    assert decoded.size == (8, 16)
    assert decoded.getpixel((4, 2)) == (255, 0, 0)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("lime", "red")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, max_pixels=MAX_PIXELS).getpixel((1, 1)) == (0, 255, 0)


def test_faulty_bytes_are_rejected_with_a_reason() -> None:
    good = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    cases = {
        "empty_image": b"",
        "not_an_image": b"<html>404</html>",
        "corrupt_image": good[: len(good) // 2],
        "too_many_pixels": encode(Image.new("L", (1001, 1000)), "PNG"),
        "too_small": encode(Image.new("RGB", (1, 50)), "PNG"),
    }
    for reason, data in cases.items():
        with pytest.raises(SampleReject) as error:
            decode_image(data, max_pixels=MAX_PIXELS)
        assert error.value.reason == reason


@pytest.mark.parametrize("base", [256, 512, 1024])
def test_the_papers_forty_buckets(base: int) -> None:
    buckets = aspect_buckets(base)
    assert len(buckets) == 40
    assert min(h / w for h, w in buckets) == 0.25
    assert max(h / w for h, w in buckets) == 4.0
    assert all(h % 16 == 0 and w % 16 == 0 for h, w in buckets)
    assert all(0.84 <= h * w / base**2 <= 1.05 for h, w in buckets)


def test_small_bases_share_buckets_and_wrong_bases_are_refused() -> None:
    assert (64, 64) in aspect_buckets(64)
    assert len(set(aspect_buckets(64))) == len(aspect_buckets(64)) < 40
    with pytest.raises(ValueError, match="resolution 250 is not a positive multiple of 16"):
        aspect_buckets(250)


def test_nearest_bucket_mirrors_with_the_image() -> None:
    assert nearest_bucket(1000, 1000, 512) == (512, 512)
    for width, height in [(300, 1200), (640, 480), (1999, 500), (700, 710)]:
        assert nearest_bucket(width, height, 512) == nearest_bucket(height, width, 512)[::-1]


def test_resize_and_crop_cuts_the_centre() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 255, 255), (100, 0, 200, 100))
    cropped, crop = resize_and_crop(image, 64, 64)
    assert cropped.size == (64, 64)
    assert (crop.resized_width, crop.resized_height, crop.x, crop.y) == (192, 64, 64, 0)
    assert np.asarray(cropped)[:, 8:-8].min() > 250
