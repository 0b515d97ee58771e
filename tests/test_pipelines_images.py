import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from pipelines.raw.images import SampleReject, aspect_buckets, decode_image, nearest_bucket, plan_crop, resize_and_crop
from tests.picture_files import ADOBE_RGB, bmp, encode, heic, rgb_profile, tiff

MAX_PIXELS = 1_000_000


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


def test_a_palette_that_is_not_there_is_a_damaged_picture() -> None:
    data = encode(left_red_right_blue("P"), "PNG")
    start = data.index(b"PLTE") - 4
    (length,) = struct.unpack_from(">I", data, start)
    with pytest.raises(SampleReject, match="corrupt_image: mode P"):
        decode_image(data[:start] + data[start + 12 + length :], max_pixels=MAX_PIXELS)


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


def test_deep_grey_is_scaled_by_its_kind_not_by_its_brightest_pixel() -> None:
    dark = np.full((4, 4), 200, np.uint16)  # of 65,535: nearly black
    assert decode_image(encode(Image.fromarray(dark), "PNG"), max_pixels=MAX_PIXELS).getpixel((1, 1)) == (0, 0, 0)
    for white in (1.0, 255.0, 65535.0):
        values = np.full((4, 4), white / 2, np.float32)
        values[0, 0], values[3, 3] = white, np.nan
        decoded = decode_image(encode(Image.fromarray(values), "TIFF"), max_pixels=MAX_PIXELS)
        assert [decoded.getpixel(at) for at in ((0, 0), (1, 1), (3, 3))] == [(255,) * 3, (127,) * 3, (0,) * 3]


def noise(width: int = 32, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_faulty_bytes_are_rejected_with_a_reason() -> None:
    good = encode(noise(64, 64), "JPEG")
    cases = {
        "empty_image": [b""],
        "not_an_image": [b"<html>404</html>", bytes(5000), b"%PDF-1.7", b"\x00\x00\x00\x20ftypisom" + bytes(100)],
        "corrupt_image": [good[: len(good) // 2], good[:30], encode(noise(), "PNG")[:60] + bytes(400)],
        "too_many_pixels": [encode(Image.new("L", (1001, 1000)), "PNG"), encode(Image.new("1", (5000, 900)), "TIFF")],
        "too_small": [encode(Image.new("RGB", (1, 50)), "PNG")],
        "unsupported_image": [b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a" + bytes(200)],  # JPEG XL
    }
    for reason, faulty in cases.items():
        for data in faulty:
            with pytest.raises(SampleReject) as error:
                decode_image(data, max_pixels=MAX_PIXELS)
            assert error.value.reason == reason, data[:40]
            assert " at 0x" not in str(error.value), "a detail is written down, and is the same in every run"


def empty_png(width: int, height: int, *, bits: int, colour_type: int) -> bytes:
    """A PNG of that size without a pixel in it."""
    png = b"\x89PNG\r\n\x1a\n"
    for name, content in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)),
        (b"IDAT", b""),
    ):
        png += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png


def test_a_bomb_is_refused_by_its_declared_size_and_larger_pictures_can_be_allowed() -> None:
    bomb = empty_png(40_000, 40_000, bits=8, colour_type=2)  # 4.8 GB of pixels
    with pytest.raises(SampleReject, match="too_many_pixels: 40000 x 40000 > 1000000"):
        decode_image(bomb, max_pixels=MAX_PIXELS)
    # Pillow's own limit, twice 89 million pixels, does not stand in the way of a recipe that allows more.
    with pytest.raises(SampleReject, match="corrupt_image"):
        decode_image(empty_png(20_000, 9_500, bits=1, colour_type=0), max_pixels=190_000_000)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's, which production ignores
def test_damaged_exif_costs_no_picture() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    data = encode(left_red_right_blue(), "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    for damage in (b"XX", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"):
        damaged = data[:start] + damage + data[start + len(damage) :]
        assert decode_image(damaged, max_pixels=MAX_PIXELS).size == (16, 8)


def test_bytes_that_start_programs_are_no_image() -> None:
    """Pillow hands EPS to Ghostscript; a tar from the web must not reach it."""
    with pytest.raises(SampleReject, match="not_an_image"):
        decode_image(encode(noise(), "EPS"), max_pixels=MAX_PIXELS)


FORMATS = {
    "JPEG": {"exif": b""},
    "JPEG ": {"progressive": True},
    "PNG": {},
    "WEBP": {"lossless": True},
    "WEBP ": {"save_all": True, "append_images": [noise().rotate(180)]},
    "GIF": {"save_all": True, "append_images": [noise().rotate(180)]},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "TIFF ": {"compression": "jpeg"},
    "AVIF": {"quality": 100},
    "JPEG2000": {},
    "MPO": {"save_all": True, "append_images": [noise().rotate(180)]},
    "PPM": {},
    "PNG ": {"icc_profile": rgb_profile(ADOBE_RGB), "transparency": (0, 0, 0)},
}
# Those that Pillow does not write.
DEEP = np.asarray(noise()).astype(np.uint16) * 257
WRITTEN_HERE = {
    "TIFF of 16 bits": tiff(DEEP, photometric=2, deflate=True, predictor=2, tile_pixels=16),
    "TIFF of 12 bits": tiff(DEEP >> 4, photometric=2, bits=12),
    "BMP of fields": bmp(np.asarray(noise())[..., 0], bits=32, compression=3, fields=struct.pack("<3I", 255, 255, 255)),
    "HEIC": heic(noise()),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", [*FORMATS, *WRITTEN_HERE])
def test_no_damage_gives_anything_but_a_picture_or_a_reason(file_format: str, capfd) -> None:
    data = WRITTEN_HERE.get(file_format) or encode(noise(), file_format.strip(), **FORMATS[file_format])
    whole = np.asarray(decode_image(data, max_pixels=MAX_PIXELS)).astype(int)
    assert np.abs(whole - np.asarray(noise())).mean() < 60  # the first frame, not the turned one
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 2, 20))):
            damaged[rng.randrange(rng.choice((len(data), min(len(data), 200))))] = rng.choice(
                (0, 255, rng.randrange(256))
            )
        try:
            decoded = decode_image(
                bytes(damaged[: rng.choice((None, rng.randrange(len(data))))]), max_pixels=MAX_PIXELS
            )
        except SampleReject:
            continue
        assert decoded.mode == "RGB" and decoded.width * decoded.height <= MAX_PIXELS
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("base", [256, 512, 1024])
def test_the_papers_forty_buckets(base: int) -> None:
    buckets = aspect_buckets(base, multiple=16)
    assert len(buckets) == 40
    assert min(h / w for h, w in buckets) == 0.25
    assert max(h / w for h, w in buckets) == 4.0
    assert all(h % 16 == 0 and w % 16 == 0 for h, w in buckets)
    assert all(0.84 <= h * w / base**2 <= 1.05 for h, w in buckets)


