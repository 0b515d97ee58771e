"""PNGs: colour keys at any depth, metadata of any size and in any state, and what is said of colours."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.raw.images import SampleReject, decode_image, image_size
from tests.picture_files import (
    ADOBE_RGB,
    RED_AND_GREEN_EXCHANGED,
    encode,
    png,
    png_chunk,
    rgb_profile,
    srgb_profile,
    swatches,
)

MAX_PIXELS = 1_000_000
RED = (5, 5)
P3 = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
LINEAR, USUAL = struct.pack(">I", 100_000), struct.pack(">I", 45_455)
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6


def decoded(data: bytes) -> Image.Image:
    image = decode_image(data, max_pixels=MAX_PIXELS)
    assert image_size(data, max_pixels=MAX_PIXELS) == image.size
    return image


def with_chunks(*before: tuple[bytes, bytes], after: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    return png(np.asarray(swatches()), before=before, after=after)


def profile_chunk(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"name\0\0" + zlib.compress(profile)


def damaged(chunk: bytes, data: bytes) -> bytes:
    """`data` with a bit turned in the content of a chunk, whose check no longer fits."""
    at = data.index(chunk) + 4
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(("bits", "key"), [(1, 0), (1, 1), (2, 1), (2, 3), (4, 0), (4, 9), (8, 100), (16, 0x1234)])
def test_a_key_of_grey_is_compared_at_the_depth_of_the_file(bits: int, key: int) -> None:
    values = np.arange(64).reshape(4, 16) % (1 << min(bits, 4))
    values = values + (key - 3 if bits >= 8 else 0)  # at 16 bits, neighbours that 8 bits cannot tell apart
    shown = np.asarray(decoded(png(values, bits=bits, before=[(b"tRNS", struct.pack(">H", key))])))
    grey = values >> 8 if bits == 16 else values * 255 // ((1 << bits) - 1)
    np.testing.assert_array_equal(shown, np.where(values == key, 255, grey)[..., None].repeat(3, axis=2))


def test_a_key_of_rgb_is_compared_at_the_depth_of_the_file() -> None:
    values = np.full((4, 16, 3), 0x1234) + np.arange(64).reshape(4, 16, 1)
    shown = np.asarray(decoded(png(values, bits=16, before=[(b"tRNS", struct.pack(">3H", *[0x1236] * 3))])))
    assert (shown[0, 2] == 255).all() and (np.delete(shown.reshape(-1, 3), 2, axis=0) <= 0x12).all()
    for key, colour in (
        ((200, 40, 60), (255, 255, 255)),
        ((0x100 + 200, 40, 60), (255, 255, 255)),
        ((200, 40, 61), (200, 40, 60)),
    ):
        assert decoded(with_chunks((b"tRNS", struct.pack(">3H", *key)))).getpixel(RED) == colour
    assert decoded(with_chunks((b"tRNS", b"\0\1"))).getpixel(RED) == (200, 40, 60)


def test_one_picture_has_one_background_however_transparency_is_stored() -> None:
    seen = Image.new("RGBA", (32, 32))
    seen.paste((220, 30, 30, 255), (8, 8, 24, 24))
    rgb, palette = seen.convert("RGB"), seen.convert("RGB").quantize(4)
    clear = palette.getpixel((0, 0))
    assert isinstance(clear, int)
    alphas = bytes(128 if index == clear else 255 for index in range(4))
    files = {
        "RGBA": encode(seen, "PNG"),
        "key": encode(rgb, "PNG", transparency=(0, 0, 0)),
        "interlaced": png(np.asarray(seen)),
        "palette": encode(palette, "PNG", transparency=clear),
        "GIF": encode(palette, "GIF", transparency=clear),
        "LA": encode(seen.convert("LA"), "PNG"),
    }
    assert {decoded(data).getpixel((1, 1)) for data in files.values()} == {(255, 255, 255)}
    assert decoded(encode(palette, "PNG", transparency=alphas)).getpixel((1, 1)) == (127, 127, 127)


LONG_TEXT = b"workflow\0\0" + zlib.compress(b"node " * 600_000)
LONG_INTERNATIONAL_TEXT = b"parameters\0\1\0\0\0" + zlib.compress(b"node " * 600_000)


def test_metadata_of_any_size_and_state_cost_no_picture() -> None:
    whole = np.asarray(swatches())
    files = {
        "texts": with_chunks((b"zTXt", LONG_TEXT), (b"iTXt", LONG_INTERNATIONAL_TEXT)),
        "behind": with_chunks(after=((b"zTXt", LONG_TEXT), (b"iTXt", LONG_INTERNATIONAL_TEXT))),
        "many texts": with_chunks(*[(b"tEXt", b"key\0" + bytes(100_000))] * 700),
        "long profile": with_chunks(profile_chunk(srgb_profile() + bytes(1_500_000))),
        "unknown method": with_chunks((b"zTXt", b"a\0\7junk"), (b"iCCP", b"a\0\7junk")),
        "short": with_chunks(
            *[(name, b"1") for name in (b"pHYs", b"sRGB", b"acTL", b"cHRM", b"gAMA", b"iCCP", b"fcTL")]
        ),
        "wrong check": damaged(b"tEXt", with_chunks((b"tEXt", b"a\0text"))),
        "wrong check of gAMA": damaged(b"gAMA", with_chunks((b"gAMA", LINEAR))),
        "wrong check of tRNS": damaged(b"tRNS", with_chunks((b"tRNS", struct.pack(">3H", 201, 40, 60)))),
        "damaged EXIF": with_chunks((b"eXIf", b"II*\0\xff\xff\xff\xff")),
        "no end": with_chunks()[:-12],
    }
    for name, data in files.items():
        np.testing.assert_array_equal(np.asarray(decoded(data)), whole, err_msg=name)


def test_what_texts_and_profiles_unpack_to_is_bounded() -> None:
    bomb = zlib.compress(bytes(200_000_000), 9)
    data = with_chunks((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb))
    tracemalloc.start()
    assert decoded(data).getpixel(RED) == (200, 40, 60)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 40_000_000


def test_damage_among_the_pixels_or_in_the_header_is_a_reject() -> None:
    data = with_chunks()
    pixels = data.index(b"IDAT")
    for faulty in (data[: pixels + 60], data[:pixels], data[:20], damaged(b"IHDR", data), data[:8] + data[33:]):
        with pytest.raises(SampleReject, match=r"corrupt_image|not_an_image"):
            decode_image(faulty, max_pixels=MAX_PIXELS)


def test_a_turn_counts_in_front_of_the_pixels_as_in_a_browser_and_the_start_of_a_file_tells_the_size() -> None:
    content = SIDEWAYS.tobytes()[6:]
    turned, behind = with_chunks((b"eXIf", content)), with_chunks(after=((b"eXIf", content),))
    assert decoded(turned).size == (24, 32) and decoded(behind).size == (32, 24)
    for data, size in ((turned, (24, 32)), (behind, (32, 24))):
        assert image_size(data[: data.index(b"IDAT") + 4], max_pixels=MAX_PIXELS) == size
    with pytest.raises(SampleReject, match="corrupt_image"):  # what turns it may still come
        image_size(turned[: turned.index(b"eXIf")], max_pixels=MAX_PIXELS)


# What Chromium 156 shows of red, green and blue; `test_pipelines_pictures.py` asks the browser that is installed.
SHOWN = {
    "gAMA 1.0": ([(b"gAMA", LINEAR)], [(229, 110, 133), (110, 213, 143), (96, 133, 202)]),
    "gAMA 1 / 2.2": ([(b"gAMA", USUAL)], [(200, 40, 60), (40, 170, 70), (30, 60, 150)]),
    "gAMA 1 / 2.2, cHRM P3": ([(b"gAMA", USUAL), (b"cHRM", P3)], [(220, 0, 51), (0, 175, 50), (6, 58, 157)]),
    "cHRM alone": ([(b"cHRM", P3)], [(200, 40, 60), (40, 170, 70), (30, 60, 150)]),
    "cHRM of nothing": ([(b"gAMA", LINEAR), (b"cHRM", bytes(32))], [(200, 40, 60), (40, 170, 70), (30, 60, 150)]),
    "sRGB before gAMA": ([(b"sRGB", b"\0"), (b"gAMA", LINEAR)], [(200, 40, 60), (40, 170, 70), (30, 60, 150)]),
    "cICP P3": ([(b"cICP", bytes((12, 13, 0, 1)))], [(218, 0, 54), (0, 173, 53), (15, 61, 156)]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_numbers_of_colours_are_shown_as_a_browser_shows_them(name: str) -> None:
    chunks, colours = SHOWN[name]
    image = decoded(with_chunks(*chunks))
    for at, colour in zip((RED, (20, 5), (20, 16)), colours, strict=True):
        assert np.abs(np.array(image.getpixel(at)) - colour).max() <= 2


def test_the_profile_counts_before_gamma_and_the_first_of_two() -> None:
    exchanged, adobe = profile_chunk(rgb_profile(RED_AND_GREEN_EXCHANGED)), profile_chunk(rgb_profile(ADOBE_RGB))
    gamma = (b"gAMA", LINEAR)
    for chunks in ([gamma, exchanged], [(b"sRGB", b"\0"), exchanged], [exchanged, adobe]):
        assert decoded(with_chunks(*chunks)).getpixel(RED) == (40, 200, 60)
    # One that is no profile counts for nothing.
    shown = decoded(with_chunks(profile_chunk(b"junk" * 60), gamma)).getpixel(RED)
    assert np.abs(np.array(shown) - (229, 110, 133)).max() <= 1


def test_interlaced_pictures_keep_their_keys() -> None:
    """Adam7 by hand: of 8 x 8 pixels, the passes in their order."""
    values = np.arange(64 * 3).reshape(8, 8, 3)
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    rows = b"".join(
        b"\0" + row.astype(np.uint8).tobytes() for y, down, x, across in passes for row in values[y::down, x::across]
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(name, content)
        for name, content in (
            (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 1)),
            (b"tRNS", struct.pack(">3H", *values[3, 5])),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
    )
    expected = values.copy()
    expected[3, 5] = 255
    np.testing.assert_array_equal(np.asarray(decoded(data)), expected)
