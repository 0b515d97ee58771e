"""What is in files of weights: safetensors, and what `torch.save` leaves in training code.

A file is known by its first bytes, whatever it is called. Pickles are read as tensors and plain values alone: none runs
code, and no message advises to let one.
"""

import argparse
import datetime
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from errors import UserError, is_out_of_memory
from pixart.weight_files import find_weight_files, read_head

# Where training code keeps the weights in a file, in the order in which they are taken: averages first.
PARTS = ("state_dict_ema", "ema", "state_dict", "model", "module")
AVERAGES = PARTS[:2]
# What a file of ours says beside weights of a width that was never published.
NUM_HEADS = "num_heads"
# What a file of ours says of what its weights were trained with: JSON, see `pixart.origins`.
ORIGINS = "origins"
# What DistributedDataParallel and torch.compile put in front of every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
ZIP, PICKLE = b"PK", b"\x80"
# What unpickling of foreign bytes may raise, by the documentation of pickle and beyond it.
UNPICKLING_FAULTS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)
REFUSED_CLASS = re.compile(r"(?:GLOBAL|class) '?([\w.]+)")


def _plain_dict(*_factory: Any) -> dict[Any, Any]:
    """Stand in for `defaultdict`, into which torch's unpickler puts nothing."""
    return {}


