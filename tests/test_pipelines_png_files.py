"""PNG files that are cut, overwritten, lengthened or changed, and how each is told from a whole one."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import MissingFileError, UserError
from pipelines.store.png_files import damage_of_png, missing_of_png, read_picture


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_every_cut_is_seen_without_decoding(picture):
    data = picture.read_bytes()
    assert missing_of_png(picture) is None and damage_of_png(picture) is None
    for size in (0, 7, 8, 20, 33, 40, len(data) // 2, len(data) - 13, len(data) - 12, len(data) - 5, len(data) - 1):
        picture.write_bytes(data[:size])
        assert missing_of_png(picture) is not None, size


@pytest.mark.parametrize("zeroed", [slice(0, None), slice(100, None), slice(-12, None)])
def test_zeros_that_a_power_cut_leaves_are_seen(picture, zeroed):
    data = bytearray(picture.read_bytes())
    data[zeroed] = bytes(len(data[zeroed]))
    picture.write_bytes(data)
    assert missing_of_png(picture) is not None


def test_what_lies_behind_the_end_is_seen(picture):
    picture.write_bytes(picture.read_bytes() + b"more")
    assert missing_of_png(picture) == "4 bytes lie behind its end"


def test_every_flipped_byte_is_damage(picture):
    data = picture.read_bytes()
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 0x10
        picture.write_bytes(changed)
        assert damage_of_png(picture) is not None, position
    picture.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    assert missing_of_png(picture) is None
    assert damage_of_png(picture) == "bytes of its chunk IDAT at 33 have changed (CRC-32)"


def test_pixels_that_cannot_be_decoded_are_damage_though_every_checksum_holds(picture):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    data = picture.read_bytes()
    picture.write_bytes(data[:33] + chunk(b"IDAT", b"these are no pixels") + chunk(b"IEND", b""))
    assert missing_of_png(picture) is None
    assert str(damage_of_png(picture)).startswith("it cannot be decoded")


def test_a_picture_that_cannot_be_read_is_named_with_what_to_do(picture):
    whole = picture.read_bytes()
    assert read_picture(picture, mend="draw it").getpixel((3, 5)) is not None
    picture.write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"image\.png cannot be read as an image: it is cut short .*; draw it"):
        read_picture(picture, mend="draw it")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    picture.write_bytes(flipped)
    with pytest.raises(UserError, match=r"image: bytes of its chunk IDAT at 33 have changed \(CRC-32\); draw it"):
        read_picture(picture, mend="draw it")
    picture.write_bytes(b"")
    with pytest.raises(UserError, match=r"image\.png cannot be read as an image: it is empty; draw it"):
        read_picture(picture, mend="draw it")
    picture.unlink()
    with pytest.raises(MissingFileError, match=r"image\.png does not exist; draw it"):
        read_picture(picture, mend="draw it")
