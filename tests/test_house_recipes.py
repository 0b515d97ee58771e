"""Every shipped recipe parses against every room's config, in all its stages and phases."""

from pathlib import Path

import pytest

from captioning.config import CaptioningConfig
from dataset_stats.config import DatasetStatsConfig
from features.config import FeaturesConfig
from pipelines.engine import EngineConfig
from pipelines.recipe import DataConfig, load_recipe
from sampling.config import SamplingConfig
from sampling.evaluation.config import EvaluationConfig
from toyworld.config import ToyworldConfig
from training.config import ModelConfig, stage_training
from training.data.features import read_feature_table

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPOSITORY / "recipes").glob("*.toml"))
TABLES = {
    "data": DataConfig,
    "engine": EngineConfig,
    "captioning": CaptioningConfig,
    "dataset_stats": DatasetStatsConfig,
    "features": FeaturesConfig,
    "model": ModelConfig,
    "sampling": SamplingConfig,
    "evaluation": EvaluationConfig,
    "toyworld": ToyworldConfig,
}
# Paper, Table 4: stage, phase -> resolution, steps, batch size; the learning rate is 2e-5 throughout.
TABLE_4 = {
    (1, None): (256, 300_000, 128 * 8),
    (2, None): (256, 150_000, 178 * 64),
    (3, None): (256, 90_000, 178 * 64),
    (3, "512"): (512, 100_000, 40 * 64),
    (3, "1024"): (1024, 16_000, 12 * 32),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_in_every_room(path: Path) -> None:
    recipe = load_recipe(path)
    for name, model in TABLES.items():
        assert isinstance(recipe.table(name, model), model)
    for stage in (1, 2, 3):
        assert stage_training(recipe, stage).num_steps > 0
        assert read_feature_table(recipe, stage).shards


@pytest.mark.parametrize(("stage", "phase"), TABLE_4)
def test_the_papers_recipe_is_table_4(stage: int, phase: str | None) -> None:
    recipe = load_recipe(REPOSITORY / "recipes/pixart-alpha.toml", phase=phase)
    training = stage_training(recipe, stage)
    resolution = read_feature_table(recipe, stage).resolution
    assert (resolution, training.num_steps, training.global_batch_size) == TABLE_4[stage, phase]
    assert training.learning_rate == 2e-5
    assert (training.weight_decay, training.gradient_clip, training.ema_decay) == (0.03, 0.01, 0.9999)
    assert recipe.table("features", FeaturesConfig).stage(stage).buckets == (resolution > 256)
