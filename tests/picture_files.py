"""Pictures as Pillow does not write them: PNG, TIFF and BMP by their fields, and ICC profiles of other colours."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pillow_heif
from PIL import Image, ImageCms, ImageDraw

D50 = (0.9642, 1.0, 0.8249)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
RED_AND_GREEN_EXCHANGED = ((0.3851, 0.7169, 0.0971), (0.4361, 0.2225, 0.0139), (0.1431, 0.0606, 0.7141))


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def heic(image: Image.Image, icc_profile: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=-1, icc_profile=icc_profile)
    return buffer.getvalue()


def swatches() -> Image.Image:
    """A picture of 32 x 24 pixels: red at (5, 5), green at (20, 5), blue at (20, 16) on a light ground."""
    image = Image.new("RGB", (32, 24), (245, 245, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle([4, 4, 15, 19], fill=(200, 40, 60))
    draw.rectangle([18, 4, 29, 12], fill=(40, 170, 70))
    draw.rectangle([18, 14, 29, 20], fill=(30, 60, 150))
    return image


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def rgb_profile(primaries: Sequence[tuple[float, float, float]]) -> bytes:
    """sRGB's profile with other primaries (XYZ, D50)."""
    data = bytearray(srgb_profile())
    for index in range(struct.unpack(">I", data[128:132])[0]):
        tag, offset, _ = struct.unpack(">4sII", data[132 + 12 * index : 144 + 12 * index])
        if tag in (names := (b"rXYZ", b"gXYZ", b"bXYZ")):
            data[offset + 8 : offset + 20] = _fixed(primaries[names.index(tag)])
    return bytes(data)


def grey_profile(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    return _profile(b"GRAY", b"mntr", b"XYZ ", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50), b"kTRC": curve})


def cmyk_profile() -> bytes:
    """A profile in which cyan prints as yellow and yellow as cyan, so that one sees whether it was used."""
    cube = np.stack(np.meshgrid(*[np.linspace(0, 1, 5)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    rgb = ((1 - cube[:, :3]) * (1 - cube[:, 3:]))[:, ::-1]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    ratio = linear @ to_xyz.T / np.array(D50)
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116).T
    lab = np.stack([(116 * y - 16) * 652.8, (500 * (x - y) + 128) * 256, (200 * (y - z) + 128) * 256], axis=1)
    table = b"mft2\0\0\0\0" + bytes([4, 3, 5, 0]) + struct.pack(">9i", *(np.eye(3, dtype=int).ravel() * 65536).tolist())
    table += struct.pack(">HH", 2, 2) + struct.pack(">HH", 0, 65535) * 4
    table += np.clip(lab.round(), 0, 65535).astype(">u2").tobytes() + struct.pack(">HH", 0, 65535) * 3
    return _profile(b"CMYK", b"prtr", b"Lab ", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50), b"A2B0": table})


def _fixed(values: Sequence[float]) -> bytes:
    return struct.pack(">3i", *(round(value * 65536) for value in values))


def _profile(space: bytes, kind: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = start + len(body)
    header = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, kind, space, connection, b"acsp") + _fixed(D50)
    return header.ljust(128, b"\0") + table + body


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    values: np.ndarray,
    *,
    bits: int = 8,
    before: Sequence[tuple[bytes, bytes]] = (),
    after: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG of grey or RGB numbers, [height, width] or [height, width, channels], with chunks around its pixels."""
    height, width = values.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[values.reshape(height, width, -1).shape[2]]
    rows = b"".join(b"\0" + _packed(row, bits) for row in values.reshape(height, -1))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(rows)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def _packed(row: np.ndarray, bits: int) -> bytes:
    ones = (row.astype(np.uint32)[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(ones.astype(np.uint8).ravel()).tobytes()


def tiff(
    values: np.ndarray,
    *,
    photometric: int,
    order: str = "<",
    bits: int | None = None,
    deflate: bool = False,
    predictor: int = 1,
    tile_pixels: int | None = None,
    tags: Sequence[tuple[int, int]] = (),
    raw: bytes | None = None,
    is_planar: bool = False,
) -> bytes:
    """A TIFF of [height, width, samples] in one strip or tiles, or in those of each sample; `raw` replaces a strip."""
    height, width, num_samples = values.shape
    bits = bits or 8 * values.itemsize
    planes = np.split(values, num_samples, axis=2) if is_planar else [values]
    parts = [part for plane in planes for part in ([plane] if tile_pixels is None else _tiles(plane, tile_pixels))]
    tags = [*tags, (284, 2)] if is_planar else tags
    contents = [raw or b"".join(_tiff_row(row, order, bits, predictor) for row in part) for part in parts]
    contents = [zlib.compress(content) if deflate else content for content in contents]
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    fields = {256: [width], 257: [height], 258: [bits] * num_samples, 259: [8 if deflate else 1], 262: [photometric]}
    fields |= {277: [num_samples], 317: [predictor], 339: [sample_format] * num_samples}
    for tag, value in tags:
        fields.setdefault(tag, []).append(value)
    starts = (324, 325) if tile_pixels else (273, 279)
    fields |= {322: [tile_pixels], 323: [tile_pixels]} if tile_pixels else {278: [height]}
    fields |= {starts[0]: [0] * len(contents), starts[1]: [len(content) for content in contents]}
    behind = 8 + 2 + 12 * len(fields) + 4
    position = behind + sum(4 * len(numbers) for numbers in fields.values() if len(numbers) > 1)
    fields[starts[0]] = [position + sum(map(len, contents[:index])) for index in range(len(contents))]
    entries, extra = b"", b""
    for tag, numbers in sorted(fields.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        where = packed if len(numbers) == 1 else struct.pack(order + "I", behind + len(extra))
        extra += b"" if len(numbers) == 1 else packed
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + where
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(fields))
    return header + entries + bytes(4) + extra + b"".join(contents)


def _tiles(values: np.ndarray, size: int) -> list[np.ndarray]:
    height, width = values.shape[:2]
    padded = np.pad(values, ((0, -height % size), (0, -width % size), (0, 0)))
    return [padded[y : y + size, x : x + size] for y in range(0, height, size) for x in range(0, width, size)]


def _tiff_row(row: np.ndarray, order: str, bits: int, predictor: int) -> bytes:
    if bits != 8 * row.itemsize:
        return _packed(row.ravel(), bits)
    if predictor == 3:
        planes = row.astype(row.dtype.newbyteorder(">")).reshape(-1, 1).view(np.uint8).T.reshape(-1, row.shape[1])
        return np.diff(planes, axis=0, prepend=np.zeros((1, row.shape[1]), np.uint8)).tobytes()
    if predictor == 2:
        row = np.diff(row, axis=0, prepend=np.zeros((1, row.shape[1]), row.dtype))
    return row.astype(row.dtype.newbyteorder(order)).tobytes()


def bmp(
    pixels: np.ndarray, *, bits: int, compression: int, header_bytes: int = 40, fields: bytes = b"", behind: bytes = b""
) -> bytes:
    """A BMP of [height, width] numbers of `bits` bits; `fields` follow the first 40 bytes of its header."""
    height, width = pixels.shape
    rows = np.pad(pixels, ((0, 0), (0, -width % 2 if bits == 16 else 0))).astype(f"<u{bits // 8}")[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", header_bytes, width, height, 1, bits, compression, len(rows), 0, 0, 0, 0)
    start = 14 + max(header_bytes, 40 + len(fields))
    return (
        b"BM"
        + struct.pack("<IHHI", start + len(rows), 0, 0, start)
        + (header + fields).ljust(start - 14, b"\0")
        + rows
        + behind
    )
