"""Pictures of every format against what Chromium draws of the same bytes on a white page."""

import base64
import io
import struct
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chromium import open_chromium, require_chromium
from PIL import Image

from pipelines.raw.images import SampleReject, decode_image, image_size
from pipelines.raw.pictures import icc
from tests.picture_files import (
    ADOBE_RGB,
    RED_AND_GREEN_EXCHANGED,
    bmp,
    cmyk_profile,
    encode,
    grey_profile,
    heic,
    png,
    rgb_profile,
    srgb_profile,
    swatches,
)

MAX_PIXELS = 1_000_000
RED, GREEN, BLUE = (5, 5), (20, 5), (20, 16)
LOSSLESS = {
    "PNG": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "TIFF": {},
    "MPO": {"quality": 100, "subsampling": 0},
}
BROKEN_PROFILES = {
    "cut": rgb_profile(RED_AND_GREEN_EXCHANGED)[:200],
    "junk": b"junk" * 100,
    "zeros": bytes(500),
    "grey": grey_profile(1.0),
    "CMYK": cmyk_profile(),
}


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, max_pixels=MAX_PIXELS)
    assert image.mode == "RGB" and not image.info
    assert image_size(data, max_pixels=MAX_PIXELS) == image.size
    return np.asarray(image).astype(int)


def test_profiles_of_every_format_are_followed() -> None:
    exchanged = rgb_profile(RED_AND_GREEN_EXCHANGED)
    for file_format, options in LOSSLESS.items():
        for padding in (b"", bytes(1_500_000)):
            if file_format == "MPO" and padding:
                continue
            shown = decoded(encode(swatches(), file_format, icc_profile=exchanged + padding, **options))
            assert np.abs(shown - np.asarray(swatches())[..., [1, 0, 2]]).max() <= 3, file_format


def test_profiles_that_are_none_of_the_picture_are_ignored_in_every_format() -> None:
    for file_format, options in LOSSLESS.items():
        plain = decoded(encode(swatches(), file_format, **options))
        for name, profile in BROKEN_PROFILES.items():
            shown = decoded(encode(swatches(), file_format, icc_profile=profile, **options))
            np.testing.assert_array_equal(shown, plain, err_msg=f"{file_format} {name}")
        srgb = decoded(encode(swatches(), file_format, icc_profile=srgb_profile(), **options))
        np.testing.assert_array_equal(srgb, plain)


def test_transforms_are_made_once_and_shared_by_threads() -> None:
    data = encode(swatches(), "PNG", icc_profile=rgb_profile(ADOBE_RGB))
    icc._transform.cache_clear()
    first = decoded(data)
    with ThreadPoolExecutor(8) as pool:
        for shown in pool.map(decoded, [data] * 64):
            np.testing.assert_array_equal(shown, first)
    counts = icc._transform.cache_info()
    assert (counts.misses, counts.hits, counts.maxsize) == (1, 64, icc.CACHED_TRANSFORMS)


def test_a_jpeg_2000s_profile_and_depths_are_followed() -> None:
    data = encode(swatches(), "JPEG2000")
    colour = data.index(b"colr") - 4
    profile = rgb_profile(RED_AND_GREEN_EXCHANGED)
    box = struct.pack(">I4sBBB", 11 + len(profile), b"colr", 2, 0, 0) + profile
    size = struct.unpack(">I", data[colour : colour + 4])[0]
    header = data.index(b"jp2h") - 4
    header_size = struct.unpack(">I", data[header : header + 4])[0] + len(box) - size
    data = data[:header] + struct.pack(">I", header_size) + data[header + 4 : colour] + box + data[colour + size :]
    np.testing.assert_array_equal(decoded(data), np.asarray(swatches())[..., [1, 0, 2]])
    deep = Image.fromarray(np.asarray(swatches().convert("L")).astype(np.uint16) * 257)
    grey = np.asarray(swatches().convert("L").convert("RGB"))
    np.testing.assert_array_equal(decoded(encode(deep, "JPEG2000")), grey)
    clear = swatches().convert("LA")
    clear.putalpha(Image.new("L", clear.size, 0))
    assert (decoded(encode(clear, "JPEG2000")) == 255).all()


