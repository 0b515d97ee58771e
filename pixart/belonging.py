"""What files of weights that are nothing by themselves, adapters and control branches, say of what they belong to."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from errors import UserError
from pixart.processes.specs import predicts_alike, process_title

# In the header of our files: what they belong to, as JSON.
METADATA = "pixart_atelier"


def read_header(file: Path) -> dict[str, str]:
    """Return what stands in the header of a safetensors file beside the tensors; nothing of any other file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError:
        return {}


def belonging_of(header: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Return what the header of a file says that it belongs to: `base`, `process` and more; nothing of others' files.

    Raises:
        UserError: it is damaged; names the file.
    """
    known = parse_note(header.get(METADATA), file)
    base, process = known.get("base"), known.get("process")
    is_whole = isinstance(base, dict) and {"identity", "location", "adapters"} <= base.keys()
    if known and not (is_whole and isinstance(process, dict) and "name" in process):
        raise UserError(f"{file}: what its header says of the weights that it belongs to is not whole: make it again")
    return known


def parse_note(text: str | None, file: Path) -> dict[str, Any]:
    """Return the JSON object that a file has in its header, an empty one of none.

    Raises:
        UserError: it is no JSON object; names the file.
    """
    try:
        content = json.loads(text or "{}")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file}: what its header says of what it belongs to is no JSON: fetch or make it again")
    return content


def compare_base(
    path: Path,
    known: Mapping[str, Any],
    *,
    title: str,
    location: str,
    identity: str,
    adapters: Collection[str],
    process: Mapping[str, Any],
) -> list[str]:
    """Return what is odd about adding a file to weights, by what it says of those it was trained on.

    Args:
        path: of the file.
        known: what it says that it belongs to, nothing of files of others.
        title: what people call the weights.
        location: where they are.
        identity: hash of them, without that of any adapters.
        adapters: hashes of those that they have.
        process: the spec of the one that they were trained with.

    Raises:
        UserError: it was trained with a process that predicts something else; names both.
    """
    if not known:
        return []
    if not predicts_alike(trained := known["process"], process):
        raise UserError(
            f"{path} was trained with process {process_title(trained)}, but {title} with {process_title(process)}"
        )
    base = known["base"]
    if base["identity"] != identity:
        return [
            f"{path} was trained on the weights of {base['location']}, and is added to others, of "
            f"{location}: what it has learnt may not show as there"
        ]
    if lacking := [item["location"] for item in base["adapters"] if item.get("identity") not in adapters]:
        others = ", ".join(lacking)
        return [f"{path} was trained on its base with {others}: add that, too, to draw as there"]
    return []
