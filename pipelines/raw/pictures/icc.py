"""ICC profiles: which colours a file's numbers mean, and their transformation to sRGB.

The rules are those of browsers: perceptual intent, no compensation of black points, a profile of other channels than
the picture's is ignored, and one that differs from sRGB by no more than one of 255 is taken for sRGB.
"""

import functools
import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageCms

# The largest of printers have three. What is behind it can be no table that eight bits need.
MAX_PROFILE_BYTES = 8 * 1024 * 1024
HEADER_BYTES = 128
CACHED_TRANSFORMS = 16
# Pillow's modes by the profile's colour space.
MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
SAME_WITHIN = 1  # of 255
D50 = (0.9642, 1.0, 0.8249)
D65 = (0.3127, 0.329)
# By their numbers in ITU-T H.273: (x, y) of red, green and blue, and curves by the parameters ICC has for them.
PRIMARIES = {
    1: ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06)),
    9: ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),
    12: ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
}
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
VIDEO_CURVE = (2.4,)  # of screens, as browsers have it; that of cameras is not its inverse
TRANSFERS = {1: VIDEO_CURVE, 4: (2.2,), 6: VIDEO_CURVE, 8: (1.0,), 13: SRGB_CURVE, 14: VIDEO_CURVE, 15: VIDEO_CURVE}
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def whole_profile(data: bytes) -> bytes | None:
    """Return the profile at the start of `data` without what follows it; None if it is not whole."""
    size = int.from_bytes(data[:4])
    return data[:size] if HEADER_BYTES <= size <= min(len(data), MAX_PROFILE_BYTES) else None


def show_as_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an L, RGB or CMYK image as RGB in sRGB; numbers without a profile that fits them are taken for sRGB."""
    mode = None if profile is None else MODES.get(profile[16:20])
    # Grey is shown through a profile of RGB too. Nothing else fits what it was not made for.
    is_for_it = mode == image.mode or (mode == "RGB" and image.mode == "L")
    transform = _transform(profile, mode) if profile is not None and mode is not None and is_for_it else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    return transform.apply(image if image.mode == mode else image.convert(mode))


@functools.cache
def lab_transform() -> ImageCms.ImageCmsTransform:
    """Return the transform from CIE L*a*b* (D50, 8 bits) to sRGB."""
    return _build(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")


@functools.lru_cache(CACHED_TRANSFORMS)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB, which threads may share, or None: there is none, or it changes nothing."""
    try:
        transform = _build(ImageCms.ImageCmsProfile(io.BytesIO(profile)), mode)
        colours = _colours().convert(mode)
        shown = np.asarray(transform.apply(colours), np.int16)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None  # damaged, or of a kind that no picture has
    plain = np.asarray(colours.convert("RGB"), np.int16)
    return None if np.abs(shown - plain).max() <= SAME_WITHIN else transform


def _build(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    srgb = ImageCms.ImageCmsProfile(io.BytesIO(matrix_profile(PRIMARIES[1], curve=SRGB_CURVE) or b""))
    return ImageCms.ImageCmsTransform(profile, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)


def _colours() -> Image.Image:
    """Return greys and a grid of colours, [1, 256 + 6 ** 3]."""
    steps = np.linspace(0, 255, 6).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    return Image.fromarray(np.concatenate([greys, grid])[None])


def matrix_profile(
    primaries: Sequence[tuple[float, float]],
    *,
    curve: Sequence[float],
    white: tuple[float, float] = D65,
) -> bytes | None:
    """Return an ICC profile of RGB by the (x, y) of its primaries and white; None where these span no colours.

    `curve` has the parameters of ICC's parametric curve: g, or g a b c d of the one with a line near black. The profile
    is of version 2, so that no black point is compensated.
    """
    xyz = np.array([[x, y, 1 - x - y] for x, y in primaries]).T
    x, y = white
    if y <= 0 or abs(np.linalg.det(xyz)) < 1e-6:
        return None
    white_xyz = np.array([x, y, 1 - x - y]) / y
    cones, wanted = BRADFORD @ white_xyz, BRADFORD @ np.array(D50)
    if np.abs(cones).min() < 1e-6:
        return None
    adapted = np.linalg.inv(BRADFORD) @ np.diag(wanted / cones) @ BRADFORD
    columns = (adapted @ (xyz * np.linalg.solve(xyz, white_xyz))).T
    values = np.clip(columns, -32_000, 32_000), np.clip(curve, 0, 32_000)
    para = b"para" + struct.pack(">4xHxx", 0 if len(curve) == 1 else 3) + _fixed(values[1])
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50)}
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags |= {name: b"XYZ \0\0\0\0" + _fixed(column) for name, column in zip(names, values[0], strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), para)
    return _profile_of(tags)


def _fixed(values: Sequence[float] | np.ndarray) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65_536) for value in values))


def _profile_of(tags: dict[bytes, bytes]) -> bytes:
    start = HEADER_BYTES + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (header + _fixed(D50)).ljust(HEADER_BYTES, b"\0") + table + body
