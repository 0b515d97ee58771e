from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
import pytest

from errors import UserError
from pipelines.command import parse_command
from pipelines.recipe import DataConfig, Decides, TableConfig, load_recipe


class StageTable(TableConfig):
    num_steps: int = pydantic.Field(ge=1, description="steps")


class Table(TableConfig):
    resolution: int = pydantic.Field(default=256, ge=8, description="pixels")
    is_bucketed: bool = pydantic.Field(default=False, description="buckets")
    name: str = pydantic.Field(default="x", description="a name")
    stage2: StageTable = pydantic.Field(default=StageTable(num_steps=3), description="stage 2")


@pytest.fixture
def recipe_path(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[data]\nshards = "a.tar"\n[features]\nresolution = 64\n[features.stage2]\nnum_steps = 7\n')
    return path


def test_overrides_are_toml_values_or_bare_strings(recipe_path) -> None:
    overrides = ["features.resolution=128", "features.is_bucketed=true", "features.name=some/path", "data.shards=['b']"]
    recipe = load_recipe(recipe_path, overrides)
    table = recipe.table("features", Table)
    assert (table.resolution, table.is_bucketed, table.name) == (128, True, "some/path")
    assert table.stage2.num_steps == 7
    assert recipe.table("data", DataConfig).shards == ["b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("features.resolutoin=3", "features.resolutoin is not a known key"),
        ("features.resolution=4", "features.resolution = 4: Input should be greater than or equal to 8"),
        ("features.is_bucketed='False'", "features.is_bucketed = 'False'"),
        ("features.stage2.num_steps=0", "features.stage2.num_steps = 0"),
    ],
)
def test_wrong_values_name_the_key_and_the_value(recipe_path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(recipe_path, [override]).table("features", Table)
    assert message in str(error.value)


@pytest.mark.parametrize("override", ["features", "=3", "resolution=3", "features.resolution.deep=3"])
def test_malformed_overrides_are_refused(recipe_path, override: str) -> None:
    with pytest.raises(UserError, match="--set"):
        load_recipe(recipe_path, [override])


def test_unknown_table_and_broken_toml_are_refused(recipe_path) -> None:
    with pytest.raises(UserError, match=r"unknown table \[feature\]"):
        load_recipe(recipe_path, ["feature.resolution=3"])
    recipe_path.write_text("[data\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(recipe_path)
    with pytest.raises(FileNotFoundError):
        load_recipe(recipe_path.parent / "other.toml")


NAMED = """
[training]
rate = 0.5
[training.first]
num_steps = 7
[training.second]
extends = "first"
rate = 0.25
[training.third]
extends = "second"
num_steps = 11
options = { fast = true }
"""


class NamedTable(TableConfig):
    renamed_keys: ClassVar[Mapping[str, str]] = {"speed": "rate"}

    num_steps: int = pydantic.Field(ge=1, description="steps")
    rate: float = pydantic.Field(default=1.0, description="rate")
    options: dict[str, bool] = pydantic.Field(default={}, description="a key that is a table")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "NamedTable":
        if self.num_steps * self.rate > 100:
            raise ValueError("too far")
        return self


def named(path: Path, text: str, name: str, *overrides: str) -> NamedTable:
    path.write_text(text)
    return load_recipe(path, overrides, stage=name).named("training", name, model=NamedTable)


def test_a_named_table_is_laid_over_what_it_extends_and_the_shared_keys(recipe_path) -> None:
    tables = [named(recipe_path, NAMED, name) for name in ("first", "second", "third")]
    assert [(table.num_steps, table.rate, table.options) for table in tables] == [
        (7, 0.5, {}),
        (7, 0.25, {}),
        (11, 0.25, {"fast": True}),
    ]
    recipe = load_recipe(recipe_path)
    assert recipe.names("training") == ["first", "second", "third"]
    assert recipe.laid_over("training", "second") == {"rate": 0.25, "num_steps": 7}


def test_a_shared_key_that_is_a_table_is_no_named_one(recipe_path) -> None:
    text = NAMED + "[training.options]\nslow = false\n"
    assert named(recipe_path, text, "first").options == {"slow": False}
    with pytest.raises(
        UserError, match=r"no \[training.options\]; the tables of \[training\] are: first, second, third"
    ):
        named(recipe_path, text, "options")


def test_overrides_reach_the_chosen_stage_whatever_its_name(recipe_path) -> None:
    overrides = ["training.{stage}.num_steps=5", "training.rate=2.0"]
    chosen = named(recipe_path, NAMED, "third", *overrides)
    assert (chosen.num_steps, chosen.rate) == (5, 0.25), "the table's own rate, which a shared one does not change"
    assert named(recipe_path, NAMED, "first", "training.first.num_steps=3").num_steps == 3
    with pytest.raises(UserError, match=r"there is no \[training.fourth\]"):
        named(recipe_path, NAMED, "fourth", *overrides)
    with pytest.raises(UserError, match="no stage is chosen"):
        load_recipe(recipe_path, overrides)


@pytest.mark.parametrize("asked", ["first", "third"])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_steps = 11", "num_stpes = 11", "training.third.num_stpes is not a known key"),
        ("num_steps = 11", "num_steps = 0", "training.third.num_steps = 0: Input should be greater than or equal to 1"),
        ("rate = 0.25", "speed = 0.25", "training.second.speed is called rate now"),
        ("rate = 0.5", "speed = 0.5", "training.speed is called rate now"),
        ('extends = "second"', 'extends = "fourth"', "training.third.extends = 'fourth' names no table of [training]"),
        ('extends = "second"', "extends = 2", "training.third.extends = 2 names no table of [training]"),
        (
            "num_steps = 7",
            'extends = "first"',
            "training.first.extends = 'first' goes in a circle: first extends first",
        ),
        (
            "num_steps = 7",
            'extends = "third"',
            "goes in a circle: ",
        ),
    ],
)
def test_every_named_table_is_checked_whichever_is_asked_for(recipe_path, asked, old, new, message) -> None:
    with pytest.raises(UserError) as error:
        named(recipe_path, NAMED.replace(old, new), asked)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_a_table_lacks_is_said_with_what_it_is(recipe_path) -> None:
    with pytest.raises(UserError, match=r"training\.first\.num_steps is missing: steps$"):
        named(recipe_path, NAMED.replace("num_steps = 7", ""), "first")
    with pytest.raises(UserError, match=r"training\.third: too far$"):
        named(recipe_path, NAMED, "third", "training.third.num_steps=1000")


