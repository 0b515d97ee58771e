"""A recipe is one TOML file in flow order, one table per room; every room validates the tables it reads.

`[training]` and `[features]` hold named tables beside their keys: `[training.stage2]` is a stage called `stage2`. The
keys of `[training]` itself are shared: every named table is laid over them, or over another one that it `extends`.
"""

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
import pydantic_core

from errors import MissingFileError, UserError
from pipelines.as_typed import ANY, did_you_mean, typed_flag
from pipelines.overrides import STAGE_PLACEHOLDER, Setting, apply_setting
from pipelines.raw.patterns import expand_shards
from pipelines.raw.reading import Reading
from pipelines.wrong_keys import describe_item, wrong_items

TABLES = (
    "data",
    "toyworld",
    "engine",
    "captioning",
    "columns",
    "dataset_stats",
    "features",
    "model",
    "training",
    "sampling",
    "evaluation",
    "app",
)
EXTENDS = "extends"
# Keys that are tables and no named ones, for rooms that do not own the table.
KEYS_THAT_ARE_TABLES = ("networks", "lora", "consistency", "matching", "codec", "reconstruction")
# A name is that of a folder, too.
TABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


Value = TypeVar("Value")
DECIDES = "decides numbers"
DECIDES_TEXTS = "decides the texts that come with images"
# The type of a field that decides numbers, as the others do not: places, batch sizes of inference, what is logged.
Decides = Annotated[Value, DECIDES]


