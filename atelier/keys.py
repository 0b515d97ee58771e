"""`atelier recipe [TABLE]`: every key of a recipe, with its default, its meaning and the commands that read it."""

import argparse
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import annotated_types
import pydantic
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from captioning.config import CaptioningConfig
from curation.config import ColumnsConfig
from dataset_stats.config import DatasetStatsConfig
from errors import UserError
from features.config import FeaturesConfig
from pipelines.as_typed import did_you_mean
from pipelines.command import run_command
from pipelines.engine.run import EngineConfig
from pipelines.recipe import DataConfig, ModelConfig, TableConfig
from pipelines.wrong_keys import table_of
from sampling.config import AppConfig, SamplingConfig
from sampling.evaluation.config import EvaluationConfig
from toyworld.config import ToyworldConfig
from training.config import StageTraining

# As wide as a terminal is at most that people read lines in.
MAX_WIDTH = 120
# Of a default: a prompt or a list of phrases is not read here.
MAX_CHARACTERS = 60
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
BOUNDS = {
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Gt: ("gt", "more than"),
    annotated_types.Le: ("le", "at most"),
    annotated_types.Lt: ("lt", "less than"),
}


@dataclass(frozen=True, kw_only=True)
class RecipeTable:
    """A table of a recipe: its keys, and the sub-commands that read them."""

    name: str
    model: type[TableConfig]
    readers: tuple[str, ...]
    is_named: bool = False

    @property
    def title(self) -> str:
        """How it is written in a recipe; keys of named tables may stand above all of them, too."""
        return f"[{self.name}.<name>] or [{self.name}]" if self.is_named else f"[{self.name}]"


TABLES = (
    RecipeTable(
        name="data", model=DataConfig, readers=("caption", "claims", "columns", "stats", "features", "buckets")
    ),
    RecipeTable(name="toyworld", model=ToyworldConfig, readers=("world", "judge", "report")),
    RecipeTable(
        name="engine",
        model=EngineConfig,
        readers=("caption", "claims", "columns", "stats", "features", "sample", "eval"),
    ),
    RecipeTable(name="captioning", model=CaptioningConfig, readers=("caption", "claims")),
    RecipeTable(name="columns", model=ColumnsConfig, readers=("columns",)),
    RecipeTable(name="dataset_stats", model=DatasetStatsConfig, readers=("stats",)),
    RecipeTable(name="features", model=FeaturesConfig, readers=("features", "buckets", "train"), is_named=True),
    RecipeTable(name="model", model=ModelConfig, readers=("train", "features", "buckets")),
    RecipeTable(name="training", model=StageTraining, readers=("train",), is_named=True),
    RecipeTable(name="sampling", model=SamplingConfig, readers=("sample", "eval", "app")),
    RecipeTable(name="evaluation", model=EvaluationConfig, readers=("eval",)),
    RecipeTable(name="app", model=AppConfig, readers=("app",)),
)


def tables_with(key: str) -> list[str]:
    """Return the names of the tables that have a key."""
    return [table.name for table in TABLES if key in table.model.model_fields]


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key below its table; `default` as TOML would have it, None where the key must be written."""

    name: str
    default: str | None
    meaning: str


def keys_of(model: type[pydantic.BaseModel], *, prefix: str = "") -> Iterator[Key]:
    """Yield every key of a table, and in its place those of a table in it: of each in a list, or by any name."""
    for name, field in model.model_fields.items():
        inner = table_of(field.annotation)
        if inner is None:
            default = None if field.is_required() else written(field.get_default(call_default_factory=True))
            yield Key(name=f"{prefix}{name}", default=default, meaning=_meaning(field))
        else:
            yield from keys_of(inner, prefix=f"{prefix}{name}{_of_each(field.annotation)}.")


def _of_each(annotation: Any) -> str:
    """Return how each of several tables in a key is named; nothing where the key is one table."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return next((found for part in typing.get_args(annotation) if (found := _of_each(part))), "")
    return {list: "[]", dict: ".<name>"}.get(origin or type(None), "")


def _meaning(field: Any) -> str:
    bounds = [
        f"{words} {getattr(note, attribute):g}"
        for note in field.metadata
        for kind, (attribute, words) in BOUNDS.items()
        if isinstance(note, kind)
    ]
    return f"{field.description} ({', '.join(bounds)})" if bounds else str(field.description)


def written_key(part: str) -> str:
    """Return a part of a key as TOML has it: in quotes where it needs them."""
    return part if BARE_KEY.fullmatch(part) else written(part)


def written(value: Any) -> str:
    """Return a value as TOML has it, and `null` for None, which it has not."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            # JSON escapes what TOML does, but for one control character.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(map(written, value))}]"
        case dict():
            return (
                f"{{ {', '.join(f'{written_key(key)} = {written(item)}' for key, item in value.items())} }}"
                if value
                else "{}"
            )
        case _:
            return str(value)


def show(table: RecipeTable, console: Console) -> None:
    """Print the keys of a table: each with its default, and below it what it means."""
    console.print(Text(f"{table.title}  read by {', '.join(table.readers)}", style="bold"), soft_wrap=True)
    for key in keys_of(table.model):
        value = ", to be written" if key.default is None else f" = {key.default[:MAX_CHARACTERS]}"
        value += " …" if key.default is not None and len(key.default) > MAX_CHARACTERS else ""
        console.print(Padding(Text.assemble((key.name, "bold"), value), (0, 0, 0, 2)))
        console.print(Padding(Text(key.meaning), (0, 0, 0, 6)))
    console.print()


def main() -> None:
    """Print all tables, or those that are named."""
    parser = argparse.ArgumentParser(prog="atelier recipe", description="Every key of a recipe.", allow_abbrev=False)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="captioning, training, …; all when none is named")
    typed = " ".join(parser.parse_args().tables).split()
    wanted = [name.strip("[],").partition(".")[0] for name in typed]
    by_name = {table.name: table for table in TABLES}
    for name in wanted:
        if name not in by_name:
            raise UserError(
                f"there is no table [{name}]; the tables are {', '.join(by_name)}{did_you_mean(name, by_name)}"
            )
    console = Console(highlight=False)
    console = Console(highlight=False, width=min(console.width, MAX_WIDTH))
    for table in [by_name[name] for name in wanted] or TABLES:
        show(table, console)


if __name__ == "__main__":
    sys.exit(run_command("recipe", main))