def test_small_bases_share_buckets_and_wrong_bases_are_refused() -> None:
    assert (64, 64) in aspect_buckets(64, multiple=16)
    assert len(set(aspect_buckets(64, multiple=16))) == len(aspect_buckets(64, multiple=16)) < 40
    with pytest.raises(UserError, match="resolution 250 is not a positive multiple of 16"):
        aspect_buckets(250, multiple=16)


def test_nearest_bucket_mirrors_with_the_image() -> None:
    assert nearest_bucket(1000, 1000, 512, multiple=16) == (512, 512)
    for width, height in [(300, 1200), (640, 480), (1999, 500), (700, 710)]:
        assert nearest_bucket(width, height, 512, multiple=16) == nearest_bucket(height, width, 512, multiple=16)[::-1]


def test_resize_and_crop_cuts_the_centre() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 255, 255), (100, 0, 200, 100))
    cropped, crop = resize_and_crop(image, 64, 64, max_pixels=1_000_000)
    assert cropped.size == (64, 64)
    assert (crop.resized_width, crop.resized_height, crop.x, crop.y) == (192, 64, 64, 0)
    assert np.asarray(cropped)[:, 8:-8].min() > 250


def test_a_line_is_rejected_before_it_is_made_large() -> None:
    with pytest.raises(SampleReject, match="too_elongated: 40000 x 2 becomes 20480000 x 1024"):
        resize_and_crop(Image.new("L", (40_000, 2)), 1024, 1024, max_pixels=89_478_485)
    # A limit on what is decoded is none on ordinary images that are scaled up.
    assert plan_crop(600, 300, 1024, 1024, max_pixels=200_000).resized_width == 2048
    assert plan_crop(2000, 100, 1024, 1024, max_pixels=200_000).resized_width == 20_480
    with pytest.raises(SampleReject, match="too_elongated"):
        plan_crop(2100, 100, 1024, 1024, max_pixels=200_000)