class TableConfig(pydantic.BaseModel):
    """A recipe table: unknown keys are errors, values are frozen, strings are not coerced to numbers or booleans.

    `renamed_keys` gives the new name of keys that had another one, and if values differ theirs in brackets.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )
    renamed_keys: ClassVar[Mapping[str, str]] = {}

    def fingerprint_fields(self, decides: str = DECIDES) -> dict[str, Any]:
        """Return, as JSON values, the fields that decide numbers (`Decides`) and are not what they are by default.

        So a new key changes no fingerprint that was made before there was a choice; and a default is no longer free to
        change, unless a version in the fingerprint does, too. The same goes for a table in a field, and its fields. A
        table that decides more than one thing has a note of its own, like `DECIDES`, for each.
        """
        defaults = self.fingerprint_defaults(decides)
        values = {name: _fingerprint_value(getattr(self, name), decides) for name in self.noted_fields(decides)}
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

    @classmethod
    def fingerprint_defaults(cls, decides: str = DECIDES) -> dict[str, Any]:
        """Return, as JSON values, what the fields are that `fingerprint_fields` leaves out."""
        fields = {name: cls.model_fields[name] for name in cls.noted_fields(decides)}
        return {
            name: _fingerprint_value(field.get_default(call_default_factory=True), decides)
            for name, field in fields.items()
            if not field.is_required()
        }

    @classmethod
    def noted_fields(cls, note: str) -> list[str]:
        """Return the names of the fields whose type has `note` beside it, as that of `Decides` has `DECIDES`."""
        return [name for name, field in cls.model_fields.items() if note in field.metadata]


def _fingerprint_value(value: Any, decides: str) -> Any:
    if isinstance(value, TableConfig):
        return value.fingerprint_fields(decides)
    return pydantic_core.to_jsonable_python(value)


class DataConfig(TableConfig):
    """`[data]`: where the raw shards are and how their members are to be read."""

    shards: str | list[str] | None = pydantic.Field(
        default=None,
        description="Raw shards: brace ranges, globs, folders or fsspec URLs; `{run}` stands for the run's folder; "
        "null = those that were typed once for the run, which it remembers",
    )
    dialect: Decides[str] = pydantic.Field(
        default="auto",
        pattern="^(auto|img2dataset|sa1b|imagenet|generic)$",
        description="Which texts of a sample count: auto and img2dataset: its text file, else the caption of its JSON; "
        "generic and imagenet: its text file alone; sa1b: none",
    )
    max_pixels: Decides[int] = pydantic.Field(
        default=89_478_485,
        ge=1,
        description="Largest image that is decoded, in pixels; larger ones are rejected",
    )

    image_column: Decides[str | None] = pydantic.Field(
        default=None,
        description="Of Parquet, Arrow and tables: the column with the image or its path; left out, it is found by its "
        "type and name",
    )
    text_column: Annotated[str | None, DECIDES_TEXTS] = pydantic.Field(
        default=None,
        description="The text of a sample: of rows the column, of files the member (caption.txt: caption) or the field "
        "of the JSON; left out, the first there is of caption, text, prompt and their like",
    )

    @property
    def reading(self) -> Reading:
        """How samples are read."""
        return Reading(dialect=self.dialect, image_column=self.image_column, text_column=self.text_column)

    def paths(self, run: Path) -> list[str]:
        """Return the raw shards that are named here, sorted by name, with `{run}` filled in.

        Raises:
            MissingFileError: none are named; or as `expand_shards` does.
        """
        if self.shards is None:
            raise MissingFileError(f"no raw shards are named: type {typed_flag('shards', ANY)} once for the run")
        return expand_shards(self.shards, run=run)


class ModelConfig(TableConfig):
    """`[model]`: what is the same in all stages; widths that data decide come from the manifests.

    Features need it, too: images are cut to whole patches.
    """

    num_layers: Decides[int] = pydantic.Field(default=28, ge=1, description="Transformer blocks (XL/2: 28)")
    num_heads: Decides[int] = pydantic.Field(default=16, ge=1, description="Attention heads of a block (XL/2: 16)")
    head_dim: Decides[int] = pydantic.Field(default=72, ge=4, description="Channels of a head (XL/2: 72)")
    patch_size: Decides[int] = pydantic.Field(
        default=2, ge=1, description="Side of a patch of latents that makes one token"
    )
    adaln: Decides[Literal["single", "per-block"]] = pydantic.Field(
        default="single",
        description="Of a PixArt: shared by all blocks, or an adaLN layer in each, which sees the text, too (Figure 6)",
    )
    size_condition: Decides[bool] = pydantic.Field(
        default=False,
        description="Of a PixArt: it is told each image's height, width and aspect ratio, as alpha's 1024-MS is",
    )
    num_classes: Decides[int] = pydantic.Field(
        default=1000, ge=1, description="Class labels of a DiT, the null class not counted (ImageNet: 1000)"
    )


Config = TypeVar("Config", bound=TableConfig)


class Recipe:
    """A parsed recipe file with settings laid over it; `table` and `named` give validated tables.

    `settings` has what was laid over it, by the parts of each key: that is what errors blame for it.
    """

    def __init__(
        self, path: Path, tables: dict[str, Any], *, settings: Mapping[tuple[str, ...], Setting] | None = None
    ) -> None:
        self.path = path
        self.tables = tables
        self.settings = settings or {}

    def blame(self, table: str, *key: str | int) -> str:
        """Return where a key comes from: the recipe's path, or where it, or a table that it is in, was typed."""
        setting = self._setting(table, *key)
        return str(self.path) if setting is None else setting.origin

    def _setting(self, table: str, *key: str | int) -> Setting | None:
        parts = (*table.split("."), *map(str, key))
        found = (self.settings.get(parts[:length]) for length in range(len(parts), 0, -1))
        # Where a key is wrong as a whole, what was typed into it comes after the recipe's own part.
        inside = [setting for place, setting in self.settings.items() if key and place[: len(parts)] == parts]
        return next((setting for setting in found if setting is not None), inside[-1] if inside else None)

    def table(self, name: str, model: type[Config]) -> Config:
        """Return table `name` as `model`.

        Raises:
            UserError: one line per wrong key, each naming `table.key`, what is wrong and the value found.
        """
        return self.laid(name, self.tables.get(name, {}), model)

    def laid(self, name: str, content: Mapping[str, Any], model: type[Config]) -> Config:
        """Return `content`, keys of table `name` with those that they are laid over, as `model`; raises as `table`."""
        self._raise(self._wrong_keys(name, content, model))
        return model.model_validate(content)

    def names(self, table: str, *, keys: Collection[str] = KEYS_THAT_ARE_TABLES) -> list[str]:
        """Return the names of the named tables of `table`, in order: all that are tables but `keys`, its own."""
        content = self.tables.get(table, {})
        return [key for key, value in content.items() if isinstance(value, dict) and key not in keys]

    def laid_over(self, table: str, name: str, *, keys: Collection[str] = KEYS_THAT_ARE_TABLES) -> dict[str, Any]:
        """Return named table `name`, laid over what it extends and the keys that all of `table` share.

        Raises:
            UserError: there is no such table, or it extends one that is not there or, in the end, itself.
        """
        content, names = self.tables.get(table, {}), self.names(table, keys=keys)
        self._require_name(table, name, names=names)
        merged = {key: value for key, value in content.items() if key not in names}
        for part in reversed(self._chain(table, name, names=names)):
            merged |= {key: value for key, value in content[part].items() if key != EXTENDS}
        return merged

    def named(self, table: str, name: str, *, model: type[Config]) -> Config:
        """Return named table `name` of `table`, as `laid_over` gives it, as `model`.

        The other ones are checked, too, each by itself, so that an error names the line that is wrong.

        Raises:
            UserError: as `laid_over`, of any of them, or one line per wrong key.
        """
        self._require_name(table, name, names=self.names(table, keys=model.model_fields))
        self.check_parts(table, self.names(table, keys=model.model_fields), model=model)
        merged = self.laid_over(table, name, keys=model.model_fields)
        self._raise(self._wrong_keys(f"{table}.{name}", merged, model))
        return model.model_validate(merged)

    def check_parts(self, table: str, names: Sequence[str], *, model: type[TableConfig]) -> None:
        """Check the keys of `table` and of its named tables `names`, each by itself: what one lacks may be elsewhere.

        Raises:
            UserError: a table extends what it cannot, or one line per wrong key.
        """
        content = self.tables.get(table, {})
        shared = {key: value for key, value in content.items() if key not in names}
        wrong = self._wrong_keys(table, shared, model, is_part=True)
        for name in names:
            self._chain(table, name, names=names)
            own = {key: value for key, value in content[name].items() if key != EXTENDS}
            wrong += self._wrong_keys(f"{table}.{name}", own, model, is_part=True)
        self._raise(wrong)

    def _require_name(self, table: str, name: str, *, names: Sequence[str]) -> None:
        if name not in names:
            known = ", ".join(names) or "none"
            near = did_you_mean(name, names)
            raise UserError(f"{self.path}: there is no [{table}.{name}]; the tables of [{table}] are: {known}{near}")
        if not TABLE_NAME.fullmatch(name):
            raise UserError(f"{self.path}: [{table}.{name!r}] names a folder, too: use letters, digits and _ -")

    def _chain(self, table: str, name: str, *, names: Sequence[str]) -> list[str]:
        """Return `name`, the table it extends, the one that extends, and so on."""
        chain = [name]
        while (base := self.tables[table][chain[-1]].get(EXTENDS)) is not None:
            key = f"{self.blame(table, chain[-1], EXTENDS)}: {table}.{chain[-1]}.{EXTENDS} = {base!r}"
            if base not in names:
                near = did_you_mean(str(base), names)
                raise UserError(f"{key} names no table of [{table}]: {', '.join(names)}{near}")
            if base in chain:
                raise UserError(f"{key} goes in a circle: {' extends '.join([*chain, base])}")
            chain.append(base)
        return chain

    def _wrong_keys(self, name: str, content: Any, model: type[TableConfig], *, is_part: bool = False) -> list[str]:
        """Return a line for each wrong key; a part lacks keys, and what is said of it as a whole means nothing."""
        items = wrong_items(model, content)
        if is_part:
            items = [item for item in items if item["loc"] and (item["type"], len(item["loc"])) != ("missing", 1)]
        return [
            f"{self.blame(name, *item['loc'])}: {describe_item(name, item, model, renamed=model.renamed_keys)}"
            f"{self._way_out(name, item)}"
            for item in items
        ]

    def _way_out(self, table: str, item: Mapping[str, Any]) -> str:
        setting = self._setting(table, *item["loc"])
        return "" if setting is None else setting.way_out(is_value=item["type"] != "extra_forbidden")

    def _raise(self, wrong: Sequence[str]) -> None:
        if wrong:
            raise UserError("\n".join(wrong))


