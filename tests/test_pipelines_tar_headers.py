"""Our walk over tar headers against `tarfile` on all its formats, and what it says of tars that are no longer whole."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from errors import UserError
from pipelines.raw.kinds.tar_headers import TarContents, read_tar
from pipelines.store.files import open_ranges

NAMES = (
    "000000001.jpg",
    "./sa_223750.json",
    "a/" * 60 + "deep.jpg",
    "x" * 180 + ".png",
    "\u65e5\u672c\u8a9e/caf\u00e9.webp",
    "cr\udce8me.jpg",
    "with space = and\ttab.txt",
)


def write(path: Path, tar_format: int, *, seed: int = 0) -> Path:
    """A tar with every kind of member, payloads of awkward sizes, and times with fractions."""
    rng = random.Random(seed)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for number, size in enumerate((0, 1, 511, 512, 513, 5000, 20_000)):
            name = NAMES[number]
            if tar_format == tarfile.USTAR_FORMAT and len(name) > 100 and "/" not in name:
                name = name[-90:]
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, 1_690_000_000 + (0.25 if number % 2 else 0)
            if tar_format == tarfile.PAX_FORMAT and number == 3:
                info.pax_headers = {"comment": "written by a test", "SCHILY.xattr.user": "v=1\nw=2"}
            archive.addfile(info, io.BytesIO(rng.randbytes(size)))
            other = tarfile.TarInfo(f"other_{number}")
            other.type = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)[number % 4]
            other.linkname = "y" * (150 if tar_format != tarfile.USTAR_FORMAT else 50)
            archive.addfile(other)
    return path


def read(path: Path) -> TarContents:
    with open_ranges(str(path)) as file:
        return read_tar(file)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, tar_format: int) -> None:
    path = write(tmp_path / "x.tar", tar_format)
    contents = read(path)
    with tarfile.open(path) as archive:
        expected = [
            (info.name, info.offset_data, info.size, int(info.mtime), info.isreg(), info.isdir()) for info in archive
        ]
    found = [
        (entry.name, entry.offset, entry.size, entry.modified_seconds, entry.kind == "file", entry.kind == "folder")
        for entry in contents.entries
    ]
    assert found == expected and len(found) == 14 and contents.fault is None


def test_global_headers_and_sizes_beyond_octal(tmp_path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"mtime": "17.5"}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    assert [(entry.name, entry.modified_seconds) for entry in read(path).entries] == [("a.jpg", 17)]
    # A member of 9 GB, in base 256: its header is whole although the file is not.
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"start")
    contents = read(path)
    assert contents.entries[0].size == 9 << 30 and "cut off" in str(contents.fault)


def test_sparse_files_are_no_samples(tmp_path) -> None:
    """Their bytes in the tar are not the file's."""
    info = tarfile.TarInfo("sparse.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4096"}
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(info)
    assert [entry.kind for entry in read(tmp_path / "x.tar").entries] == ["other"]


def test_what_is_wrong_with_a_tar_is_said(tmp_path) -> None:
    path = write(tmp_path / "x.tar", tarfile.GNU_FORMAT)
    whole = read(path)
    data, end = path.read_bytes(), whole.entries[-1].offset
    # No end mark: every member is there.
    path.write_bytes(data[:end])
    assert read(path).entries == whole.entries and "cut off" in str(read(path).fault)
    # A damaged header hides what comes behind it, and says where.
    third = whole.entries[6].offset - 512
    path.write_bytes(data[: third + 100] + b"\xff" * 20 + data[third + 120 :])
    assert read(path).entries == whole.entries[:6] and f"damaged at byte {third:,}" in str(read(path).fault)
    # Two tars in one file: `cat a.tar b.tar`.
    path.write_bytes(data + data)
    assert read(path).entries == whole.entries and "goes on behind its end-of-archive mark" in str(read(path).fault)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"short", "shorter than one header"),
        (b"<html>403</html>" * 100, "first block is no tar header"),
        (gzip.compress(bytes(10_240), mtime=0), "compressed with gzip"),
    ],
)
def test_what_is_no_tar_is_said(tmp_path, data: bytes, message: str) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.tar")


def test_no_bytes_crash_the_walk(tmp_path) -> None:
    """Any damage gives the members before it and a fault, or a refusal; never another exception or an endless loop."""
    path = write(tmp_path / "x.tar", tarfile.PAX_FORMAT)
    data, rng = path.read_bytes(), random.Random(1)
    headers = [
        position for position in range(0, len(data) - 512, 512) if data[position + 257 : position + 262] == b"ustar"
    ]
    for _ in range(300):
        broken = bytearray(data[: rng.choice((len(data), rng.randrange(len(data))))])
        for _ in range(rng.randrange(4)):
            position = rng.choice(headers) + rng.randrange(1024)
            if position < len(broken):
                broken[position] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            contents = read(path)
        except UserError:
            continue
        assert len(contents.entries) <= 14
        assert contents.fault is not None or len(contents.entries) == 14


@pytest.mark.parametrize(
    ("size", "changed_at", "later_seconds", "is_noticed"),
    [
        (500, 0, 0, True),  # a text of 512 bytes counts as a whole
        (2000, 1900, 0, True),
        (2000, 100, 0, False),
        (2000, 100, 1, True),  # as every program that writes a tar notes it
    ],
)
def test_what_of_a_text_is_part_of_a_tars_identity(
    tmp_path, size: int, changed_at: int, later_seconds: int, is_noticed: bool
) -> None:
    def identity(text: bytes, seconds: int) -> str:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            info = tarfile.TarInfo("a.txt")
            info.size, info.mtime = len(text), seconds
            archive.addfile(info, io.BytesIO(text))
        return read(tmp_path / "x.tar").identity

    text = bytearray(b"t" * size)
    before = identity(bytes(text), 1_690_000_000)
    text[changed_at] = ord("u")
    assert (identity(bytes(text), 1_690_000_000 + later_seconds) != before) == is_noticed
