"""What is wrong with a table of a recipe, key by key, in words that say how it is mended."""

import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pydantic

from pipelines.as_typed import did_you_mean

# Where pydantic's words do not tell what is to be written.
PLAIN_WORDS = {
    "sequence_str": 'Input should be a valid list, such as ["x"]',
    "bool_type": "Input should be true or false",
    "list_type": "Input should be a valid list, in [brackets]",
    "dict_type": "Input should be a table of keys, in {braces}",
    "model_type": "Input should be a table of keys, in {braces}",
}
# A pattern that is a choice of words.
CHOICE = re.compile(r"\^\(([\w.-]+(?:\|[\w.-]+)+)\)\$")
MAX_SHOWN = 200


def wrong_items(model: type[pydantic.BaseModel], content: Any) -> list[dict[str, Any]]:
    """Return what pydantic finds wrong with a table, one error per key of `content`.

    It has one for each type that the key's value may have. Places inside the value win, for they are of the type that
    was meant.
    """
    try:
        model.model_validate(content)
    except pydantic.ValidationError as error:
        return _without_choices(error.errors(), content)
    return []


def _without_choices(errors: Sequence[Mapping[str, Any]], content: Any) -> list[dict[str, Any]]:
    keys: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for error in errors:
        key, place = _place(error["loc"], content)
        keys.setdefault(key, []).append({**error, "loc": place})
    items = []
    for found in keys.values():
        depth = max(len(item["loc"]) for item in found)
        deepest = [item for item in found if len(item["loc"]) == depth]
        messages = [plain_message(item) for item in deepest]
        others = [message.removeprefix("Input should be ") for message in dict.fromkeys(messages)][1:]
        items.append(deepest[0] | {"msg": " or ".join([messages[0], *others])})
    return items


def _place(location: Sequence[str | int], content: Any) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Return the keys of an error's location up to the first name of a type, and all of them without such names."""
    place, key = [], None
    for part in location:
        if isinstance(content, dict):
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int):
            content = content[part] if part < len(content) else None  # of a list that is too short
        else:
            key = tuple(place) if key is None else key
            continue
        place.append(part)
    return tuple(place) if key is None else key, tuple(place)


def plain_message(error: Mapping[str, Any]) -> str:
    """Return what an error of pydantic says, without pydantic's own words in front of ours, or about its own types."""
    if error["type"] == "string_pattern_mismatch" and (choice := CHOICE.fullmatch(error["ctx"]["pattern"])):
        *words, last = (repr(word) for word in choice[1].split("|"))
        return f"Input should be {', '.join(words)} or {last}"
    return str(PLAIN_WORDS.get(error["type"]) or error["msg"]).removeprefix("Value error, ")


def describe_item(
    table: str, item: Mapping[str, Any], model: type[pydantic.BaseModel], *, renamed: Mapping[str, str]
) -> str:
    """Return what is wrong with a key of `table`, whose keys are those of `model`.

    Args:
        table: name of the table, as `training.stage2`.
        item: one of `wrong_items`.
        model: says which keys there are.
        renamed: new names of keys that had another one.
    """
    location = item["loc"]
    key = ".".join([table, *map(str, location)])
    first = str(location[0]) if location else ""
    if item["type"] == "extra_forbidden":
        if first in renamed:
            return f"{key} is called {renamed[first]} now"
        known = fields_at(model, location[:-1])
        prefix = ".".join([table, *map(str, location[:-1])])
        return f"{key} is not a known key{did_you_mean(str(location[-1]), known, prefix=f'{prefix}.')}"
    if item["type"] == "missing":
        field = model.model_fields.get(first)
        return f"{key} is missing{f': {field.description}' if field is not None and len(location) == 1 else ''}"
    if not location:
        return f"{key}: {item['msg']}"
    value = repr(item["input"])
    # A whole table would hide what is wrong with it.
    return f"{key} = {value}: {item['msg']}" if len(value) <= MAX_SHOWN else f"{key}: {item['msg']}"


def fields_at(model: type[pydantic.BaseModel], location: Sequence[str | int]) -> Collection[str]:
    """Return the keys of the table at a place inside a table of the keys of `model`; none where it is no table."""
    found: Any = model
    for part in location:
        if isinstance(found, type) and issubclass(found, pydantic.BaseModel):
            field = found.model_fields.get(str(part))
            found = None if field is None else table_of(field.annotation)
        # Names of a table of tables, and numbers of a list, lead to the table that all of them are.
    return found.model_fields if isinstance(found, type) and issubclass(found, pydantic.BaseModel) else ()


def table_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    """Return the table that an annotation holds, by itself, in a list, by names, or with others to choose from."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, pydantic.BaseModel) else None
    found = (table_of(part) for part in typing.get_args(annotation))
    return next((table for table in found if table is not None), None)
