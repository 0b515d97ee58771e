"""What a tar's headers say, read by place: three times as fast as `tarfile` walks, and in one short read per member.

The formats are those `tarfile` reads: ustar, GNU (long names, numbers in base 256) and PAX.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.raw.reading import UnreadableShardError
from pipelines.store.files import RangeFile

BLOCK_BYTES = 512
# A tar ends with zeros up to a multiple of this.
RECORD_BYTES = 10_240
# The last bytes of every payload are part of a tar's identity: a change of content shows there in nearly all formats.
TAIL_BYTES = 512
# PAX headers and long names are a few blocks.
MAX_EXTRA_BYTES = 1 << 20
ZEROS = bytes(BLOCK_BYTES)
REGULAR_TYPES = (b"0", b"\0", b"7")
# Hard and symbolic links, devices, folders and pipes have no payload, whatever their size field says.
TYPES_WITHOUT_PAYLOAD = (b"1", b"2", b"3", b"4", b"5", b"6")


class TarEntry(NamedTuple):
    """One member: `kind` is `file`, `folder`, or `other` for links, devices and sparse files."""

    name: str
    kind: str
    offset: int
    size: int
    modified_seconds: int


@dataclass(frozen=True, kw_only=True)
class TarContents:
    """All members of a tar.

    Attributes:
        identity: hex digest over every header and the last block of every payload, so that a changed tar is noticed
            without reading it whole, and a copy elsewhere is known as the same.
        fault: what is wrong with the tar as a whole, such as that it is cut off; None if nothing is.
    """

    entries: list[TarEntry]
    identity: str
    fault: str | None


class _HeaderError(Exception):
    """A block that should be a header is none."""


def read_tar(file: RangeFile) -> TarContents:
    """Read the headers of a tar up to its end, or to where it is damaged; what comes before is usable.

    Raises:
        UnreadableShardError: it is not a tar at all.
    """
    entries: list[TarEntry] = []
    digest = hashlib.sha256()
    walk = _Walk(file)
    for entry, tail in walk.entries():
        entries.append(entry)
        facts = f"{entry.name}\0{entry.size}\0{entry.modified_seconds}\0{entry.offset}\0"
        digest.update(facts.encode(errors="surrogateescape"))
        digest.update(tail)
    digest.update(str(file.size).encode())
    return TarContents(entries=entries, identity=digest.hexdigest(), fault=walk.fault)


class _Walk:
    """Goes from header to header; `fault` is set when it has ended."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._offset = 0
        self._global_pax: dict[bytes, bytes] = {}
        self.fault: str | None = None

    def entries(self) -> Iterator[tuple[TarEntry, bytes]]:
        """Yield every member with the last bytes of its payload."""
        block = self._first_block()
        pax, long_name = self._global_pax, None
        while len(block) == BLOCK_BYTES and block != ZEROS:
            try:
                kind = _checked_type(block)
                size = _number(block[124:136])
                if kind in (b"x", b"g", b"L", b"K"):
                    if not 0 <= size <= MAX_EXTRA_BYTES:
                        raise _HeaderError("an extra header of that size is damage")
                    payload = self._file.read(self._offset + BLOCK_BYTES, size)
                    if kind == b"x":
                        pax = self._global_pax | _pax_records(payload)
                    elif kind == b"g":
                        self._global_pax |= _pax_records(payload)
                        pax = self._global_pax
                    elif kind == b"L":
                        long_name = payload.partition(b"\0")[0]
                    block = self._next_block(size)
                    continue
                entry = _entry(block, kind, size, pax, long_name, self._offset + BLOCK_BYTES)
            except (_HeaderError, ValueError, OverflowError):
                self.fault = f"damaged at byte {self._offset:,}: members behind it are not seen"
                return
            pax, long_name = self._global_pax, None
            block, tail = self._next_block_and_tail(0 if kind in TYPES_WITHOUT_PAYLOAD else entry.size)
            yield entry, tail
        self.fault = self._fault_at_end(block)

    def _first_block(self) -> bytes:
        """Return the first block; raises `UnreadableShardError` if it is none of a tar."""
        block = self._file.read(0, BLOCK_BYTES)
        if block[:2] == b"\x1f\x8b":
            raise UnreadableShardError(
                "it is compressed with gzip, so its members cannot be read by place; unpack it with gunzip"
            )
        if block == ZEROS:
            return block
        try:
            _checked_type(block)
            return block
        except _HeaderError as error:
            raise UnreadableShardError(str(error) if block else "it is empty") from None

    def _next_block(self, size: int) -> bytes:
        self._offset += BLOCK_BYTES + _padded(size)
        return self._file.read(self._offset, BLOCK_BYTES)

    def _next_block_and_tail(self, size: int) -> tuple[bytes, bytes]:
        # The end of a payload and the next header are neighbours: one read.
        end = self._offset + BLOCK_BYTES + size
        start = end - min(size, TAIL_BYTES)
        self._offset += BLOCK_BYTES + _padded(size)
        data = self._file.read(start, self._offset + BLOCK_BYTES - start)
        return data[self._offset - start :], data[: end - start]

    def _fault_at_end(self, block: bytes) -> str | None:
        if len(block) < BLOCK_BYTES:
            return f"cut off: {self._file.size:,} bytes, and no end-of-archive mark"
        rest = self._file.read(self._offset, 2 * RECORD_BYTES)
        if rest != bytes(len(rest)):
            return f"goes on behind its end-of-archive mark at byte {self._offset:,}: members there are not seen"
        return None


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _checked_type(block: bytes) -> bytes:
    """Return a header's type after checking its sum, which counts its own field as spaces."""
    if len(block) < BLOCK_BYTES:
        raise _HeaderError("it is shorter than one header")
    try:
        expected = _number(block[148:156])
    except ValueError:
        raise _HeaderError("its first block is no tar header") from None
    # Most of a header is zeros.
    found = sum(block.translate(None, b"\0")) - sum(block[148:156]) + 8 * ord(" ")
    # Old tars sum signed bytes.
    if found != expected and found - 256 * sum(byte > 127 for byte in block[:148] + block[156:]) != expected:
        raise _HeaderError("its first block is no tar header")
    return block[156:157]


