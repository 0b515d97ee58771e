"""A recipe is one TOML file in flow order, one table per stage; every room validates the tables it reads."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from pipelines.shards import expand_shards

TABLES = (
    "data",
    "toyworld",
    "engine",
    "captioning",
    "dataset_stats",
    "features",
    "model",
    "training",
    "sampling",
    "evaluation",
    "app",
)


class StageConfig(pydantic.BaseModel):
    """A recipe table: unknown keys are errors, values are frozen, strings are not coerced to numbers or booleans."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class DataConfig(StageConfig):
    """`[data]`: where the raw shards are and how their members are to be read."""

    shards: str | list[str] = pydantic.Field(
        description="Raw shards: brace ranges, globs, folders or fsspec URLs; `{run}` stands for the run's folder"
    )
    dialect: str = pydantic.Field(
        default="auto",
        pattern="^(auto|img2dataset|sa1b|imagenet|generic)$",
        description="Layout of the tars; auto looks at their members",
    )
    max_pixels: int = pydantic.Field(
        default=89_478_485,
        ge=1,
        description="Largest image that is decoded, in pixels; larger ones are rejected",
    )

    def paths(self, run: Path) -> list[str]:
        """Return the raw shards of a run, sorted by name, with `{run}` filled in; raises as `expand_shards` does."""
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        return expand_shards([pattern.replace("{run}", str(run)) for pattern in patterns])


Config = TypeVar("Config", bound=StageConfig)


class Recipe:
    """A parsed recipe file with its `--set` overrides applied; `table` gives a validated table."""

    def __init__(self, path: Path, tables: dict[str, Any]) -> None:
        self.path = path
        self.tables = tables

    def table(self, name: str, model: type[Config]) -> Config:
        """Return table `name` as `model`.

        Raises:
            ValueError: one line per wrong key, each naming `table.key`, what is wrong and the value found.
        """
        try:
            return model.model_validate(self.tables.get(name, {}))
        except pydantic.ValidationError as error:
            raise ValueError("\n".join(_describe(self.path, name, item) for item in error.errors())) from None


def _describe(path: Path, table: str, item: Mapping[str, Any]) -> str:
    key = ".".join([table, *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        return f"{path}: {key} is not a known key"
    if item["type"] == "missing":
        return f"{path}: {key} is missing"
    return f"{path}: {key} = {item['input']!r}: {item['msg']}"


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, phase: str | None = None) -> Recipe:
    """Read a recipe and apply overrides such as `training.stage2.num_steps=10`.

    An override's value is read as TOML; what is not TOML (a bare word, a path) is taken as a string. With `phase`
    the tables `[*.stageN.phases.<phase>]` are laid over their `[*.stageN]`, as stage 3 of the paper has phases of
    rising resolution (Table 4).

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: it is not TOML, has an unknown table or no such phase, or an override is not `table.key=value`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist")
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    _choose_phase(tables, phase, path=path)
    for override in overrides:
        _apply(tables, override)
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise ValueError(f"{path}: unknown table [{unknown[0]}]; known tables are {', '.join(TABLES)}")
    return Recipe(path, tables)


def _choose_phase(tables: dict[str, Any], phase: str | None, *, path: Path) -> None:
    known: set[str] = set()
    for table in [table for table in tables.values() if isinstance(table, dict)]:
        for stage in [value for value in table.values() if isinstance(value, dict)]:
            phases = stage.pop("phases", {})
            known |= phases.keys()
            stage.update(phases.get(phase, {}))
    if phase is not None and phase not in known:
        raise ValueError(f"{path}: there is no phase {phase!r}; phases are {', '.join(sorted(known)) or 'none'}")


def _apply(tables: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *parents, key = dotted.strip().split(".")
    if not equals or not parents or not key:
        raise ValueError(f"--set {override!r} is not of the form table.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node: Any = tables
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"--set {override!r}: {parent} is a value, not a table")
    node[key] = value
