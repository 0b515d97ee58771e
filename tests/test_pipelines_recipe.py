import pydantic
import pytest

from pipelines.recipe import DataConfig, StageConfig, load_recipe


class StageTable(StageConfig):
    num_steps: int = pydantic.Field(ge=1, description="steps")


class Table(StageConfig):
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


def test_a_phase_is_laid_over_its_stage(recipe_path) -> None:
    recipe_path.write_text(
        "[features.stage2]\nnum_steps = 7\n[features.stage2.phases.512]\nnum_steps = 9\n[features]\nresolution = 64\n"
    )
    assert load_recipe(recipe_path).table("features", Table).stage2.num_steps == 7
    assert load_recipe(recipe_path, phase="512").table("features", Table).stage2.num_steps == 9
    with pytest.raises(ValueError, match="no phase '1024'; phases are 512"):
        load_recipe(recipe_path, phase="1024")
