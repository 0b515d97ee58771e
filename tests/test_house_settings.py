"""Every number of every table of a recipe is finite, and what is refused is said in words that help."""

from types import SimpleNamespace
from typing import Any

import pydantic
import pytest

from captioning.config import CaptioningConfig
from curation.config import ColumnsConfig
from dataset_stats.config import CaptionSet, DatasetStatsConfig
from dataset_stats.sources import _find_files
from encoders.weights import resolve_model
from errors import UserError
from features.config import FeaturesConfig
from pipelines.engine.run import EngineConfig
from pipelines.recipe import DataConfig, ModelConfig, TableConfig, load_recipe
from sampling.config import AppConfig, SamplingConfig
from sampling.evaluation.config import EvaluationConfig
from sampling.prompt_list import list_prompts
from sampling.prompts import read_prompts
from toyworld.config import ToyworldConfig
from training.config import StageTraining
from training.stages.stage import find_weights

TABLES: dict[str, type[TableConfig]] = {
    "data": DataConfig,
    "engine": EngineConfig,
    "captioning": CaptioningConfig,
    "columns": ColumnsConfig,
    "dataset_stats": DatasetStatsConfig,
    "features": FeaturesConfig,
    "model": ModelConfig,
    "training": StageTraining,
    "sampling": SamplingConfig,
    "evaluation": EvaluationConfig,
    "app": AppConfig,
    "toyworld": ToyworldConfig,
}


def keys_of(name: str, model: type[TableConfig]) -> list[str]:
    """Every key of a table and of the tables in it."""
    keys = []
    for field, info in model.model_fields.items():
        inner = [part for part in (info.annotation,) if isinstance(part, type) and issubclass(part, TableConfig)]
        keys += keys_of(f"{name}.{field}", inner[0]) if inner else [f"{name}.{field}"]
    return keys


KEYS = [(table, key) for table, model in TABLES.items() for key in keys_of(table, model)]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "[inf, 1.0]", "[1.0, nan]"])
def test_no_key_of_any_table_takes_what_is_not_finite(tmp_path, value) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("")
    for table, key in KEYS:
        with pytest.raises(UserError) as refused:
            load_recipe(recipe, [f"{key}={value}"]).table(table, TABLES[table])
        assert f"--set: {key}" in str(refused.value), key


@pytest.mark.parametrize(
    "setting",
    [
        "features.families={control = {threshold = inf}}",
        "evaluation.guidance_scales=[1.5, inf]",
        "training.datasets=[{run = 'x', weight = nan}]",
    ],
)
def test_numbers_inside_tables_and_lists_are_finite_too(tmp_path, setting) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("")
    table = setting.partition(".")[0]
    with pytest.raises(UserError, match=r"(threshold|guidance_scales\.1|weight).* (inf|nan).*finite"):
        load_recipe(recipe, [setting]).table(table, TABLES[table])


def test_every_float_of_a_table_is_covered() -> None:
    assert TableConfig.model_config.get("allow_inf_nan") is False
    for model in TABLES.values():
        assert model.model_config.get("allow_inf_nan") is False


@pytest.mark.parametrize("size", [64, "64", "64x", "x", "1024X768", "٣x٣", 6.5])
def test_a_size_that_is_none_says_what_one_is(tmp_path, size: Any) -> None:
    with pytest.raises(pydantic.ValidationError, match="width x height in pixels, such as 1024x768"):
        SamplingConfig(size=size)
    assert SamplingConfig(size="64x32").size == "64x32"


def test_a_list_that_is_a_text_says_how_lists_are_written(tmp_path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("")
    with pytest.raises(UserError, match=r"captioning\.shards = '\*': Input should be a valid list, "):
        load_recipe(recipe, ["captioning.shards=*"]).table("captioning", CaptioningConfig)


@pytest.mark.parametrize("key", ["5", "true", "[1]", "1.5"])
def test_a_prompts_key_that_is_no_text_is_said_to_be_none(tmp_path, key) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a", "key": {key}}}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:1: key .* is no text: write it in quotes"):
        read_prompts(path, seed=0)


def test_infinity_is_no_aspect_ratio(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "aspect_ratio": Infinity}\n')
    with pytest.raises(UserError, match="aspect_ratio inf is not a positive number"):
        read_prompts(path, seed=0)


def test_a_tilde_in_front_of_a_path_is_the_users_folder_in_every_room(tmp_path, monkeypatch) -> None:
    """A shell fills it in only where it is typed without quotes, and a recipe has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("m/config.json", "t/a.txt", "w.pth", "p.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a dog")
    assert resolve_model("~/m").location == str(tmp_path / "m")
    assert find_weights("~/w.pth", key="starts_from").path == tmp_path / "w.pth"
    texts = CaptionSet(files="~/t", layout="text")
    assert _find_files("dataset_stats.sets.x", texts) == [("text", str(tmp_path / "t"))]
    trained: Any = SimpleNamespace(num_classes=None, branch=None)
    prompts = list_prompts(SamplingConfig(prompts="~/p.txt"), trained, run=tmp_path)
    assert [prompt.text for prompt in prompts] == ["a dog"]