def _number(field: bytes) -> int:
    """Read a number in octal, or in base 256 where GNU tar needs more digits."""
    if field[0] & 0x80:
        value = int.from_bytes(field[1:], "big")
        return value - (256 ** (len(field) - 1)) if field[0] == 0xFF else value
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _pax_records(payload: bytes) -> dict[bytes, bytes]:
    """Read `<length> <key>=<value>\\n` records."""
    records = {}
    position = 0
    while position < len(payload) and payload[position] != 0:
        space = payload.index(b" ", position)
        length = int(payload[position:space])
        if length <= space - position:
            raise _HeaderError("a PAX record of no length")
        key, _, value = payload[space + 1 : position + length - 1].partition(b"=")
        records[key] = value
        position += length
    return records


def _entry(
    block: bytes, kind: bytes, size: int, pax: dict[bytes, bytes], long_name: bytes | None, offset: int
) -> TarEntry:
    name = block[:100].partition(b"\0")[0]
    is_sparse = kind == b"S"
    modified_seconds = _number(block[136:148])
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    if long_name is not None:
        name = long_name
    if pax:
        name = pax.get(b"path", name)
        size = int(pax.get(b"size", size))
        modified_seconds = int(float(pax.get(b"mtime", modified_seconds)))
        is_sparse = is_sparse or any(key.startswith(b"GNU.sparse.") for key in pax)
    if size < 0:
        raise _HeaderError("a negative size")
    if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):
        name, sort = name.rstrip(b"/"), "folder"
    else:
        sort = "file" if kind in REGULAR_TYPES and not is_sparse else "other"
    return TarEntry(name.decode("utf-8", errors="surrogateescape"), sort, offset, size, modified_seconds)
