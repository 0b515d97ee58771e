"""Settings of all rooms are looked at when a command begins, not only when the room is run that reads them."""

import itertools
from collections.abc import Sequence

from errors import UserError
from pipelines.as_typed import did_you_mean
from pipelines.command import choose, full_stage_name, read_options
from pipelines.overrides import STAGE_PLACEHOLDER
from pipelines.recipe import EXTENDS, Recipe, load_recipe


def check_settings(words: Sequence[str], *, has_stages: bool) -> None:
    """Refuse settings, typed or remembered, that the rooms which read them would refuse; `words` are those of a room.

    Raises:
        UserError: a key is unknown, a value is wrong, or a named table is of no use; names what it was typed in.
    """
    options = read_options("atelier", "", [*itertools.dropwhile(_is_word, words)], has_stages=has_stages)
    chosen = choose(options)
    settings = [setting for setting in chosen.settings if setting.is_kept or setting.is_remembered]
    # What one command alone says has the stage in it that this one is for, and is its own.
    settings = [setting for setting in settings if STAGE_PLACEHOLDER not in setting.key]
    if not settings:
        return
    # Their configurations take a moment to import.
    from atelier.keys import TABLES

    recipe = load_recipe(chosen.recipe, settings)
    touched = {parts[0] for parts in recipe.settings}
    for table in TABLES:
        if table.name in touched:
            names = recipe.names(table.name, keys=table.model.model_fields) if table.is_named else []
            recipe.check_parts(table.name, names, model=table.model)
            stage = full_stage_name(options.stage, options.phase) if has_stages and options.stage else None
            _refuse_stray_tables(recipe, table.name, names, stage=stage)


def _is_word(text: str) -> bool:
    return not text.startswith("--")


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
