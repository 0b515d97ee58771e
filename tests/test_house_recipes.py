"""Every shipped recipe parses against every room's config, in all its stages and phases."""

import re
from pathlib import Path

import pytest

from captioning.config import CaptioningConfig
from dataset_stats.config import DatasetStatsConfig
from features.config import FeaturesConfig
from pipelines.engine.run import EngineConfig
from pipelines.raw.shards import expand_braces, select_shards
from pipelines.recipe import DataConfig, load_recipe
from sampling.config import SamplingConfig
from sampling.evaluation.config import EvaluationConfig
from toyworld.config import ToyworldConfig
from training.config import ModelConfig, stage_training
from training.data.features import read_feature_table
from training.launch.preflight import rank_bytes, require_even_batches

REPOSITORY = Path(__file__).resolve().parent.parent
PAPER = REPOSITORY / "recipes/pixart-alpha.toml"
TRAINING_PAGE = (REPOSITORY / "docs/TRAINING.md").read_text()
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
STAGES = list(TABLE_4)
SHARDS = {1: "imagenet_{000000..001280}", 2: "sa_{000000..000999}", 3: "hq_{00000..01399}"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_in_every_room(path: Path) -> None:
    recipe = load_recipe(path)
    for name, model in TABLES.items():
        assert isinstance(recipe.table(name, model), model)
    for stage in (1, 2, 3):
        assert stage_training(recipe, stage).num_steps > 0
        assert read_feature_table(recipe, stage).shards


@pytest.mark.parametrize(("stage", "phase"), STAGES)
def test_the_papers_recipe_is_table_4(stage: int, phase: str | None) -> None:
    recipe = load_recipe(PAPER, stage=stage, phase=phase)
    training = stage_training(recipe, stage)
    resolution = read_feature_table(recipe, stage).resolution
    assert (resolution, training.num_steps, training.global_batch_size) == TABLE_4[stage, phase]
    assert training.learning_rate == 2e-5
    assert (training.weight_decay, training.gradient_clip, training.ema_decay) == (0.03, 0.01, 0.9999)
    assert recipe.table("features", FeaturesConfig).stage(stage).buckets == (resolution > 256)


@pytest.mark.parametrize(("stage", "phase"), STAGES)
def test_the_papers_recipe_validates_on_a_hundredth(stage: int, phase: str | None) -> None:
    recipe = load_recipe(PAPER, stage=stage, phase=phase)
    training = stage_training(recipe, stage)
    names = select_shards(expand_braces(SHARDS[stage]), read_feature_table(recipe, stage).shards, key="shards")
    held_out = select_shards(names, training.validation_shards, key="validation_shards")
    assert len(held_out) == pytest.approx(len(names) / 100, rel=0.05)
    assert training.num_validation_samples >= training.global_batch_size
    assert training.num_steps >= 10 * training.validate_every


@pytest.mark.parametrize(("stage", "phase"), STAGES)
@pytest.mark.parametrize("line", ["num_stpes = 1", "num_steps = 0"])
def test_a_wrong_key_in_any_phase_stops_every_stage(tmp_path: Path, line: str, stage: int, phase: str | None) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(PAPER.read_text().replace("num_steps = 16_000", line))
    with pytest.raises(ValueError, match=rf"training\.stage3\.phases\.1024\.{line.split()[0]} "):
        stage_training(load_recipe(path, stage=stage, phase=phase), stage)
    path.write_text(PAPER.read_text().replace("resolution = 1024", "resolution = 1025"))
    with pytest.raises(ValueError, match=r"features\.stage3\.phases\.1024\.resolution = 1025"):
        load_recipe(path, stage=stage, phase=phase).table("features", FeaturesConfig)


def test_phases_of_the_paper_are_of_stage_3() -> None:
    with pytest.raises(ValueError, match="no phase '512' of stage 2"):
        load_recipe(PAPER, stage=2, phase="512")


def test_a_mistyped_phase_is_not_trained_with_the_values_of_its_stage(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(PAPER.read_text().replace("[training.stage3.phases.512]", "[training.stage3.phases.521]"))
    said = r"\[features.stage3.phases\] has 512, 1024, but \[training.stage3.phases\] has 521, 1024"
    with pytest.raises(ValueError, match=said):
        load_recipe(path, stage=3, phase="512")


# -- docs/TRAINING.md: how the paper's recipe is shared among GPUs ----------------------------------------------------

SHARES = {
    (int(stage), phase or None): cells.replace(",", "").split(" | ")
    for stage, phase, cells in re.findall(r"^\| `STAGE=(\d)(?: PHASE=(\d+))?` \| (.*) \|$", TRAINING_PAGE, re.MULTILINE)
}
TYPED = re.findall(
    r"^ +make (\w+) +STAGE=(\d)(?: PHASE=(\d+))? +RUN=\S+(?: GPUS=8 SET=(\S+))?$", TRAINING_PAGE, re.MULTILINE
)


def activation_bytes(resolution: int, *, num_text: int, is_recomputed: bool) -> int:
    """Bytes a sample keeps: per block 24 units of its tokens and two of its text's, a unit being width 1152 in bf16."""
    num_tokens = (resolution // 16) ** 2
    block = 24 * num_tokens + 2 * num_text
    return (28 * num_tokens + block if is_recomputed else 28 * block) * 1152 * 2


@pytest.mark.parametrize(("stage", "phase"), STAGES)
def test_the_pages_micro_batches_share_the_batch_and_fit(stage: int, phase: str | None) -> None:
    batch, largest, gigabytes, *steps = SHARES[stage, phase]
    is_recomputed = gigabytes.endswith("recomputed")
    num_text = 0 if stage == 1 else 120
    per_sample = activation_bytes(TABLE_4[stage, phase][0], num_text=num_text, is_recomputed=is_recomputed)
    micro_batches = []
    for num_ranks, accumulation in zip((1, 8, 32), steps, strict=True):
        override = f"training.gradient_accumulation_steps={accumulation}"
        settings = stage_training(load_recipe(PAPER, [override], stage=stage, phase=phase), stage)
        require_even_batches(settings, num_ranks)
        assert (settings.global_batch_size, settings.keep_activations == "inputs") == (int(batch), is_recomputed)
        micro_batches.append(int(batch) // (num_ranks * int(accumulation)))
        weights = rank_bytes(settings, 675_000_000 if stage == 1 else 611_000_000, num_ranks=num_ranks)
        assert weights + micro_batches[-1] * per_sample < 70e9
    assert max(micro_batches) == int(largest)
    assert int(gigabytes.split()[0]) == round(int(largest) * per_sample / 1e9)


def test_the_page_types_every_stage_with_its_share() -> None:
    typed = [(room, int(stage), phase or None) for room, stage, phase, _ in TYPED]
    assert set(typed) >= {(room, *key) for room in ("features", "train") for key in STAGES}
    shares = {(int(stage), phase or None): pair for room, stage, phase, pair in TYPED if room == "train" and pair}
    assert shares == {key: f"training.gradient_accumulation_steps={cells[4]}" for key, cells in SHARES.items()}
