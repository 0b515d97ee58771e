"""The segments in front of a JPEG's pixels: those that are shorter than their own head, over which Pillow stumbles."""

START = b"\xff\xd8\xff"
SCAN = 0xDA
# By marker, how the head of a segment begins, and its length without the two bytes of it. libjpeg, as browsers have it,
# passes over what is shorter.
HEADS = {0xE0: (b"JFIF", 14), 0xE2: (b"ICC_PROFILE", 14), 0xEE: (b"Adobe", 12)}


def without_short_segments(data: bytes) -> bytes | None:
    """Return a JPEG without the segments that are shorter than their head; None if it has none, or is no JPEG."""
    if not data.startswith(START):
        return None
    kept, position = [data[:2]], 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data) and data[position + 1] != SCAN:
        marker, end = data[position + 1], position + 2 + int.from_bytes(data[position + 2 : position + 4])
        start, num_bytes = HEADS.get(marker, (b"", 0))
        content = data[position + 4 : end]
        if not (content.startswith(start) and len(content) < num_bytes):
            kept.append(data[position:end])
        position = max(end, position + 2)
    kept.append(data[position:])
    whole = b"".join(kept)
    return whole if len(whole) < len(data) else None
