"""Settings of all rooms are looked at when a command begins, not only when the room is run that reads them."""

import itertools
import re
from collections.abc import Collection, Sequence

from atelier.commands import FLAGS
from errors import UserError
from pipelines.as_typed import ANY, did_you_mean, flag_of, typed_flag
from pipelines.command import choose, full_stage_name, read_options
from pipelines.overrides import STAGE_PLACEHOLDER, Setting, is_toml
from pipelines.recipe import EXTENDS, Recipe, load_recipe

# A flag, or its variable, as a word of its own.
FLAG = re.compile(r"(?<!\S)(?:--(?P<flag>[a-z-]+)(?=[=\s]|$)|(?P<variable>[A-Z][A-Z_]*)=)\S*")


def check_settings(words: Sequence[str], *, has_stages: bool) -> None:
    """Refuse settings, typed or remembered, that the rooms which read them would refuse; `words` are those of a room.

    Raises:
        UserError: a key is unknown, a value is wrong or has swallowed a flag, or a named table is of no use; names what
            it was typed in.
    """
    options = read_options("atelier", "", [*itertools.dropwhile(_is_word, words)], has_stages=has_stages)
    chosen = choose(options)
    settings = [setting for setting in chosen.settings if setting.is_kept or setting.is_remembered]
    _refuse_swallowed_flags(settings)
    # What one command alone says has the stage in it that this one is for, and is its own.
    settings = [setting for setting in settings if STAGE_PLACEHOLDER not in setting.key]
    if not settings:
        return
    # Their configurations take a moment to import.
    from atelier.keys import TABLES, tables_with

    for setting in settings:
        if "." not in setting.key and (tables := tables_with(setting.key)):
            raise UserError(f"{setting.origin}: {setting.text!r} names no table{_meant(tables, setting.key)}")
    recipe = load_recipe(chosen.recipe, settings)
    touched = {parts[0] for parts in recipe.settings}
    for table in TABLES:
        if table.name in touched:
            names = recipe.names(table.name, keys=table.model.model_fields) if table.is_named else []
            _refuse_keys_of_others(recipe, table.name, names, known=table.model.model_fields)
            recipe.check_parts(table.name, names, model=table.model)
            stage = full_stage_name(options.stage, options.phase) if has_stages and options.stage else None
            _refuse_stray_tables(recipe, table.name, names, stage=stage)


def _is_word(text: str) -> bool:
    return not text.startswith("--")


def _refuse_swallowed_flags(settings: Sequence[Setting]) -> None:
    """Refuse what is a flag or a variable of make in a text without quotes, which goes on to the next setting."""
    for setting in settings:
        if setting.is_remembered or is_toml(setting):
            continue
        for found in FLAG.finditer(setting.value):
            if (found["flag"] or flag_of(found["variable"])) in FLAGS:
                said = f"{setting.origin}: {setting.key} = {setting.value.strip()}"
                way_out = f"type it outside of {typed_flag('set', ANY)}, or the text in quotes of its own"
                raise UserError(f"{said}: {found[0]} stands in this text; {way_out}")


def _refuse_keys_of_others(recipe: Recipe, table: str, names: Sequence[str], *, known: Collection[str]) -> None:
    """Refuse a key that `table` and its named tables do not have, and other tables do."""
    from atelier.keys import tables_with

    for (first, *inner, key), setting in recipe.settings.items():
        is_own = first != table or key in known or (inner and inner[0] not in names) or key in names
        if not is_own and len(inner) < 2 and (tables := tables_with(key)):
            way_out = setting.way_out(is_value=False)
            raise UserError(f"{setting.origin}: {setting.key} is not a known key{_meant(tables, key)}{way_out}")


def _meant(tables: Sequence[str], key: str) -> str:
    *others, last = (f"{table}.{key}" for table in tables)
    return f" (did you mean {', '.join(others)}{' or ' if others else ''}{last}?)"


def _refuse_stray_tables(recipe: Recipe, table: str, names: Sequence[str], *, stage: str | None) -> None:
    """Refuse a typed table that is in no recipe, and is neither for this command nor says what it extends."""
    written = load_recipe(recipe.path).names(table, keys=())
    for (first, name, *_), setting in recipe.settings.items():
        is_stray = first == table and name in names and name not in (*written, stage)
        if is_stray and not setting.is_remembered and EXTENDS not in recipe.tables[table][name]:
            raise UserError(
                f"{setting.origin}: {setting.key}: {recipe.path} has no [{table}.{name}]{did_you_mean(name, written)}; "
                f"a new one says so, as {table}.{name}.{EXTENDS}=…"
            )
