"""The house's own JSON files of state, read in one way: a damaged one is named, with what to do about it."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError


def read_state(path: Path, *, mend: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON object in a file that the house has written; `mend` says what to do when it is damaged.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is cut short, is no JSON object, or lacks one of `keys`; names the file.
    """
    content, damage = _read(path, keys)
    if damage is None:
        return content
    if content is None:
        raise MissingFileError(f"{path} {damage}; {mend}")
    raise UserError(f"{path} {damage}; {mend}")


def state_damage(path: Path, *, keys: Collection[str] = ()) -> str | None:
    """Return what is wrong with a file that `read_state` would refuse, such as "is empty"; None if nothing is."""
    return _read(path, keys)[1]


def _read(path: Path, keys: Collection[str]) -> tuple[Any, str | None]:
    """Return the content of a file, None if there is none, and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, "does not exist"
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return {}, "is empty" if path.stat().st_size == 0 else f"is damaged ({error})"
    if not isinstance(content, dict):
        return {}, f"is damaged: it holds a {type(content).__name__}, not an object"
    if missing := sorted(set(keys) - content.keys()):
        return {}, f"is damaged: it lacks {', '.join(missing)}"
    return content, None


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log of one JSON object a line; a line that a killed writer has torn is left out.

    Raises:
        MissingFileError: there is no such file.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist") from None
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
