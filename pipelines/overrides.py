"""What is typed over a recipe's keys: `table.key=value`, one or several, with values in TOML or as plain text."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errors import UserError
from pipelines.as_typed import flag_of, typed_flag

STAGE_PLACEHOLDER = "{stage}"
KEY = r"""(?:[\w{}*?-]+|"[^"]*"|'[^']*')"""
# A dot outside quotes.
DOT = re.compile(r"""\.(?=(?:[^"']|"[^"]*"|'[^']*')*$)""")
# Where one of several settings begins; a value may hold spaces, and a word such as `a==b`.
SETTING = re.compile(rf"(?<!\S)[A-Za-z_][\w-]*(?:\.{KEY})+[ \t]*=(?!=)")
# What TOML closes again, so that a value may hold what looks like another setting.
QUOTES, BRACKETS = ('"', "'"), {"[": "]", "{": "}"}
OPENING = (*QUOTES, *BRACKETS)
NO_VALUE = object()
# What a command calls a setting of its own, in front of it.
NAME = re.compile(r"([A-Z][A-Z_]*):")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A `table.key=value` that is laid over a recipe, and what to blame for it.

    Attributes:
        text: as it was typed; `{stage}` in its key stands for the chosen stage.
        origin: where it was typed, as errors name it: `--set`, `GPUS (--gpus)`, or the file that remembers it.
        is_text: whether the value is taken as it is.
        is_kept: whether it is remembered for the run.
        is_remembered: whether it is recalled of the run, from the file that `origin` names.
    """

    text: str
    origin: str = "--set"
    is_text: bool = False
    is_kept: bool = True
    is_remembered: bool = False

    @property
    def key(self) -> str:
        """What is before the first `=` outside its quotes; a part has quotes only where it needs them."""
        return ".".join(_plain_part(part) for part in DOT.split(_at_equals(self.text)[0].strip()))

    def key_of_stage(self, stage: str | None) -> str:
        """Return the key with the name of a stage for `{stage}`."""
        return self.key.replace(STAGE_PLACEHOLDER, stage or "")

    def way_out(self, *, is_value: bool) -> str:
        """Return what to do where it is wrong and was not typed now, else nothing; `is_value`: its key is right."""
        other = ", or type another value" if is_value else ""
        return f"; take it out of {self.origin}{other}" if self.is_remembered else ""

    @property
    def value(self) -> str:
        """What is behind that."""
        return _at_equals(self.text)[2]


def named_setting(text: str, *, is_text: bool = False) -> Setting:
    """Return `[NAME:]table.key=value` as a setting of one command, which is not remembered; NAME is its variable."""
    name = NAME.match(text)
    origin = "--text" if is_text else "--once"
    if name is not None:
        origin = typed_flag(flag_of(name[1]))
    return Setting(text=text if name is None else text[name.end() :], origin=origin, is_text=is_text, is_kept=False)


def split_settings(text: str) -> list[str]:
    """Return each `table.key=value` of a text of several: one ends where the next begins.

    So a value may hold spaces, without quotes; what looks like another setting belongs to it where it is in quotes or
    brackets of TOML.
    """
    starts = [match.start() for match in SETTING.finditer(text)]
    if text[: starts[0] if starts else None].strip():
        starts.insert(0, 0)
    settings = []
    while starts:
        first = starts.pop(0)
        ends = [*starts, len(text)]
        num_inside = _num_inside(text, first, ends)
        settings.append(text[first : ends[num_inside]].rstrip())
        del starts[:num_inside]
    return settings


def _num_inside(text: str, first: int, ends: Sequence[int]) -> int:
    """Return how many of the settings that seem to begin behind `first` are inside its value."""
    values = [text[first:end].partition("=")[2].strip() for end in ends]
    if not values[0].startswith(OPENING):
        return 0
    return next((number for number, value in enumerate(values) if _toml_value(value) is not NO_VALUE), 0)


def is_toml(setting: Setting) -> bool:
    """Whether the value is one of TOML, and so as long as it was meant to be."""
    return not setting.is_text and _toml_value(setting.value) is not NO_VALUE


def apply_setting(tables: dict[str, Any], setting: Setting, *, stage: str | None) -> tuple[str, ...]:
    """Put the value of a setting into `tables`, and return the parts of its key; `{stage}` in it stands for `stage`.

    The value is read as TOML; what is not one value of TOML (a bare word, a path, a text with a comment behind it), or
    is given as text, is taken as it is. A part of the key may stand in quotes, as in TOML.

    Raises:
        UserError: it is not `table.key=value`, a part of its key is a value, no stage is chosen that it could mean, or
            its value begins with a quote and is no text in quotes, or with a bracket that is not closed.
    """
    dotted = setting.key
    if STAGE_PLACEHOLDER in dotted:
        dotted = _with_stage(setting, stage, tables)
    *parents, key = [part.strip("\"'") for part in DOT.split(dotted)]
    if "=" not in setting.text or not parents or not all((*parents, key)):
        raise UserError(f"{setting.origin}: {setting.text!r} is not of the form table.key=value")
    value = setting.value if setting.is_text else _read_value(setting)
    node: Any = tables
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            way_out = setting.way_out(is_value=False)
            raise UserError(f"{setting.origin}: {setting.text!r}: {parent} is a value, not a table{way_out}")
    node[key] = value
    return (*parents, key)


def _at_equals(setting: str) -> tuple[str, str, str]:
    """Return what stands before the first `=` outside quotes of the key, that, and what is behind it."""
    match = re.match(rf"\s*{KEY}(?:\.{KEY})*[ \t]*=", setting)
    if match is None:
        return setting.partition("=")
    return setting[: match.end() - 1], "=", setting[match.end() :]


def _plain_part(part: str) -> str:
    inside = part[1:-1]
    is_quoted = len(part) > 1 and part[0] in QUOTES and part[-1] == part[0]
    if not is_quoted or (part[0] == "'" and '"' in inside):
        return part
    return inside if re.fullmatch(KEY, inside) else f'"{inside}"'


def _read_value(setting: Setting) -> Any:
    value, text = _toml_value(setting.value), setting.value.strip()
    if value is not NO_VALUE:
        return value
    if wrong := _unclosed(text):
        raise UserError(
            f"{setting.origin}: {setting.key} = {text}: {wrong}; a text that begins so stands in quotes as a whole, as "
            "in TOML"
        )
    # As in TOML, a space in front of the equals sign has one behind it.
    return setting.value.lstrip() if _at_equals(setting.text)[0].endswith((" ", "\t")) else setting.value


def _unclosed(text: str) -> str | None:
    """Return what is wrong with a text that begins as a string, list or table of TOML does, and is none."""
    first = text[:1]
    if first in QUOTES and first not in text[1:]:
        return f"the quote {first} is not closed"
    if first in QUOTES and text.endswith(first):
        return f"between the first {first} and the last one is another, or a \\ that means nothing"
    if first in QUOTES:
        return f"behind the last {first} stands {text.rpartition(first)[2].strip()}, which is no table.key=value"
    closing = BRACKETS.get(first)
    if closing and text.count(first) != text.count(closing):
        return f"the bracket {first} is not closed"
    return None


def _with_stage(setting: Setting, stage: str | None, tables: dict[str, Any]) -> str:
    said = f"{setting.origin}: {setting.text!r}"
    if stage is None:
        raise UserError(f"{said}: no stage is chosen that {STAGE_PLACEHOLDER} could stand for")
    table = setting.key.partition(".")[0]
    if stage not in tables.get(table, {}):
        raise UserError(f"{said}: there is no [{table}.{stage}]")
    return setting.key.replace(STAGE_PLACEHOLDER, stage)


def _toml_value(text: str) -> Any:
    """Return the one value of TOML that `text` is, or NO_VALUE.

    Read as the first of a list, for behind a key a comment would be taken away, and further keys in further lines.
    """
    try:
        values = tomllib.loads(f"value = [{text}, 0]")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return NO_VALUE
    return values[0] if len(values) == 2 else NO_VALUE