@pytest.mark.parametrize("maximum", [1, 15, 200, 255, 1000, 4095, 65535])
def test_netpbm_of_any_maximum_is_scaled(maximum: int) -> None:
    values = np.linspace(0, maximum, 48).round().astype(">u2" if maximum > 255 else "u1").reshape(4, 4, 3)
    shown = decoded(b"P6 4 4 %d\n" % maximum + values.tobytes())
    assert np.abs(shown - values * (255 / maximum)).max() <= 1
    grey = decoded(b"P5 4 4 %d\n" % maximum + values[..., 0].tobytes())
    assert np.abs(grey - values[..., :1] * (255 / maximum)).max() <= 1


def test_bits_are_shown_as_black_and_white() -> None:
    bits = swatches().convert("1")
    for file_format in ("PNG", "TIFF", "PPM", "BMP", "GIF"):
        np.testing.assert_array_equal(decoded(encode(bits, file_format)), np.asarray(bits.convert("RGB")))
    assert decoded(b"P1 2 2 1 0 0 1")[0].tolist() == [[0] * 3, [255] * 3]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("file_format", LOSSLESS)
def test_turns_of_every_format_are_followed_but_those_of_xmp(file_format: str) -> None:
    upright = decoded(encode(swatches(), file_format, **LOSSLESS[file_format]))
    shown = decoded(encode(swatches(), file_format, exif=turned(), **LOSSLESS[file_format]))
    assert np.abs(shown - np.rot90(upright, -1)).max() <= 2
    if file_format in ("JPEG", "WEBP"):
        xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
        np.testing.assert_array_equal(
            decoded(encode(swatches(), file_format, xmp=xmp, **LOSSLESS[file_format])), upright
        )


def test_all_eight_turns() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.asarray(swatches())
        flipped = stored[:, ::-1] if orientation in (2, 4, 5, 7) else stored
        expected = np.rot90(flipped, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation])
        np.testing.assert_array_equal(decoded(encode(swatches(), "PNG", exif=exif)), expected)


def test_heic_is_read() -> None:
    data = heic(swatches(), icc_profile=rgb_profile(RED_AND_GREEN_EXCHANGED))
    shown = decoded(data)
    for (x, y), colour in ((RED, (40, 200, 60)), (GREEN, (170, 40, 70)), (BLUE, (60, 30, 150))):
        assert np.abs(shown[y, x] - colour).max() <= 2
    for length in (600, len(data) - 50):
        with pytest.raises(SampleReject, match="corrupt_image"):
            decode_image(data[:length], max_pixels=MAX_PIXELS)


def test_without_its_package_heic_is_a_reject_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    with pytest.raises(SampleReject, match=r"unsupported_image: HEIC is read after: pip install .*\[heic\]"):
        decode_image(b"\x00\x00\x00\x18ftypheic" + bytes(200), max_pixels=MAX_PIXELS)


# ---- what a browser shows


def ramp() -> Image.Image:
    return Image.linear_gradient("L").resize((32, 24))


def see_through() -> Image.Image:
    image = swatches().convert("RGBA")
    image.putalpha(ramp())
    return image


def avif(primaries: int, transfer: int) -> bytes:
    data = encode(swatches(), "AVIF", **LOSSLESS["AVIF"])
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


def pixels_of_bmp(*shifts: int, bits: tuple[int, int, int, int]) -> np.ndarray:
    channels = np.asarray(see_through()).astype(np.uint32)
    fields = [channels[..., index] >> (8 - bits[index]) << shift for index, shift in enumerate(shifts)]
    return np.bitwise_or.reduce(fields)


def small_gif() -> bytes:
    """A GIF whose first frame covers a part of its screen."""
    data = encode(swatches().quantize(8), "GIF")
    return data[:6] + struct.pack("<HH", 48, 40) + data[10:]


