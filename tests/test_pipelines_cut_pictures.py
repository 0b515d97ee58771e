"""Pictures whose files lack their last bytes: kept where next to no pixel is missing, else rejected."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipelines.raw.images import SampleReject, decode_image, image_size
from pipelines.raw.pictures.cut_files import MAX_MISSING
from tests.picture_files import ADOBE_RGB, bmp, encode, png_chunk, rgb_profile

MAX_PIXELS = 1_000_000


def photo(width: int = 320, height: int = 240) -> Image.Image:
    """Soft shapes, so that no format packs them into a few bytes."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def see_through() -> Image.Image:
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


# Files by name, and how many of their last bytes hold no pixel.
FILES = {
    "JPEG": (encode(photo(), "JPEG", quality=90), 2),
    "progressive JPEG": (encode(photo(), "JPEG", quality=90, progressive=True), 2),
    "JPEG with restarts": (encode(photo(), "JPEG", quality=90, restart_marker_rows=1), 2),
    "JPEG with a thumbnail": (
        encode(photo(), "JPEG", exif=b"Exif\0\0" + encode(photo(64, 48), "JPEG"), icc_profile=rgb_profile(ADOBE_RGB)),
        2,
    ),
    "CMYK JPEG": (encode(photo().convert("CMYK"), "JPEG"), 2),
    "grey JPEG": (encode(photo().convert("L"), "JPEG"), 2),
    "PNG": (encode(photo(), "PNG", icc_profile=rgb_profile(ADOBE_RGB)), 20),
    "PNG with a palette": (encode(photo().quantize(64), "PNG", transparency=3), 20),
    "PNG with alpha": (encode(see_through(), "PNG"), 20),
    "WebP": (encode(photo(), "WEBP"), 1),
    "lossless WebP": (encode(photo(), "WEBP", lossless=True), 0),
    "WebP with alpha": (encode(see_through(), "WEBP"), 1),
    "WebP with metadata": (encode(photo(), "WEBP", exif=b"Exif\0\0" + bytes(300)), 300),
    "animated WebP": (encode(photo(), "WEBP", save_all=True, append_images=[photo().rotate(90)]), 3000),
    "GIF": (encode(photo().quantize(64), "GIF"), 2),
    "GIF with a transparent colour": (encode(photo().quantize(64), "GIF", transparency=5), 2),
    "animated GIF": (encode(photo(), "GIF", save_all=True, append_images=[photo().rotate(90)]), 3000),
    "BMP": (encode(photo(), "BMP"), 0),
    "PPM": (encode(photo(), "PPM"), 0),
}


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, max_pixels=MAX_PIXELS))


