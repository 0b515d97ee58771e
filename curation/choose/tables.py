"""The tables of `[features]` that choose samples, as this room reads them; the features room owns them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pydantic

from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.columns.choice_settings import ChoiceSettings
from pipelines.columns.choices import Choice
from pipelines.command import Command
from pipelines.raw.patterns import select_shards
from pipelines.recipe import KEYS_THAT_ARE_TABLES

KEYS = (*KEYS_THAT_ARE_TABLES, "families")


class _Caption(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    column: str
    weight: float | str = 1.0


class _Table(pydantic.BaseModel):
    """What this room reads of a table of features."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    shards: list[str] = ["*"]
    where: str | None = None
    weight: str | None = None
    weight_temperature: float | None = None
    captions: list[_Caption] = []


@dataclass(frozen=True, kw_only=True)
class ChoosingTable:
    """A table that chooses: its choice in the run, the paths of its raw shards, and weights of captions by column."""

    choice: Choice
    paths: Sequence[str]
    caption_weights: dict[str, float | str]

    @property
    def settings(self) -> ChoiceSettings:
        """Its expressions."""
        return self.choice.settings


def choosing_tables(command: Command) -> list[ChoosingTable]:
    """Return the table of the command's stage; of a command without one all tables that choose.

    Raises:
        UserError: a key is wrong, or no table chooses; names it.
    """
    recipe = command.recipe
    known = recipe.names("features", keys=KEYS)
    names = known if command.stage is None else [_table_of(command, known)]
    found = [table for name in names if (table := _read(command, name)) is not None]
    if not found:
        of = "no table of [features]" if command.stage is None else f"features.{names[0]}"
        raise UserError(
            f"{recipe.path}: {of} has a where, a weight, or captions whose weight is an expression: all samples are "
            f"trained on, and alike; write one, such as where = 'min_side >= 512', over columns that "
            f"`{typed_command('columns', {'run': command.run})}` makes"
        )
    return found


def _table_of(command: Command, known: Sequence[str]) -> str:
    """Return the table that a stage means, as for `make features`: that of its name, or that its training reads."""
    stage, recipe = command.stage_name, command.recipe
    if stage in known or stage not in recipe.names("training"):
        return stage
    return recipe.laid_over("training", stage).get("features") or stage


def _read(command: Command, name: str) -> ChoosingTable | None:
    content: dict[str, Any] = command.recipe.laid_over("features", name, keys=KEYS)
    try:
        table = _Table.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("features", name, *first["loc"])))
        raise UserError(f"{command.recipe.path}: {key}: {first['msg']}") from None
    settings = ChoiceSettings.of(name, table.model_dump())
    if settings is None:
        return None
    origin = command.recipe.blame(f"features.{name}", "shards")
    paths = select_shards(command.raw_shards, table.shards, key=f"{origin}: features.{name}.shards")
    weights = {each.column: each.weight for each in table.captions}
    return ChoosingTable(choice=Choice(command.run, settings), paths=paths, caption_weights=weights)
