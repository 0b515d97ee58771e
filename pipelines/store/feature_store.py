"""Feature shards: webdataset tars of safetensors, and the Parquet index that says where each tensor's payload lies.

A shard is `<name>.tar` with one member `<key>.safetensors` per kept sample, and `<name>.parquet` with one row per
sample (several where a family keeps several, as of captions), rejected ones too. Offsets in the index are absolute
positions in the tar, so a reader maps the tar and never parses a header. numpy has neither bfloat16 nor float8: BF16
tensors are uint16 arrays of raw bits, F8_E4M3 tensors uint8 ones.
"""

import json
import shutil
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from errors import MissingFileError, UserError
from pipelines.store.files import atomic_write_bytes
from pipelines.store.tables import MEND_PART, MEND_SHARD, read_table, read_table_schema

TAR_BLOCK_BYTES = 512
TAR_END = bytes(2 * TAR_BLOCK_BYTES)
# Payloads start at multiples of a cache line, both in the member and in the tar (members start at multiples of 512).
PAYLOAD_ALIGNMENT_BYTES = 64
SAFETENSORS_DTYPES = {"uint16": "BF16", "float16": "F16", "float32": "F32", "uint8": "F8_E4M3", "int8": "I8"}
MEMBER_SUFFIX = ".safetensors"


def escape_key(key: str) -> str:
    """Return `key` as a member name that every webdataset reader splits alike.

    Letters, digits, `_` and `-` stay; every other byte of the UTF-8 form, dots and slashes too, becomes `%XX` as in
    a URL. `unescape_key` gives the key back.
    """
    # quote() never escapes "." and "~".
    return quote(key, safe="", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")


def unescape_key(member_key: str) -> str:
    """Return the key that `escape_key` turned into `member_key`."""
    return unquote(member_key, errors="surrogateescape")


def serialize_tensors(tensors: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, int]]:
    """Return `tensors` in the safetensors format, and where each payload starts in it.

    Raises:
        TypeError: a tensor is not float16, float32, int8, uint16 (raw bfloat16 bits) or uint8 (raw float8_e4m3 bits).
    """
    header: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    position = 0
    for name, array in tensors.items():
        if array.dtype.name not in SAFETENSORS_DTYPES:
            raise TypeError(f"{name}: dtype {array.dtype} is not one of {sorted(SAFETENSORS_DTYPES)}")
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        offsets[name] = position
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAYLOAD_ALIGNMENT_BYTES)
    start = 8 + len(text)
    payloads = (np.ascontiguousarray(array).tobytes() for array in tensors.values())
    data = b"".join((len(text).to_bytes(8, "little"), text, *payloads))
    return data, {name: start + offset for name, offset in offsets.items()}


def payload_crc32(*payloads: np.ndarray) -> int:
    """Return the CRC-32 of payloads laid end to end."""
    crc = 0
    for payload in payloads:
        crc = zlib.crc32(np.ascontiguousarray(payload).data, crc)
    return crc


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file atomically, such as the null caption's record."""
    atomic_write_bytes(path, serialize_tensors(tensors)[0])


def serialize_member(key: str, tensors: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, int]]:
    """Return a tar member with its header and padding, and where each tensor's payload starts in it."""
    data, offsets = serialize_tensors(tensors)
    info = tarfile.TarInfo(escape_key(key) + MEMBER_SUFFIX)
    info.size = len(data)
    info.mode = 0o644
    # GNU format also holds names over 100 bytes, which escaped keys may have.
    header = info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")
    padding = bytes(-len(data) % TAR_BLOCK_BYTES)
    return b"".join((header, data, padding)), {name: len(header) + offset for name, offset in offsets.items()}


class FeatureTarWriter:
    """Writes a webdataset tar whose bytes depend on keys and tensors alone: fixed times, owners and modes.

    Use as a context manager; leaving it writes the end-of-archive blocks.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._position = 0

    def add(self, key: str, tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Append member `<escaped key>.safetensors`; returns the offset in the tar of each tensor's payload."""
        data, offsets = serialize_member(key, tensors)
        self._file.write(data)
        start = self._position
        self._position += len(data)
        return {name: start + offset for name, offset in offsets.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.write(TAR_END)
        self._file.close()


def write_index(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write index rows to `path`; a key of `schema` that a row lacks is null."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def join_shards(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
    """Join parts of a shard in order: the bytes are those of the shard written in one go.

    Args:
        parts: files of each part by suffix, `.tar` and `.parquet`.
        outputs: files to write, by the same suffixes.
    """
    tables: list[pa.Table] = []
    position = 0
    with outputs[".tar"].open("wb") as joined:
        for part in parts:
            tables.append(_shift_offsets(read_table(part[".parquet"], mend=MEND_PART), position))
            num_member_bytes = part[".tar"].stat().st_size - len(TAR_END)
            with part[".tar"].open("rb") as file:
                shutil.copyfileobj(file, joined, length=1 << 20)
            joined.seek(position + num_member_bytes)
            position += num_member_bytes
        joined.write(TAR_END)
    # One chunk per column, else Parquet pages would follow the cuts.
    pq.write_table(pa.concat_tables(tables).combine_chunks(), outputs[".parquet"])


def _shift_offsets(table: pa.Table, shift_bytes: int) -> pa.Table:
    for position, field in enumerate(table.schema):
        if field.name.endswith("offset"):
            shifted = pc.call_function("add", [table.column(position), pa.scalar(shift_bytes, field.type)])
            table = table.set_column(position, field, shifted)
    return table


def load_index(directory: Path, names: Sequence[str], *, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the index of shards `names` of a feature directory, in that order; only `columns` if given.

    Rows whose `reject` is not null have no payload: their offsets are null.

    Raises:
        MissingFileError: a shard has no index; names it.
        UserError: an index lacks a column; names shard and column.
    """
    tables = []
    for name in names:
        path = directory / f"{name}.parquet"
        if not path.is_file():
            raise MissingFileError(f"{path}: the index of shard {name} is missing")
        if missing := set(columns or ()) - set(read_table_schema(path, mend=MEND_SHARD).names):
            raise UserError(f"{path}: column {sorted(missing)[0]!r} is missing; this is no such index")
        tables.append(read_table(path, columns, mend=MEND_SHARD))
    if not tables:
        raise UserError(f"{directory}: no shards to load an index of")
    return pa.concat_tables(tables)


def read_payload(tar: np.ndarray, offset: int, *, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Return a view of the tensor at `offset` of a mapped tar (`np.memmap(path, np.uint8)`): no copy, no parsing.

    `dtype` is a numpy name; bfloat16 payloads are read as `uint16`.
    """
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return tar[offset : offset + nbytes].view(dtype).reshape(shape)
