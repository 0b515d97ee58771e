"""Files of weights as people have them: which of them a folder holds, and what is no file of anybody's.

Names are those of diffusers: `<stem>.safetensors`, `<stem>.bin`, the same in pieces with an index, and all of these
with a variant (`fp16`) in the name. Nothing here needs torch; `tensor_files.py` reads what is in them.
"""

import json
import re
from pathlib import Path
from typing import Any

from errors import MissingFileError, StorageError, UserError, describe_storage_error, describe_unfetched

WEIGHTS_NAME = "diffusion_pytorch_model"
# Of files that training code leaves; what ends so is no folder and no id on the hub.
ORIGINAL_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def is_original_name(name: str) -> bool:
    """Whether a path or name is called as a file of training code is, in any case."""
    return name.lower().endswith(ORIGINAL_SUFFIXES)


def find_weight_files(folder: Path, stem: str = WEIGHTS_NAME) -> list[Path]:
    """Return the files that hold a folder's weights: one, or the pieces of an index.

    Plain names come before those of a variant, and safetensors before pickles.

    Raises:
        MissingFileError: there are none, or a piece of the index is missing.
        UserError: there are several variants and no plain weights, or the index is damaged or names files elsewhere.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    variant, index = r"(?:\.(\w+))??", r"\.index"
    pattern = re.compile(rf"{re.escape(stem)}{variant}\.(safetensors|bin)(?:{variant}{index}{variant}\.json)?")
    found: dict[tuple[str, int, bool], str] = {}  # by variant, format and whether it is one file
    for name in names:
        if match := pattern.fullmatch(name):
            called = match[1] or match[3] or match[4] or ""
            found[called, ("safetensors", "bin").index(match[2]), not name.endswith(".json")] = name
    variants = sorted({variant for variant, _, _ in found})
    if not variants:
        raise MissingFileError(f"{folder} holds no {stem}.safetensors or .bin{_instead(folder, names, stem)}")
    if variants[0] and len(variants) > 1:
        raise UserError(f"{folder} holds weights as {' and as '.join(variants)}: keep the files of one of them")
    name = found[min(kind for kind in found if kind[0] == variants[0])]
    return _pieces(folder / name) if name.endswith(".json") else [folder / name]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of others.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is cut short or holds something else; names it.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist")
    read_head(path, str(path))
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON or has been cut short ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object of settings")
    return content


def _pieces(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{index} has no weight_map that says which file holds what")
    names = sorted(set(places.values()))
    if elsewhere := [name for name in names if Path(name).name != name or "\\" in name]:
        raise UserError(f"{index} names {elsewhere[0]!r}, which is no name of a file beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise MissingFileError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files that {index.name} names: {some}; "
            "fetch the folder again"
        )
    return [index.parent / name for name in names]


def _instead(folder: Path, names: list[str], stem: str) -> str:
    """Say what a folder without weights may hold in their place."""
    pieces = [name for name in names if re.match(rf"{re.escape(stem)}.*-\d+-of-\d+", name)]
    if pieces:
        return f", but {pieces[0]} without the index (.index.json) of the pieces"
    return describe_originals(folder) if folder.is_dir() else ": there is no such folder"


def describe_originals(folder: Path) -> str:
    """Return what to do about a folder of no model that holds an original file; nothing if it holds none."""
    originals = sorted(path.name for path in folder.glob("*") if is_original_name(path.name))
    return f", but {originals[0]}: if that is an original file, name it and not the folder" if originals else ""


def read_head(path: Path, name: str) -> bytes:
    """Return the first bytes of a file, and refuse what is no file of anybody's settings or weights."""
    if path.is_dir():
        raise UserError(f"{name} is a folder, where a file is meant")
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        raise MissingFileError(f"{name} does not exist") from None
    except OSError as error:
        raise StorageError(describe_storage_error(error, path) or f"{name} cannot be read: {error}") from None
    if (fault := describe_unfetched(head)) is not None:
        raise UserError(f"{name} {fault}")
    return head