def load_recipe(path: Path | str, settings: Sequence[str | Setting] = (), *, stage: str | None = None) -> Recipe:
    """Read a recipe and apply settings such as `training.stage2.num_steps=10`, in order.

    A setting's value is read as TOML, unless it is a text; what is not TOML (a bare word, a path) is taken as a string.
    `{stage}` in its key stands for `stage`.

    Raises:
        MissingFileError: the recipe does not exist.
        UserError: it cannot be read, is not TOML, has an unknown table, a value where a table should be, or a stage
            with phases, as recipes had before stages had names, or a setting is not `table.key=value`.
    """
    path = Path(path)
    tables = _read_tables(path)
    laid: dict[tuple[str, ...], Setting] = {}
    for typed in settings:
        setting = Setting(text=typed) if isinstance(typed, str) else typed
        key = apply_setting(tables, setting, stage=stage)
        laid[key] = setting
    recipe = Recipe(path, tables, settings=laid)
    if unknown := sorted(set(tables) - set(TABLES)):
        setting = next((setting for key, setting in laid.items() if key[0] == unknown[0]), None)
        place, way_out = (path, "") if setting is None else (setting.origin, setting.way_out(is_value=False))
        near = did_you_mean(unknown[0], TABLES)
        raise UserError(f"{place}: unknown table [{unknown[0]}]; known tables are {', '.join(TABLES)}{near}{way_out}")
    _refuse_phases(tables, path)
    return recipe


