"""Whether one file can be read to its end: each function returns what is wrong with it, such as "is empty", or None."""

import contextlib
import json
import sqlite3
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.store.files import sha256_file
from pipelines.store.png_files import damage_of_png
from pipelines.store.state_files import state_damage
from pipelines.store.weight_files import weight_file_damage

VALUES_AT_ONCE = 1 << 22
# safetensors' names of number formats, as what numpy reads them, and for bfloat16 the bits of its exponent.
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
EXPONENT_OF_BFLOAT16 = 0x7F80


def json_damage(path: Path) -> str | None:
    """Check a JSON object."""
    return state_damage(path)


def lines_damage(path: Path) -> str | None:
    """Check a file of one JSON object a line, which was written at once."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        return "is cut short: its last line does not end"
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            is_object = isinstance(json.loads(line), dict)
        except ValueError:
            is_object = False
        if not is_object:
            return f"is damaged: its line {number:,} is no JSON object"
    return None if data else "is empty"


def database_damage(path: Path) -> str | None:
    """Check the pages of an SQLite database."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)) as database:
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        said = str(error)
    return None if said == "ok" else f"is damaged: {said}"


def log_damage(path: Path) -> str | None:
    """Count the lines of a log that no command will read; a killed writer leaves one, so it is only worth a note."""
    torn = 0
    for line in path.read_bytes().splitlines():
        try:
            json.loads(line)
        except ValueError:
            torn += 1
    return f"{torn:,} of its lines are torn, and are left out when it is read" if torn else None


def text_damage(path: Path) -> str | None:
    """Check that a text of lines has its last one."""
    data = path.read_bytes()
    if not data:
        return "is empty"
    return None if data.endswith(b"\n") else "is cut short: its last line does not end"


def page_damage(path: Path) -> str | None:
    """Check that an HTML page is there to its end."""
    data = path.read_bytes()
    if not data:
        return "is empty"
    return None if data.rstrip().endswith(b"</html>") else "is cut short: it does not end as a page does"


def table_damage(path: Path) -> str | None:
    """Read all rows and columns of a Parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        return f"is not readable as Parquet: {error}"
    return None


def picture_damage(path: Path) -> str | None:
    """Read a PNG to its end: chunks, checksums, pixels."""
    damage = damage_of_png(path)
    return damage and f"is a damaged PNG: {damage}"


def weights_damage(path: Path) -> str | None:
    """Read a .pt or .safetensors file to its end; numbers of the latter must be finite."""
    damage = weight_file_damage(path, is_thorough=True)
    if damage is not None or path.suffix != ".safetensors":
        return damage
    return _non_finite(path)


def _non_finite(path: Path) -> str | None:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    for name, tensor in header.items():
        if name == "__metadata__" or tensor["dtype"] not in FLOATS:
            continue
        start, stop = tensor["data_offsets"]
        if start == stop:
            continue
        dtype = np.dtype(FLOATS[tensor["dtype"]])
        place, size = 8 + header_bytes + start, (stop - start) // dtype.itemsize
        values = np.memmap(path, dtype, mode="r", offset=place, shape=(size,))
        for first in range(0, len(values), VALUES_AT_ONCE):
            block = values[first : first + VALUES_AT_ONCE]
            is_bad = ~np.isfinite(block)
            if tensor["dtype"] == "BF16":
                is_bad = (block & EXPONENT_OF_BFLOAT16) == EXPONENT_OF_BFLOAT16
            if is_bad.any():
                return f"holds numbers that are not finite, first in {name}"
    return None


def headers_damage(path: Path) -> str | None:
    """Check remembered headers of a raw shard: a line of JSON, then compressed lines, of which version 4 had one."""
    first, _, rest = path.read_bytes().partition(b"\n")
    try:
        for line in (first, *zlib.decompress(rest).splitlines()):
            json.loads(line)
    except (ValueError, zlib.error) as error:
        return f"is damaged ({error})" if first else "is empty"
    return None


def copy_damage(path: Path) -> str | None:
    """Check a copy of a remote file against the SHA-256 that its folder is called after."""
    return None if sha256_file(path) == path.parent.name else "is not the file whose SHA-256 its folder is called after"