def test_an_unknown_name_lists_the_known_ones(recipe_path) -> None:
    with pytest.raises(UserError, match=r"no \[training.fifth\]; the tables of \[training\] are: first, second, third"):
        named(recipe_path, NAMED, "fifth")
    with pytest.raises(UserError, match=r"no \[training.first\]; the tables of \[training\] are: none"):
        named(recipe_path, "", "first")
    with pytest.raises(UserError, match="use letters, digits"):
        named(recipe_path, '[training."../up"]\nnum_steps = 1\n', "../up")


def test_phases_are_refused_with_their_new_name(recipe_path) -> None:
    recipe_path.write_text("[features.stage3]\n[features.stage3.phases.1024]\nresolution = 64\n")
    said = r"\[features.stage3.phases.1024\] is called \[features.stage3-1024\] now, with extends = 'stage3'"
    with pytest.raises(UserError, match=said):
        load_recipe(recipe_path)
    recipe_path.write_text("[training.stage3]\n")
    with pytest.raises(UserError, match=r"called \[training.stage3-512\] now"):
        load_recipe(recipe_path, ["training.stage3.phases.512.num_steps=3"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["2"], "stage2"),
        (["3", "--phase", "512"], "stage3-512"),
        (["stage3-512"], "stage3-512"),
        (["dreambooth"], "dreambooth"),
    ],
)
def test_a_number_is_short_for_a_stage_of_the_paper(recipe_path, words, name) -> None:
    argv = ["--recipe", str(recipe_path), "--run", "runs/x", "--stage", *words]
    assert parse_command("training", "", argv=argv, has_stages=True).stage == name


class Deciding(TableConfig):
    rate: Decides[float] = pydantic.Field(default=1.0, gt=0, description="decides")
    kind: Decides[Literal["a", "b"]] = pydantic.Field(description="decides, and has no default")
    betas: Decides[tuple[float, float]] = pydantic.Field(default=(0.5, 1.0), description="is a list in JSON")
    folder: str = pydantic.Field(default="x", description="decides nothing")


def test_a_fingerprint_has_what_decides_numbers_and_is_not_the_default() -> None:
    assert Deciding(kind="a", folder="y").fingerprint_fields() == {"kind": "a"}
    assert Deciding(kind="a", rate=2.0, betas=(0.5, 0.9)).fingerprint_fields() == {
        "kind": "a",
        "rate": 2.0,
        "betas": [0.5, 0.9],
    }
    assert Deciding.fingerprint_defaults() == {"rate": 1.0, "betas": [0.5, 1.0]}
    with pytest.raises(pydantic.ValidationError):
        Deciding(kind="a", rate=-1.0)


def test_a_key_that_is_a_table_is_no_stage_for_rooms_that_do_not_own_the_table(recipe_path) -> None:
    recipe_path.write_text('[training]\nrate = 0.5\n[training.networks]\nteacher = "x"\n[training.stage2]\n')
    recipe = load_recipe(recipe_path)
    assert recipe.names("training") == ["stage2"]
    assert recipe.laid_over("training", "stage2") == {"rate": 0.5, "networks": {"teacher": "x"}}


class Nested(TableConfig):
    first: Decides[Deciding] = pydantic.Field(default=Deciding(kind="a"), description="a table that decides")
    second: Decides[Deciding | None] = pydantic.Field(default=None, description="a table, if there is one")


def test_a_table_in_a_field_leaves_out_its_own_defaults() -> None:
    assert Nested().fingerprint_fields() == {}
    nested = Nested(first=Deciding(kind="a", folder="y"), second=Deciding(kind="b", rate=2.0))
    assert nested.fingerprint_fields() == {"second": {"kind": "b", "rate": 2.0}}
    assert Nested(first=Deciding(kind="b")).fingerprint_fields() == {"first": {"kind": "b"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training = 3", "training = 3 is no table: write its keys below [training]"),
        (
            '[[training]]\nx = 1\n[data]\nshards = "a.tar"',
            "training = [{'x': 1}] is a list: write it as one table, [training]",
        ),
        ("features = []", "features = [] is a list: write it as one table, [features]"),
        ('app = "x"', "app = 'x' is no table: write its keys below [app]"),
    ],
)
@pytest.mark.parametrize("overrides", [(), ("training.num_steps=3", "features.resolution=64", "app.port=80")])
def test_a_table_that_is_none_is_named(tmp_path, text: str, said: str, overrides: tuple[str, ...]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    assert str(error.value) == f"{path}: {said}"
