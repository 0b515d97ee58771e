"""The score `pixels`: images of known values, JPEG noise, and every size an image may have."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from curation.scores.pixel_measures import measure_pixels
from curation.scores.pixels import Pixels, file_format
from curation.scores.protocol import LoadedImage
from pipelines.raw.images import decode_image
from tests.raw_shards import encode, odd_images, photo


def measured(image: Image.Image | bytes) -> dict:
    data = encode(image, "PNG") if isinstance(image, Image.Image) else image
    loaded = LoadedImage(key="x", data=data, image=decode_image(data, max_pixels=10**7))
    score = Pixels()
    columns = score.measure([score.look(loaded)])
    assert list(columns) == [column.name for column in score.columns]
    return {name: values[0] for name, values in columns.items()}


def textured(seed: int, width: int, height: int) -> Image.Image:
    """A picture with detail at each scale, as photos have it."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for side in (4, 8, 16, 32, 64, 128, 256, 512):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) * (4 / side) ** 0.7
    total -= total.min()
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def test_one_tone_has_no_entropy_no_contrast_and_no_colour() -> None:
    row = measured(Image.new("RGB", (300, 200), (51, 51, 51)))
    assert (row["width"], row["height"], row["min_side"], row["max_side"]) == (300, 200, 200, 300)
    assert (row["aspect"], row["megapixels"], row["format"]) == (1.5, 0.06, "png")
    assert row["brightness"] == pytest.approx(0.2)
    assert row["entropy"] == row["contrast"] == row["sharpness"] == row["colourfulness"] == 0
    assert (row["border_fraction"], row["letterbox"]) == (1.0, False)


def test_known_patterns_have_known_values() -> None:
    halves = np.zeros((128, 128, 3), dtype=np.uint8)
    halves[:, 64:] = 255
    row = measured(Image.fromarray(halves))
    assert (row["entropy"], row["brightness"], row["contrast"]) == (1.0, 0.5, 0.5)
    # Two columns of 128 have a Laplacian of 255, one of each sign.
    assert row["sharpness"] == pytest.approx(2 * 255**2 / 128)
    ramp = np.repeat(np.tile(np.arange(256, dtype=np.uint8), (64, 1))[..., None], 3, axis=2)
    assert measured(Image.fromarray(ramp))["entropy"] == pytest.approx(8.0)
    # Of pure red all variances are 0: 0.3 sqrt(255^2 + 127.5^2).
    red = measured(Image.new("RGB", (64, 64), (255, 0, 0)))
    assert red["colourfulness"] == pytest.approx(0.3 * np.hypot(255, 127.5), rel=1e-5)


def test_sharpness_falls_with_blur_and_is_of_one_kind_at_each_size() -> None:
    sharp = textured(1, 512, 512)
    values = [measured(sharp.filter(ImageFilter.GaussianBlur(radius)))["sharpness"] for radius in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True) and values[0] > 5 * values[-1]
    # Scaled up, it has no more detail, and is looked at as it was.
    larger = measured(sharp.resize((1536, 1536), Image.Resampling.BICUBIC))["sharpness"]
    assert larger == pytest.approx(values[0], rel=0.5)


@pytest.mark.parametrize("quality", [60, 90])
@pytest.mark.parametrize("colour", ["black", "white", (120, 40, 60)])
@pytest.mark.parametrize("sides", ["rows", "columns"])
def test_bars_are_found_through_the_noise_of_jpeg(quality: int, colour, sides: str) -> None:
    for seed, side in ((1, 200), (2, 512), (3, 900)):
        image = textured(seed, side, side)
        draw, bar = ImageDraw.Draw(image), side // 8 + seed
        if sides == "rows":
            boxes = [(0, 0, side, bar - 1), (0, side - bar, side, side)]
        else:
            boxes = [(0, 0, bar - 1, side), (side - bar, 0, side, side)]
        for box in boxes:
            draw.rectangle(box, fill=colour)
        row = measured(encode(image, quality=quality))
        assert row["letterbox"] is True
        assert row["border_fraction"] == pytest.approx(2 * bar / side, abs=0.03)


def test_frames_and_single_bars_are_borders_and_no_letterbox_and_pictures_have_neither() -> None:
    framed = Image.new("RGB", (400, 400), "white")
    framed.paste(textured(4, 200, 200), (100, 100))
    row = measured(encode(framed))
    assert row["border_fraction"] == pytest.approx(0.75, abs=0.03) and row["letterbox"] is False
    ImageDraw.Draw(single := textured(5, 400, 400)).rectangle((0, 0, 400, 79), fill="black")
    row = measured(encode(single))
    assert row["border_fraction"] == pytest.approx(0.2, abs=0.02) and row["letterbox"] is False
    for seed in range(6):
        row = measured(encode(textured(seed, 300, 200)))
        assert (row["border_fraction"], row["letterbox"]) == (0.0, False)
    # Bars of two colours are two borders.
    draw = ImageDraw.Draw(two := textured(6, 400, 400))
    draw.rectangle((0, 0, 400, 79), fill="black")
    draw.rectangle((0, 320, 400, 400), fill="white")
    row = measured(encode(two))
    assert row["border_fraction"] == pytest.approx(0.4, abs=0.02) and row["letterbox"] is False


def test_images_of_any_shape_have_finite_values() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((2, 2), (2, 3000), (3000, 2), (3, 5), (1, 1), (255, 257), (16, 16)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        row = measure_pixels(pixels, pixels)
        assert all(np.isfinite(float(value)) for value in row.values())
        assert 0 <= row["border_fraction"] <= 1 and 0 <= row["entropy"] <= 8


def test_each_format_is_told_by_its_bytes_and_sizes_are_those_after_the_turn() -> None:
    kinds = {name: measured(data) for name, (_, data) in odd_images().items()}
    assert {row["format"] for row in kinds.values()} == {"jpeg", "png", "gif", "webp", "avif", "tiff"}
    assert kinds["wrong_name"]["format"] == "png"
    assert (kinds["turned"]["width"], kinds["turned"]["height"]) == (30, 40)
    stream = io.BytesIO()
    photo(1).save(stream, "JPEG2000")
    assert file_format(stream.getvalue()) == "jp2"
    assert [file_format(encode(photo(1), kind)) for kind in ("BMP", "PPM")] == ["bmp", "ppm"]
    assert file_format(b"") == "other"
