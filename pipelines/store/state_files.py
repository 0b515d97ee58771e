"""The house's own JSON files of state, read in one way: a damaged one is named, with what to do about it."""

import dataclasses
import functools
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from errors import MissingFileError, UserError

T = TypeVar("T")


def read_state(path: Path, *, mend: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON object in a file that the house has written; `mend` says what to do when it is damaged.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is cut short, is no JSON object, or lacks one of `keys`, or has another type there if they are a
            mapping to types; names the file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist; {mend}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, where a file should be; {mend}") from None
    return parse_state(data, where=str(path), mend=mend, keys=keys)


def parse_state(data: bytes, *, where: str, mend: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON object in `data`, read from the file or URL `where`; raises as `read_state` does."""
    content, damage = _parse(data, keys)
    if damage is not None:
        raise UserError(f"{where} {damage}; {mend}")
    return content


def state_damage(path: Path, *, keys: Collection[str] = ()) -> str | None:
    """Return what is wrong with a file that `read_state` would refuse, such as "is empty"; None if nothing is."""
    try:
        return _parse(path.read_bytes(), keys)[1]
    except FileNotFoundError:
        return "does not exist"
    except IsADirectoryError:
        return "is a folder, where a file should be"


def _parse(data: bytes, keys: Collection[str]) -> tuple[dict[str, Any], str | None]:
    """Return the object in a file, and what is wrong with it."""
    try:
        content = json.loads(data.decode("utf-8-sig"))  # as editors of Windows write it
    except (ValueError, RecursionError) as error:
        return {}, f"is damaged ({error})" if data else "is empty"
    if not isinstance(content, dict):
        return {}, f"is damaged: it holds a {type(content).__name__}, not an object"
    if missing := sorted(set(keys) - content.keys()):
        return {}, f"is damaged: it lacks {', '.join(missing)}"
    for key, kind in keys.items() if isinstance(keys, Mapping) else ():
        if not isinstance(content[key], kind):
            return {}, f"is damaged: {key} is a {type(content[key]).__name__}"
    return content, None


def state_of(form: type[T], content: Any, *, where: str, mend: str) -> T:
    """Return JSON values as a `form`, such as a dataclass or `dict[str, str]`.

    Raises:
        UserError: a value is missing, unknown or of another type; names `where` it was read and the value.
    """
    if damage := form_damage(form, content):
        raise UserError(f"{where} {damage}; {mend}")
    return _adapter(form).validate_python(content)


def form_damage(form: Any, content: Any) -> str | None:
    """Return why `state_of` would refuse JSON values as a `form`; None if it would not."""
    names = {field.name for field in dataclasses.fields(form)} if dataclasses.is_dataclass(form) else None
    if names is not None and isinstance(content, dict) and (unknown := sorted(content.keys() - names)):
        return f"is damaged, or of another version: {unknown[0]} is not known"
    try:
        _adapter(form).validate_python(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"is damaged, or of another version: {f'{place}: ' if place else ''}{first['msg']}"
    return None


@functools.cache
def _adapter(form: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(form)


def log_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each record of a log of one JSON object a line, and before it the line; raises as `read_log` does."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist") from None
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield line, record


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log of one JSON object a line; a line that a killed writer has torn is left out.

    Raises:
        MissingFileError: there is no such file.
    """
    for _, record in log_lines(path):
        yield record


def read_records(path: Path, *, mend: str, keys: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the records of a table of one JSON object a line, of which none may be missing.

    Raises:
        MissingFileError: there is no such file.
        UserError: a line is no JSON object, or lacks one of `keys`; names file and line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist; {mend}") from None
    return [
        parse_state(line, where=f"{path}, line {number}", mend=mend, keys=keys) for number, line in enumerate(lines, 1)
    ]
