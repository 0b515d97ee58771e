"""A recipe is one TOML file in flow order, one table per stage; every room validates the tables it reads."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from pipelines.raw.shards import expand_shards

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
STAGE = re.compile(r"stage\d+")
PHASES = "phases"


class TableConfig(pydantic.BaseModel):
    """A recipe table: unknown keys are errors, values are frozen, strings are not coerced to numbers or booleans."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class DataConfig(TableConfig):
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


Config = TypeVar("Config", bound=TableConfig)


class Recipe:
    """A parsed recipe file with its `--set` overrides applied; `table` gives a validated table."""

    def __init__(self, path: Path, tables: dict[str, Any]) -> None:
        self.path = path
        self.tables = tables

    def table(self, name: str, model: type[Config]) -> Config:
        """Return table `name` as `model`; the keys of all phases of its stages are checked, too.

        Raises:
            ValueError: one line per wrong key, each naming `table.key`, what is wrong and the value found.
        """
        table = self.tables.get(name, {})
        content = _without_phases(name, table)
        wrong = list(_wrong_in_phases(self.path, name, table, model))
        wrong = wrong or [_describe(self.path, name, item) for item in _errors(model, content)]
        if wrong:
            raise ValueError("\n".join(wrong))
        return model.model_validate(content)


def _errors(model: type[TableConfig], content: Any) -> Sequence[Mapping[str, Any]]:
    try:
        model.model_validate(content)
    except pydantic.ValidationError as error:
        return error.errors()
    return []


def _stages_in(name: str, table: Any) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the tables of stages by their place in table `name`, which may be a stage's itself (`training.stage3`)."""
    parent, _, last = name.rpartition(".")
    if not isinstance(table, dict):
        return {}
    if parent and STAGE.fullmatch(last):
        return {(): table}
    return {(key,): value for key, value in table.items() if STAGE.fullmatch(key) and isinstance(value, dict)}


def _put(table: dict[str, Any], place: tuple[str, ...], stage: dict[str, Any]) -> dict[str, Any]:
    return table | {place[0]: stage} if place else stage


def _without_phases(name: str, table: Any) -> Any:
    for place, stage in _stages_in(name, table).items():
        table = _put(table, place, {key: value for key, value in stage.items() if key != PHASES})
    return table


def _wrong_in_phases(path: Path, name: str, table: Any, model: type[TableConfig]) -> Iterator[str]:
    """Yield what is wrong with the keys that phases set, whichever phase is chosen."""
    for place, stage in _stages_in(name, table).items():
        bare = {key: value for key, value in stage.items() if key != PHASES}
        for phase, values in stage.get(PHASES, {}).items():
            phase_name = ".".join([name, *place, PHASES, phase])
            laid_over = _put(_without_phases(name, table), place, bare | values)
            for item in _errors(model, laid_over):
                where, key = item["loc"][: len(place)], item["loc"][len(place) :]
                if where == place and key and key[0] in values:
                    yield _describe(path, phase_name, {**item, "loc": key})


def _describe(path: Path, table: str, item: Mapping[str, Any]) -> str:
    key = ".".join([table, *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        return f"{path}: {key} is not a known key"
    if item["type"] == "missing":
        return f"{path}: {key} is missing"
    return f"{path}: {key} = {item['input']!r}: {item['msg']}"


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, stage: int | None = None, phase: str | None = None
) -> Recipe:
    """Read a recipe and apply overrides such as `training.stage2.num_steps=10`.

    An override's value is read as TOML; what is not TOML (a bare word, a path) is taken as a string. With `phase`
    the tables `[*.stageN.phases.<phase>]` of `stage` are laid over their `[*.stageN]`, as stage 3 of the paper has
    phases of rising resolution (Table 4); without `stage` those of every stage that has the phase.

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: it is not TOML, has an unknown table, two tables of a stage name different phases, the stage has
            no such phase, or an override is not `table.key=value`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist")
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    _choose_phase(tables, phase, stage=stage, path=path)
    for override in overrides:
        _apply(tables, override)
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise ValueError(f"{path}: unknown table [{unknown[0]}]; known tables are {', '.join(TABLES)}")
    return Recipe(path, tables)


def _choose_phase(tables: dict[str, Any], phase: str | None, *, stage: int | None, path: Path) -> None:
    phased = _phased_stages(tables, path)
    for key, parts in phased.items():
        _require_same_phases({f"{name}.{key}.{PHASES}": part[PHASES] for name, part in parts.items()}, path)
    if phase is None:
        return
    asked = list(phased) if stage is None else [f"stage{stage}"]
    parts = [part for key in asked for part in phased.get(key, {}).values()]
    known = list(dict.fromkeys(name for part in parts for name in part[PHASES]))
    if phase not in known:
        of_stage = "" if stage is None else f" of stage {stage}"
        raise ValueError(f"{path}: there is no phase {phase!r}{of_stage}; phases are {', '.join(known) or 'none'}")
    for part in parts:
        # Phases stay in their table, so that its room checks all of them.
        part.update(part[PHASES].get(phase, {}) | {PHASES: part[PHASES]})


def _phased_stages(tables: dict[str, Any], path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the tables that have phases, by stage (`stage3`) and by the table they are part of (`training`)."""
    phased: dict[str, dict[str, dict[str, Any]]] = {}
    for name, table in tables.items():
        for (key,), part in _stages_in(name, table).items():
            phases = part.get(PHASES, {})
            if not isinstance(phases, dict) or not all(isinstance(values, dict) for values in phases.values()):
                raise ValueError(f"{path}: {name}.{key}.{PHASES} = {phases!r} does not hold a table for each phase")
            if phases:
                phased.setdefault(key, {})[name] = part
    return phased


def _require_same_phases(phases: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Refuse a phase that one table of a stage has and another lacks: there the stage's own values would be taken."""
    (first, expected), *others = phases.items()
    for name, found in others:
        if found.keys() != expected.keys():
            raise ValueError(
                f"{path}: [{first}] has {', '.join(expected)}, but [{name}] has {', '.join(found)}; "
                "both need the same phases, and one that changes nothing there is an empty table"
            )


def _apply(tables: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *parents, key = dotted.strip().split(".")
    if not equals or not parents or not key:
        raise ValueError(f"--set {override!r} is not of the form table.key=value")
    if PHASES in [*parents, key][2:3] and STAGE.fullmatch(parents[1]):
        raise ValueError(f"--set {override!r}: choose the phase with --phase and set {'.'.join(parents[:2])}.key")
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