def rgb_files() -> dict[str, bytes]:
    """By name and type, files that have taught us something."""
    files = {}
    values = np.asarray(swatches())
    for name, primaries in (("adobe", ADOBE_RGB), ("exchanged", RED_AND_GREEN_EXCHANGED)):
        profile = rgb_profile(primaries)
        for file_format in ("PNG", "JPEG", "WEBP", "AVIF"):
            options = LOSSLESS[file_format]
            files[f"{name}.{file_format}"] = encode(swatches(), file_format, icc_profile=profile, **options)
        files[f"{name} alpha.PNG"] = encode(see_through(), "PNG", icc_profile=profile)
        files[f"{name} alpha.WEBP"] = encode(see_through(), "WEBP", lossless=True, icc_profile=profile)
        files[f"{name} palette.PNG"] = encode(swatches().quantize(8), "PNG", icc_profile=profile)
        files[f"{name} on grey.PNG"] = encode(swatches().convert("L"), "PNG", icc_profile=profile)
        files[f"{name} on CMYK.JPEG"] = encode(swatches().convert("CMYK"), "JPEG", quality=100, icc_profile=profile)
        files[f"{name}.GIF"] = encode(swatches(), "GIF", icc_profile=profile)
        fields = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0) + b"DEBM" + bytes(48)
        fields += struct.pack("<4I", 4, 124 + 32 * 24 * 4, len(profile), 0)
        pixels = pixels_of_bmp(16, 8, 0, bits=(8, 8, 8, 0))
        files[f"{name}.BMP"] = bmp(pixels, bits=32, compression=3, header_bytes=124, fields=fields, behind=profile)
    for file_format in ("PNG", "JPEG"):
        grey = encode(swatches().convert("L"), file_format, icc_profile=grey_profile(1.0))
        files[f"linear grey.{file_format}"] = grey
        for name, profile in BROKEN_PROFILES.items():
            options = LOSSLESS[file_format]
            files[f"{name} profile.{file_format}"] = encode(swatches(), file_format, icc_profile=profile, **options)
    files["CMYK.JPEG"] = encode(swatches().convert("CMYK"), "JPEG", quality=100)
    files["profile.JPEG"] = encode(swatches().convert("CMYK"), "JPEG", quality=100, icc_profile=cmyk_profile())
    for gamma in (45_455, 46_000, 100_000, 22_727):
        files[f"gAMA {gamma}.PNG"] = png(values, before=[(b"gAMA", struct.pack(">I", gamma))])
    for numbers in ((12, 13), (9, 1), (1, 1), (1, 4), (12, 8)):
        files[f"cICP {numbers}.PNG"] = png(values, before=[(b"cICP", bytes((*numbers, 0, 1)))])
        files[f"nclx {numbers}.AVIF"] = avif(*numbers)
    return files | masked_files() | cut_files()


def cut_files() -> dict[str, bytes]:
    """Files without what stands behind their last pixel."""
    ends = {"PNG": 12, "GIF": 1}
    options = LOSSLESS | {"GIF": {}}
    return {f"cut.{name}": encode(swatches(), name, **options[name])[:-end] for name, end in ends.items()}


def masked_files() -> dict[str, bytes]:
    files = {
        "palette.PNG": encode(swatches().quantize(8), "PNG", transparency=bytes([255, 128, 0, 60])),
        "transparent.GIF": encode(swatches().quantize(8), "GIF", transparency=1),
        "small.GIF": small_gif(),
        "grey.PNG": encode(see_through().convert("LA"), "PNG"),
        "deep.PNG": png(np.asarray(see_through()).astype(np.uint16) * 250, bits=16),
        "turned.PNG": encode(swatches(), "PNG", exif=turned()),
        "turned.JPEG": encode(swatches(), "JPEG", exif=turned(), quality=100),
        "turned.AVIF": encode(swatches(), "AVIF", exif=turned(), quality=100),
    }
    key = (b"tRNS", struct.pack(">3H", 200, 40, 60))
    exchanged = (b"iCCP", b"name\0\0" + zlib.compress(rgb_profile(RED_AND_GREEN_EXCHANGED)))
    files["key and profile.PNG"] = png(np.asarray(swatches()), before=[exchanged, key])
    masks = {
        "4444": ((8, 4, 0, 12), (4, 4, 4, 4)),
        "1555": ((10, 5, 0, 15), (5, 5, 5, 1)),
        "565": ((11, 5, 0, 0), (5, 6, 5, 0)),
        "8888": ((0, 8, 16, 24), (8, 8, 8, 8)),
    }
    for name, (shifts, bits) in masks.items():
        fields = b"".join(struct.pack("<I", (1 << bits[index]) - 1 << shifts[index]) for index in range(4)) + b"BGRs"
        pixels = pixels_of_bmp(*shifts[: 4 if bits[3] else 3], bits=bits)
        width = 32 if name == "8888" else 16
        files[f"{name}.BMP"] = bmp(pixels, bits=width, compression=3, header_bytes=108, fields=fields)
    plain = pixels_of_bmp(16, 8, 0, 24, bits=(8, 8, 8, 8))
    files["32 bits.BMP"] = bmp(plain, bits=32, compression=0)
    fields = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs"
    files["32 bits with alpha.BMP"] = bmp(plain, bits=32, compression=0, header_bytes=108, fields=fields)
    return files


def test_the_start_of_a_file_tells_the_size_that_is_shown_or_none() -> None:
    told = set()
    for name, data in rgb_files().items():
        size = decode_image(data, max_pixels=MAX_PIXELS).size
        for length in [*range(1, min(len(data), 1200), 31), *range(1200, len(data), 500)]:
            try:
                assert image_size(data[:length], max_pixels=MAX_PIXELS) == size, (name, length)
                told.add(name.rpartition(".")[2])
            except SampleReject as reject:
                # What makes callers read on.
                assert reject.reason in ("corrupt_image", "not_an_image"), (name, length)
    assert told >= {"PNG", "JPEG", "GIF", "BMP"}


@pytest.fixture(scope="module")
def shown_by_chromium() -> Callable[[dict[str, bytes]], dict[str, np.ndarray]]:
    require_chromium()

    def draw(files: dict[str, bytes]) -> dict[str, np.ndarray]:
        """Draw all on one page, 64 pixels apart, and cut out what is seen of each."""
        types = [name.rpartition(".")[2].lower() for name in files]
        images = "".join(
            f"<img style='position:absolute;left:{index % 16 * 64}px;top:{index // 16 * 64}px' "
            f"src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
            for index, (kind, data) in enumerate(zip(types, files.values(), strict=True))
        )
        with open_chromium(["--force-color-profile=srgb"]) as browser:
            page = browser.new_page(viewport={"width": 1024, "height": 64 * (1 + len(files) // 16)})
            page.set_content(f"<body style='margin:0;background:white'>{images}</body>")
            sizes = page.evaluate(
                "Promise.all([...document.images].map(i => i.decode().then(() => [i.width, i.height], () => [0, 0])))"
            )
            screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
        return {
            name: screen[index // 16 * 64 :, index % 16 * 64 :][:height, :width]
            for index, (name, (width, height)) in enumerate(zip(files, sizes, strict=True))
        }

    return draw


def test_pictures_are_decoded_as_chromium_draws_them(shown_by_chromium) -> None:
    files = rgb_files()
    differences = {}
    for name, shown in shown_by_chromium(files).items():
        ours = decoded(files[name])
        assert ours.shape == shown.shape, name
        # What JPEG's decoders round to differs, and curves make more of it.
        differences[name] = int(np.abs(ours - shown).max())
    assert not {name: difference for name, difference in differences.items() if difference > 3}


SHORT_SEGMENTS = {
    "Adobe": (0xEE, b"Adobe"),
    "Adobe without its transform": (0xEE, b"Adobe\0d\0\0\0\0"),
    "JFIF": (0xE0, b"JFIF\0"),
    "ICC": (0xE2, b"ICC_PROFILE\0"),
    "ICC of one number": (0xE2, b"ICC_PROFILE\0\1"),
}


@pytest.mark.parametrize("name", SHORT_SEGMENTS)
def test_a_segment_shorter_than_its_head_counts_for_nothing(name) -> None:
    """As in libjpeg, and so in browsers; Pillow takes such a file for no picture."""
    marker, content = SHORT_SEGMENTS[name]
    segment = b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2) + content
    data = encode(swatches(), "JPEG", quality=100)
    for place in (2, data.index(b"\xff\xdb")):
        odd = data[:place] + segment + data[place:]
        np.testing.assert_array_equal(decoded(odd), decoded(data))
        np.testing.assert_array_equal(decoded(odd[:-2]), decoded(data))  # without its end, too