@pytest.mark.parametrize("name", FILES)
def test_a_picture_with_all_of_its_pixels_is_the_same_without_its_end(name: str) -> None:
    data, num_bytes = FILES[name]
    whole = decoded(data)
    for cut in {1, num_bytes // 2, num_bytes} - {0} if num_bytes else set():
        np.testing.assert_array_equal(decoded(data[:-cut]), whole, err_msg=str(cut))
        assert image_size(data[:-cut], max_pixels=MAX_PIXELS) == (320, 240)


@pytest.mark.parametrize("name", FILES)
def test_next_to_no_pixel_may_be_missing_and_no_more(name: str) -> None:
    data, num_bytes = FILES[name]
    whole, outcomes = decoded(data), []
    for cut in sorted({1, 2, 3, 5, 10, 20, 40, 80, len(data) // 40, len(data) // 20, len(data) // 6, len(data) // 2}):
        try:
            shown = decoded(data[:-cut])
        except SampleReject as reject:
            assert reject.reason == "corrupt_image"
            outcomes.append("reject")
            continue
        differs = (shown != whole).any(axis=2)
        # Colours that JPEG and WebP share among neighbours reach a little further than what is made up.
        assert differs.mean() <= 2 * MAX_MISSING
        outcomes.append("kept")
        if cut <= num_bytes:
            assert not differs.any()
    assert outcomes == sorted(outcomes)  # those with less missing are kept
    assert outcomes[0] == "kept"
    assert outcomes[-1] == "reject" or name.startswith("animated")


def test_a_reject_says_how_much_is_missing() -> None:
    data, _ = FILES["JPEG"]
    with pytest.raises(SampleReject, match=r"corrupt_image: image file is truncated .*; \d\d% of the picture is miss"):
        decode_image(data[: len(data) * 3 // 4], max_pixels=MAX_PIXELS)


def white_below() -> Image.Image:
    image = photo()
    image.paste("white", (0, 160, 320, 240))
    return image


JPEGS = {name: data for name, (data, _) in FILES.items() if "JPEG" in name}
JPEGS["JPEG that is white below"] = encode(white_below(), "JPEG")


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_was_cut_and_closed_with_an_end_mark_is_rejected(name: str) -> None:
    data, whole = JPEGS[name], decoded(JPEGS[name])
    for share in (0.4, 0.6, 0.8):
        cut = data[: int(share * len(data))].removesuffix(b"\xff") + b"\xff\xd9"
        if "progressive" in name and cut.count(b"\xff\xda") == data.count(b"\xff\xda"):
            continue  # the last bit of some coefficients is missing, and nobody sees it
        with pytest.raises(SampleReject, match=r"corrupt_image: .*cut and closed; \d+% of the picture is missing"):
            decode_image(cut, max_pixels=MAX_PIXELS)
    # The end mark of a whole one is no sign of that, nor is what lies behind it.
    for more in (b"", b"\0" * 9, b"\xff\xd9", b"junk\xff\xd9"):
        np.testing.assert_array_equal(decoded(data + more), whole)


def scans(data: bytes) -> list[int]:
    return [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]


def test_a_progressive_jpeg_that_lacks_scans_is_rejected_wherever_it_is_cut() -> None:
    data, _ = FILES["progressive JPEG"]
    for start in scans(data)[1:]:
        # All rows of the scans before are there, but in less than their detail.
        for end in (start, start - 1, start + 1, start + 5):
            with pytest.raises(SampleReject, match="corrupt_image"):
                decode_image(data[:end], max_pixels=MAX_PIXELS)
    assert len(scans(data)) == 10


def interlaced_png() -> tuple[bytes, np.ndarray]:
    values = np.asarray(photo(39, 29))
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, down, x, across in passes for row in values[y::down, x::across])
    header = struct.pack(">IIBBBBB", 39, 29, 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks), values


def test_interlaced_pngs_count_the_bytes_of_all_their_passes() -> None:
    data, values = interlaced_png()
    np.testing.assert_array_equal(decoded(data), values)
    # Behind the pixels are a check of four bytes, that of the chunk, and the end of twelve.
    np.testing.assert_array_equal(decoded(data[:-20]), values)
    kept = decoded(data[:-35])
    assert 0 < (kept != values).any(axis=2).mean() < MAX_MISSING
    with pytest.raises(SampleReject, match="corrupt_image"):
        decode_image(data[:-400], max_pixels=MAX_PIXELS)


def test_pixels_in_bit_fields_may_lack_their_last_ones_too() -> None:
    pixels = np.arange(1 << 16, dtype=np.uint32).reshape(256, 256)
    data = bmp(pixels, bits=32, compression=3, fields=struct.pack("<3I", 0xFF0000, 0xFF00, 0xFF))
    differs = (decoded(data[:-400]) != decoded(data)).any(axis=2)
    assert differs.sum() <= 100 and not differs[1:].any()  # its last row is the upper one
    with pytest.raises(SampleReject, match="corrupt_image"):
        decode_image(data[: -len(data) // 10], max_pixels=MAX_PIXELS)


def test_what_lies_behind_a_picture_costs_none() -> None:
    for name, (data, _) in FILES.items():
        whole = decoded(data)
        for garbage in (b"\0", bytes(4000), b"\r\n<html></html>", b"\xff\xd8\xff\xe0junk", data):
            np.testing.assert_array_equal(decoded(data + garbage), whole, err_msg=name)


def test_other_threads_are_not_changed_by_a_cut_picture() -> None:
    whole, cut = FILES["JPEG"][0], FILES["JPEG"][0][:-2]
    half = whole[: len(whole) // 2]

    def outcome(data: bytes) -> str:
        try:
            return str(decode_image(data, max_pixels=MAX_PIXELS).size)
        except SampleReject as reject:
            return reject.reason

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(outcome, [cut] * 40)) == {"(320, 240)"}
        assert list(pool.map(outcome, [cut, half] * 40)) == ["(320, 240)", "corrupt_image"] * 40
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
