"""TIFFs of any depth and photometric against the numbers they were made of."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.raw.images import SampleReject, decode_image, image_size
from tests.picture_files import ADOBE_RGB, encode, rgb_profile, swatches, tiff

MAX_PIXELS = 1_000_000
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB, ICCLAB = 0, 1, 2, 3, 5, 6, 8, 9


def ramp(num_samples: int, *, width: int = 37, height: int = 21) -> np.ndarray:
    """Numbers of 16 bits, [height, width, num_samples], in which no sample or pixel is like another."""
    values = np.linspace(0, 65535, width * height * num_samples).astype(np.uint16)
    return values.reshape(height, width, num_samples)[:, ::-1]


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, max_pixels=MAX_PIXELS)
    assert image_size(data, max_pixels=MAX_PIXELS) == image.size
    return np.asarray(image)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u2", "u4", "f2", "f4", "f8"])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO, RGB])
def test_every_depth_shows_the_same_picture(order: str, kind: str, photometric: int) -> None:
    values = ramp(3 if photometric == RGB else 1)
    wide = {"u2": values, "u4": values.astype(np.uint32) << 16}.get(kind, (values / 65535).astype(kind))
    shown = decoded(tiff(wide, photometric=photometric, order=order))
    expected = np.broadcast_to(values >> 8, shown.shape).astype(int)
    expected = 255 - expected if photometric == WHITE_IS_ZERO else expected
    assert np.abs(shown - expected).max() <= (0 if kind == "u2" else 1)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "predictor"), [("u2", 1), ("u2", 2), ("u4", 2), ("f4", 1), ("f4", 3), ("f2", 3)])
@pytest.mark.parametrize("tile_pixels", [None, 16])
def test_predictors_and_tiles_change_nothing(order: str, kind: str, predictor: int, tile_pixels: int | None) -> None:
    values = ramp(3)
    wide = {"u2": values, "u4": values.astype(np.uint32) << 16}.get(kind, (values / 65535).astype(kind))
    packed = tiff(wide, photometric=RGB, order=order, deflate=True, predictor=predictor, tile_pixels=tile_pixels)
    np.testing.assert_array_equal(decoded(packed), decoded(tiff(wide, photometric=RGB)))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "predictor"), [("u2", 1), ("u2", 2), ("u4", 1), ("f4", 3), ("i2", 1), ("u1", 1)])
@pytest.mark.parametrize("tile_pixels", [None, 16])
def test_samples_that_are_stored_plane_by_plane_are_put_together(
    order: str, kind: str, predictor: int, tile_pixels: int | None
) -> None:
    values = ramp(3)
    if kind == "u1":
        wide = (values >> 8).astype(kind)
    else:
        wide = values.astype(kind) if kind in ("u2", "i2") else (values / 65535).astype(kind)
    wide = values.astype(np.uint32) << 16 if kind == "u4" else wide
    packed = tiff(
        wide, photometric=RGB, order=order, deflate=True, predictor=predictor, tile_pixels=tile_pixels, is_planar=True
    )
    np.testing.assert_array_equal(decoded(packed), decoded(tiff(wide, photometric=RGB)))
    seen = np.concatenate([ramp(1), ramp(1) // 2], axis=2)
    for photometric, shown in ((BLACK_IS_ZERO, seen), (RGB, np.concatenate([ramp(3), ramp(1)], axis=2))):
        together = decoded(tiff(shown, photometric=photometric, tags=[(338, 2)], order=order))
        apart = decoded(tiff(shown, photometric=photometric, tags=[(338, 2)], order=order, is_planar=True))
        np.testing.assert_array_equal(apart, together)


@pytest.mark.parametrize("bits", [3, 10, 12, 14])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_packed_bits_are_unpacked(bits: int, num_samples: int) -> None:
    values = ramp(num_samples) >> (16 - bits)
    shown = decoded(tiff(values, photometric=RGB if num_samples == 3 else BLACK_IS_ZERO, bits=bits))
    exact = values * (255 / ((1 << bits) - 1))
    assert np.abs(shown - np.broadcast_to(exact, shown.shape)).max() <= 1


@pytest.mark.parametrize("kind", ["i1", "i2"])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO, RGB])
def test_signed_numbers_are_black_at_their_lowest_and_white_at_their_highest(kind: str, photometric: int) -> None:
    bits = 8 * int(kind[1])
    unsigned = ramp(3 if photometric == RGB else 1) >> (16 - bits)
    signed = (unsigned.astype(np.int32) - (1 << bits - 1)).astype(kind)
    plain = decoded(tiff(unsigned.astype(kind.replace("i", "u")), photometric=photometric))
    np.testing.assert_array_equal(decoded(tiff(signed, photometric=photometric)), plain)
    assert plain.min() == 0 and plain.max() == 255


def test_damage_is_said_by_the_reject_alone(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for compression in ("tiff_lzw", "tiff_adobe_deflate"):
        data = bytearray(encode(swatches(), "TIFF", compression=compression))
        data[40:60] = b"\xff" * 20
        with pytest.raises(SampleReject, match="corrupt_image"):
            decode_image(bytes(data), max_pixels=MAX_PIXELS)
    data = tiff(ramp(3).astype(np.uint8), photometric=RGB).replace(struct.pack("<HHII", 277, 4, 1, 3), bytes(12), 1)
    data = data.replace(bytes(12), struct.pack("<HHII", 277, 4, 1, 4_278_190_083), 1)
    with pytest.raises(SampleReject, match="corrupt_image"):
        decode_image(data, max_pixels=MAX_PIXELS)
    assert capfd.readouterr().err == "" and not caplog.records


def test_alpha_is_laid_over_white_at_any_depth_whether_multiplied_or_not() -> None:
    grey, alpha = np.full((4, 4), 0x8000, np.uint16), np.full((4, 4), 0x4000, np.uint16)
    for kind, colours in ((BLACK_IS_ZERO, 1), (RGB, 3)):
        separate = np.stack([*[grey] * colours, alpha], axis=-1)
        multiplied = np.stack([*[grey // 4] * colours, alpha], axis=-1)
        for values in ((separate, 2), (multiplied, 1)):
            for samples in (values[0], (values[0] >> 8).astype(np.uint8)):
                shown = decoded(tiff(samples, photometric=kind, tags=[(338, values[1])]))
                assert np.abs(shown.astype(int) - 223).max() <= 1  # 255 - 64 / 255 * 127
    unknown = np.stack([grey, alpha], axis=-1)
    assert (decoded(tiff(unknown, photometric=BLACK_IS_ZERO, tags=[(338, 0)])) == 128).all()


def lab(*, bits: int, is_icc: bool) -> np.ndarray:
    """The swatches as CIELab or ICCLab stores them."""
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    stored = np.asarray(transform.apply(swatches()))  # L* of 255, a* and b* as signed bytes
    lightness, chroma = stored[..., :1].astype(int), stored[..., 1:].view(np.int8).astype(int) + (128 if is_icc else 0)
    if bits == 8:
        return (np.concatenate([lightness, chroma], axis=2) & 255).astype(np.uint8)
    scale = 65280 / 255 if is_icc else 257
    return (np.concatenate([(lightness * scale).round().astype(int), chroma * 256], axis=2) & 65535).astype(np.uint16)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_lab_is_shown_in_its_colours(bits: int, order: str) -> None:
    for photometric, is_icc in ((CIELAB, False), (ICCLAB, True)):
        shown = decoded(tiff(lab(bits=bits, is_icc=is_icc), photometric=photometric, order=order)).astype(int)
        assert np.abs(shown - np.asarray(swatches())).max() <= 9  # of 255 steps of a* and b*


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_ycbcr_that_is_no_jpeg_is_shown_in_its_colours(subsampling: tuple[int, int]) -> None:
    across, down = subsampling
    seen = swatches().resize((16, 12), Image.Resampling.BOX).resize((32, 24), Image.Resampling.NEAREST)
    values = np.asarray(seen.convert("YCbCr"))
    blocks = values.reshape(24 // down, down, 32 // across, across, 3).swapaxes(1, 2)
    light = blocks[..., 0].reshape(24 // down, 32 // across, -1)
    raw = np.concatenate([light, blocks[:, :, 0, 0, 1:]], axis=2).tobytes()
    shown = decoded(tiff(values, photometric=YCBCR, raw=raw, tags=[(530, across), (530, down)])).astype(int)
    assert np.abs(shown - np.asarray(seen)).max() <= 3


def test_cmyk_and_palettes_of_16_bits() -> None:
    values = np.asarray(swatches().convert("CMYK"))
    wide = decoded(tiff(values.astype(np.uint16) * 257, photometric=CMYK))
    np.testing.assert_array_equal(wide, decoded(encode(swatches().convert("CMYK"), "TIFF")))
    palette = [*range(65536)] + [65535] * 65536 + [0] * 65536
    indices = np.array([[0x1234, 0xFF00], [0, 0x8000]], np.uint16)[..., None]
    shown = decoded(tiff(indices, photometric=PALETTE, tags=[(320, value) for value in palette]))
    assert shown[0, 0].tolist() == [0x12, 255, 0] and shown[1, 1].tolist() == [0x80, 255, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_palette_with_numbers_of_eight_bits_is_not_black(bits: int, order: str) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 1 << bits))
    indices = np.random.default_rng(1).integers(0, 1 << bits, (9, 13, 1)).astype(np.uint8)
    tags = {times: [(320, times * int(value)) for value in colours.ravel()] for times in (1, 257)}
    old = decoded(tiff(indices, photometric=PALETTE, bits=bits, order=order, tags=tags[1]))
    np.testing.assert_array_equal(old, colours.T[indices[..., 0]])
    np.testing.assert_array_equal(decoded(tiff(indices, photometric=PALETTE, bits=bits, tags=tags[257])), old)


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("is_planar", [False, True])
def test_alpha_is_found_among_several_samples_beside_the_colours(kind: str, is_planar: bool) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 13, 5))
    alpha = values[..., 4:] / 255
    wide = (values * (257 if kind == "u2" else 1)).astype(kind)

    def shown(photometric: int, *extra: int) -> np.ndarray:
        return decoded(tiff(wide, photometric=photometric, is_planar=is_planar, tags=[(338, kind) for kind in extra]))

    over_white = (values[..., :3] * alpha + 255 * (1 - alpha)).round()
    assert np.abs(shown(RGB, 0, 2) - over_white).max() <= 1
    np.testing.assert_array_equal(shown(RGB, 0, 0), values[..., :3])
    ink = np.asarray(Image.fromarray((values[..., :4] * alpha).round().astype(np.uint8), "CMYK"))
    seen = decoded(tiff(ink, photometric=CMYK)).astype(int)
    assert np.abs(shown(CMYK, 2) - seen).max() <= 1
    np.testing.assert_array_equal(shown(CMYK, 0), decoded(tiff(values[..., :4].astype("u1"), photometric=CMYK)))


def test_profile_and_orientation_of_a_deep_picture_count() -> None:
    profile = rgb_profile(ADOBE_RGB)
    plain = decoded(encode(swatches(), "TIFF", icc_profile=profile))
    data = tiff(np.asarray(swatches()).astype(np.uint16) * 257, photometric=RGB, tags=[(274, 6), (34675, 0)])
    # The profile is bytes, and lies behind the pixels.
    entry = struct.pack("<HHII", 34675, 7, len(profile), len(data))
    deep = data.replace(struct.pack("<HHII", 34675, 4, 1, 0), entry) + profile
    np.testing.assert_array_equal(decoded(deep), np.rot90(plain, -1))
    assert plain[5, 20].tolist() == [0, 170, 61]


def test_damage_is_a_reject_and_costs_no_memory() -> None:
    whole = tiff(ramp(3), photometric=RGB)
    tiled = tiff(ramp(3), photometric=RGB, tile_pixels=16)
    wide_tile = tiled.replace(struct.pack("<HHII", 322, 4, 1, 16), struct.pack("<HHII", 322, 4, 1, 1 << 30))
    many_samples = whole.replace(struct.pack("<HHII", 277, 4, 1, 3), struct.pack("<HHII", 277, 4, 1, 60_000))
    for damaged in (whole[: len(whole) // 2], whole[:100], wide_tile, many_samples):
        with pytest.raises(SampleReject, match="corrupt_image"):
            decode_image(damaged, max_pixels=MAX_PIXELS)
    with pytest.raises(SampleReject, match="too_many_pixels: 37 x 21 > 500"):
        decode_image(whole, max_pixels=500)