# Plain data that training code saves beside the weights; numpy 1 and 2 write their functions under other names.
ARRAY_FUNCTIONS = {"_reconstruct": np.zeros(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
PLAIN_CLASSES = [
    argparse.Namespace,
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    (_plain_dict, "collections.defaultdict"),
    *(bool, dict, float, int, list, str, tuple),  # what a defaultdict may be of
    # where a file system of the other kind would refuse them; Python 3.13 has them elsewhere
    *(
        (PurePosixPath, f"pathlib.{module}{name}")
        for module in ("", "_local.")
        for name in ("PosixPath", "PurePosixPath")
    ),
    *(
        (PureWindowsPath, f"pathlib.{module}{name}")
        for module in ("", "_local.")
        for name in ("WindowsPath", "PureWindowsPath")
    ),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
    *(type(np.dtype(kind)) for kind in ("U1", "S1", "M8", "m8")),
    *((function, f"numpy.core.multiarray.{name}") for name, function in ARRAY_FUNCTIONS.items()),
    *((function, f"numpy._core.multiarray.{name}") for name, function in ARRAY_FUNCTIONS.items()),
]


@dataclass(frozen=True)
class StoredWeights:
    """Tensors of one file by name, and where in the file they were: None at its top, else the name of the part.

    `num_heads` is the number of heads, where the file says it, as ours do of a width that was never published, and
    `origins` what a file of ours says its weights were trained with.
    """

    tensors: dict[str, Tensor]
    part: str | None = None
    num_heads: int | None = None
    origins: dict[str, Any] | None = None

    def describe(self) -> str:
        """What was taken, in words."""
        if self.part is None:
            return "its weights"
        is_average = any(part in AVERAGES for part in self.part.split("."))
        return f"its {'average' if is_average else 'trained'} weights ({self.part})"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a folder of diffusers, in the dtype they are stored in; raises as its two halves do."""
    weights: dict[str, Tensor] = {}
    for path in find_weight_files(folder):
        weights |= read_weight_file(path).tensors
    return weights


def read_weight_file(path: Path, *, key: str = "") -> StoredWeights:
    """Return the tensors of a safetensors file, or of a file of `torch.save` as training code leaves them.

    Of several sets of weights the average is taken. Prefixes of wrappers are left out of the names.

    Args:
        path: of the file, on which end of its name nothing depends.
        key: of the recipe, to begin messages with.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no file of weights, holds more than data, or is damaged; says which and what to do.
        StorageError: it cannot be read.
    """
    name = f"{key} {path}".strip()
    head = read_head(path, name)
    if _is_safetensors(head, path):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            noted = metadata.get(NUM_HEADS, "")
            num_heads = int(noted) if noted.isdecimal() else None
            return StoredWeights(
                _without_prefixes(load_file(path)), num_heads=num_heads, origins=_origins(metadata.get(ORIGINS), name)
            )
        except SafetensorError as error:
            raise UserError(f"{name} cannot be read, it may have been cut short: {error}") from None
    _require_torch_file(path, head, name)
    content = _load_plain(path, name)
    stored = _weights_in(content, name)
    noted = content.get(NUM_HEADS)
    num_heads = noted if isinstance(noted, int) and not isinstance(noted, bool) else None
    origins = _origins(content.get(ORIGINS), name)
    return StoredWeights(_without_prefixes(stored.tensors), stored.part, num_heads, origins)


def _origins(noted: Any, name: str) -> dict[str, Any] | None:
    """Return the record that a file of ours has beside the weights, None of other files, whatever they call so."""
    if not isinstance(noted, str):
        return None
    try:
        found = json.loads(noted)
    except ValueError as error:
        raise UserError(f"{name} says of its origins what is no JSON ({error}): convert it again") from None
    return found if isinstance(found, dict) else None


def _is_safetensors(head: bytes, path: Path) -> bool:
    """Whether a file begins as safetensors do, or is called so and begins as nothing else."""
    is_pickled = head.startswith((ZIP, PICKLE))
    return head[8:9] == b"{" or (path.suffix.lower() == ".safetensors" and not is_pickled)


def _require_torch_file(path: Path, head: bytes, name: str) -> None:
    try:
        is_zip, members = head.startswith(ZIP) and zipfile.is_zipfile(path), []
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(f"{name} is a zip archive that is damaged ({error}): fetch it again") from None
    if is_zip:
        if any(member.endswith("/constants.pkl") for member in members):
            raise UserError(f"{name} is a program of TorchScript: save the weights alone, its state_dict()")
        if not any(member.endswith("/data.pkl") for member in members):
            raise UserError(f"{name} is a zip archive, but none that torch.save wrote: unpack it first")
    elif not head.startswith((ZIP, PICKLE)):
        raise UserError(f"{name} is not a checkpoint of torch: it begins neither as torch.save nor as safetensors does")


def _load_plain(path: Path, name: str) -> Any:
    """Unpickle tensors, containers, numbers, texts and `PLAIN_CLASSES`, and nothing else."""
    is_zip = is_at_end = False
    try:
        is_zip = zipfile.is_zipfile(path)
        # torch warns of pickles that are newer than its own, and asks to report them
        with torch.serialization.safe_globals(PLAIN_CLASSES), warnings.catch_warnings(action="ignore"):
            if path.suffix.lower() != ".safetensors" and is_zip:
                # of a map, optimiser states beside the weights are not read
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with path.open("rb") as file:  # torch goes by the ends of names
                try:
                    return torch.load(file, map_location="cpu", weights_only=True)
                finally:
                    is_at_end = file.tell() >= path.stat().st_size
    except UNPICKLING_FAULTS as error:
        said = str(error)
        if is_out_of_memory(error):
            raise
    # the first of the pickles in a file is a number by which torch knows its own
    is_cut = is_at_end and not is_zip and "magic number" not in said
    if not is_cut and (refused := REFUSED_CLASS.search(said)):
        raise UserError(
            f"{name} holds more than weights, namely {refused[1]}; to open that could run any program, so it is not "
            "opened: where the file comes from, save the weights alone, torch.save(model.state_dict(), ...)"
        )
    if is_cut or "PytorchStreamReader" in said or "EOF" in said or "truncated" in said:
        raise UserError(f"{name} is not a checkpoint of torch any more: it has been cut short, fetch it again")
    raise UserError(f"{name} is not a checkpoint of torch, but a pickle of something else, or it is damaged")


def _weights_in(content: Any, name: str, *, outer: str = "") -> StoredWeights:
    """Return the weights that training code has put into a file: at the top, in a part of it, or in a part of that."""
    if not isinstance(content, Mapping):
        raise UserError(f"{name} holds no weights by name, but {_describe(content)}")
    parts = [part for part in PARTS if part in content]
    for part in parts:
        inner = content[part]
        if isinstance(inner, Mapping) and inner:
            if not outer and any(isinstance(inner.get(deeper), Mapping) for deeper in PARTS):
                return _weights_in(inner, name, outer=f"{part}.")
            return StoredWeights(_as_tensors(inner, name), f"{outer}{part}")
    if parts:
        found = ", ".join(f"{part} is {_describe(content[part])}" for part in parts)
        raise UserError(f"{name} holds no weights: {found}")
    if not content:
        raise UserError(f"{name} holds no weights: it is an empty dict")
    if any(isinstance(value, Tensor) for value in content.values()):
        # an epoch or a step beside the weights is none of them
        content = {key: value for key, value in content.items() if not isinstance(value, int | float | str)}
    return StoredWeights(_as_tensors(content, name))


def _as_tensors(weights: Mapping[Any, Any], name: str) -> dict[str, Tensor]:
    tensors = {}
    for key, value in weights.items():
        array = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value
        if not isinstance(key, str) or not isinstance(array, Tensor):
            raise UserError(f"{name} is no file of weights: {key!r} in it is {_describe(value)}")
        tensors[key] = array
    return tensors


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    kind, is_empty = type(value).__name__, isinstance(value, Mapping) and not value
    return f"{'an' if kind[0] in 'aeioAEIO' else 'a'} {kind}{' of nothing' if is_empty else ''}"


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what wrappers put in front of every name, in whatever order they were put on."""
    for prefix in WRAPPER_PREFIXES * 2:
        if weights and all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights
