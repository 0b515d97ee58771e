"""Whether files of weights are whole, told by their structure alone: no torch, and no weights in memory.

Both kinds list what they hold, torch's at the end and safetensors' at the start, so that a file which was cut short, is
empty or full of zeros is known from a few bytes. torch's has a checksum of each record, too.
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

READ_BYTES = 1 << 20
LENGTH = struct.Struct("<Q")
# safetensors' own bound of its header.
MAX_HEADER_BYTES = 100_000_000
CUT = "is cut short or overwritten"


def weight_file_damage(path: Path, *, is_thorough: bool = False) -> str | None:
    """Return what is wrong with a .pt or .safetensors file, such as "is empty"; None if nothing is.

    Args:
        path: of the file, which need not exist.
        is_thorough: also reads all of it, and compares the checksums of a .pt file.

    Raises:
        OSError: it cannot be read.
    """
    checks: dict[str, Callable[..., str | None]] = {".pt": _torch_damage, ".safetensors": _safetensors_damage}
    if not path.is_file():
        return "does not exist"
    if path.stat().st_size == 0:
        return "is empty"
    return checks[path.suffix](path, is_thorough=is_thorough)


def _torch_damage(path: Path, *, is_thorough: bool) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "is a zip file, but not one of torch's"
            torn = archive.testzip() if is_thorough else None
    except (zipfile.BadZipFile, struct.error, zlib.error, ValueError, EOFError, NotImplementedError):
        return CUT
    return None if torn is None else f"has changed since it was written: the checksum of {torn} differs"


def _safetensors_damage(path: Path, *, is_thorough: bool) -> str | None:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LENGTH.size)
        header_bytes = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else num_bytes
        if header_bytes > min(num_bytes - LENGTH.size, MAX_HEADER_BYTES):
            return CUT
        try:
            header = json.loads(file.read(header_bytes))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
            return CUT
        wanted = LENGTH.size + header_bytes + max(ends, default=0)
        if num_bytes != wanted:
            return f"{CUT}: it has {num_bytes:,} bytes and should have {wanted:,}"
        while is_thorough and file.read(READ_BYTES):
            pass
    return None