def only_name(path: Path, table: str, settings: Sequence[Setting]) -> str:
    """Return the one named table that `table` has in a recipe with settings.

    Raises:
        UserError: it has several, or none; names them.
    """
    recipe = load_recipe(path, [setting for setting in settings if STAGE_PLACEHOLDER not in setting.key])
    names = recipe.names(table, keys=(*KEYS_THAT_ARE_TABLES, "families"))
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise UserError(
            f"say which stage, as {typed_flag('stage', ANY)}; the tables of [{table}] in {path} are: {known}"
        )
    return names[0]


def _read_tables(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MissingFileError(f"recipe {path} does not exist")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from None
    _require_tables(tables, path)
    return tables


def _require_tables(tables: Mapping[str, Any], path: Path) -> None:
    for name in TABLES:
        content = tables.get(name, {})
        if isinstance(content, list):
            raise UserError(f"{path}: {name} = {content!r} is a list: write it as one table, [{name}]")
        if not isinstance(content, dict):
            raise UserError(f"{path}: {name} = {content!r} is no table: write its keys below [{name}]")


def _refuse_phases(tables: Mapping[str, Any], path: Path) -> None:
    for table in ("training", "features"):
        for name, content in tables.get(table, {}).items():
            if isinstance(content, dict) and "phases" in content:
                phase = next(iter(content["phases"]), "512") if isinstance(content["phases"], dict) else "512"
                raise UserError(
                    f"{path}: [{table}.{name}.phases.{phase}] is called [{table}.{name}-{phase}] now, "
                    f"with extends = {name!r}"
                )
