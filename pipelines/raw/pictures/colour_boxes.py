"""The colours that boxes of AVIF, HEIC and JPEG 2000 declare, as Pillow does not say them (ISO 14496-12, 15444-1)."""

from collections.abc import Iterator

from pipelines.raw.pictures.icc import PRIMARIES, SRGB_CURVE, matrix_profile, whole_profile

HEAD_BYTES = 8
# Boxes on the way to `colr`, and what stands in front of the boxes within each.
CONTAINERS = {b"jp2h": 0, b"meta": 4, b"iprp": 0, b"ipco": 0}
RESTRICTED_PROFILE, ANY_PROFILE = 2, 3  # JPEG 2000's methods
# By their number in ITU-T H.273. As browsers have it, curves of video are sRGB's; those of HDR are left alone.
CURVES = dict.fromkeys((1, 2, 6, 13, 14, 15), SRGB_CURVE) | {4: (2.2,), 8: (1.0,)}


def profile_of_boxes(data: bytes) -> bytes | None:
    """Return the ICC profile in the first `colr` box, or one made from the numbers there; None for sRGB or nothing."""
    content = next(_colours(data, 0, len(data)), b"")
    if content[:4] == b"nclx" and len(content) >= 8:
        primaries, curve = int.from_bytes(content[4:6]), int.from_bytes(content[6:8])
        is_srgb = primaries in (1, 2) and CURVES.get(curve) == SRGB_CURVE
        if is_srgb or primaries not in PRIMARIES or curve not in CURVES:
            return None
        return matrix_profile(PRIMARIES[primaries], curve=CURVES[curve])
    return whole_profile(content[3:]) if content[:1] in (b"\2", b"\3") else None


def _colours(data: bytes, start: int, end: int) -> Iterator[bytes]:
    while start + HEAD_BYTES <= end:
        size, name = int.from_bytes(data[start : start + 4]), data[start + 4 : start + HEAD_BYTES]
        head = HEAD_BYTES
        if size == 1:  # 64 bits follow
            size, head = int.from_bytes(data[start + 8 : start + 16]), 16
        stop = min(end, start + size) if size else end
        if stop < start + head:
            return
        if name == b"colr":
            yield data[start + head : stop]
        elif name in CONTAINERS:
            yield from _colours(data, start + head + CONTAINERS[name], stop)
        start = stop
