import pydantic
import pytest

from pipelines.recipe import DataConfig, Recipe, TableConfig, load_recipe


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
    with pytest.raises(ValueError) as error:
        load_recipe(recipe_path, [override]).table("features", Table)
    assert message in str(error.value)


@pytest.mark.parametrize("override", ["features", "=3", "resolution=3", "features.resolution.deep=3"])
def test_malformed_overrides_are_refused(recipe_path, override: str) -> None:
    with pytest.raises(ValueError, match="--set"):
        load_recipe(recipe_path, [override])


def test_unknown_table_and_broken_toml_are_refused(recipe_path) -> None:
    with pytest.raises(ValueError, match=r"unknown table \[feature\]"):
        load_recipe(recipe_path, ["feature.resolution=3"])
    recipe_path.write_text("[data\n")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_recipe(recipe_path)
    with pytest.raises(FileNotFoundError):
        load_recipe(recipe_path.parent / "other.toml")


PHASED = """
[features]
resolution = 64
[features.stage2]
num_steps = 7
[features.stage2.phases.512]
num_steps = 9
[features.stage2.phases.1024]
num_steps = 11
[training.stage1]
num_steps = 1
[training.stage2]
num_steps = 2
"""


def test_a_phase_is_laid_over_its_stage(recipe_path) -> None:
    recipe_path.write_text(PHASED)
    assert load_recipe(recipe_path).table("features", Table).stage2.num_steps == 7
    assert load_recipe(recipe_path, phase="512").table("features", Table).stage2.num_steps == 9
    override = ["features.stage2.num_steps=3"]
    assert load_recipe(recipe_path, override, stage=2, phase="512").table("features", Table).stage2.num_steps == 3
    with pytest.raises(ValueError, match="no phase '2048'; phases are 512, 1024"):
        load_recipe(recipe_path, phase="2048")


def test_a_phase_is_one_of_the_stage_that_was_asked_for(recipe_path) -> None:
    recipe_path.write_text(PHASED + "[training.stage1.phases.warm]\nnum_steps = 5\n")
    with pytest.raises(ValueError, match="no phase '512' of stage 1; phases are warm"):
        load_recipe(recipe_path, stage=1, phase="512")
    with pytest.raises(ValueError, match="no phase '512' of stage 3; phases are none"):
        load_recipe(recipe_path, stage=3, phase="512")


def test_a_phase_leaves_other_stages_alone(recipe_path) -> None:
    recipe_path.write_text(PHASED + "[training.stage1.phases.512]\nnum_steps = 5\n")
    tables = load_recipe(recipe_path, stage=2, phase="512").tables
    assert (tables["training"]["stage1"]["num_steps"], tables["features"]["stage2"]["num_steps"]) == (1, 9)


def test_tables_of_a_stage_that_have_phases_have_the_same(recipe_path) -> None:
    # A table without phases is the same in all of them.
    recipe_path.write_text(PHASED)
    assert load_recipe(recipe_path, stage=2, phase="512").tables["training"]["stage2"] == {"num_steps": 2}
    recipe_path.write_text(
        PHASED + "[training.stage2.phases.521]\nnum_steps = 5\n[training.stage2.phases.1024]\nnum_steps = 6\n"
    )
    chosen: list[tuple[int | None, str | None]] = [(None, None), (2, "512"), (2, "1024"), (None, "512")]
    said = r"\[features\.stage2\.phases\] has 512, 1024, but \[training\.stage2\.phases\] has 521, 1024"
    for stage, phase in chosen:
        with pytest.raises(ValueError, match=said):
            load_recipe(recipe_path, stage=stage, phase=phase)


@pytest.mark.parametrize("phase", [None, "512", "1024"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_stpes = 11", "features.stage2.phases.1024.num_stpes is not a known key"),
        ("num_steps = 0", "features.stage2.phases.1024.num_steps = 0: Input should be greater than or equal to 1"),
        ("phases = {}", "features.stage2.phases.1024.phases is not a known key"),
    ],
)
def test_every_phase_is_checked_whichever_is_chosen(recipe_path, line: str, message: str, phase: str | None) -> None:
    recipe_path.write_text(PHASED.replace("num_steps = 11", line))
    recipe = load_recipe(recipe_path, phase=phase)
    with pytest.raises(ValueError) as error:
        recipe.table("features", Table)
    assert str(error.value) == f"{recipe_path}: {message}"
    part = Recipe(recipe_path, {"features.stage2": recipe.tables["features"]["stage2"]})
    with pytest.raises(ValueError) as error:
        part.table("features.stage2", StageTable)
    assert str(error.value) == f"{recipe_path}: {message}"


def test_a_phase_answers_for_its_own_keys_only(recipe_path) -> None:
    recipe_path.write_text(PHASED.replace("num_steps = 7", "num_stpes = 7"))
    with pytest.raises(ValueError) as error:
        load_recipe(recipe_path, phase="512").table("features", Table)
    assert str(error.value) == f"{recipe_path}: features.stage2.num_stpes is not a known key"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[features.stage2]\nphases = 512\n", "features.stage2.phases = 512 does not hold a table for each phase"),
        ("[features.stage2.phases]\n512 = 3\n", "features.stage2.phases = {'512': 3} does not hold a table"),
        ("[stage2.phases.512]\nnum_steps = 9\n", "unknown table [stage2]"),
    ],
)
def test_phases_in_the_wrong_place_are_refused(recipe_path, text: str, message: str) -> None:
    recipe_path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(recipe_path)
    assert message in str(error.value)


def test_an_override_sets_the_stage_and_not_its_phase(recipe_path) -> None:
    recipe_path.write_text(PHASED)
    with pytest.raises(ValueError, match=r"--phase and set features\.stage2\.key"):
        load_recipe(recipe_path, ["features.stage2.phases.512.num_steps=3"], phase="512")
