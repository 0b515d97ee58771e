"""Every shipped recipe parses against every room's config, in all its stages."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from captioning.config import CaptioningConfig
from curation.config import ColumnsConfig
from dataset_stats.config import DatasetStatsConfig
from encoders.likeness import is_same_codec, is_same_text_encoder
from errors import UserError
from features.config import feature_table, table_of_stage
from pipelines.command import full_stage_name
from pipelines.engine.run import EngineConfig
from pipelines.raw.patterns import expand_braces, select_shards
from pipelines.recipe import DataConfig, ModelConfig, load_recipe
from pixart.adapter_layers import TARGET_WORDS
from pixart.differences import Uses, differences
from pixart.model import PixArtConfig
from pixart.origins import Fact, Positions
from pixart.published import PUBLISHED
from sampling.config import SamplingConfig
from sampling.evaluation.config import EvaluationConfig
from toyworld.config import ToyworldConfig
from training.config import stage_names, stage_training
from training.data.feature_tables import read_feature_table
from training.launch.memory import GPU_RESERVE, choose_shares
from training.launch.reckoning import Demand
from training.stages.networks import blank_network
from training.stages.weights import WeightCounts

REPOSITORY = Path(__file__).resolve().parent.parent
PAPER = REPOSITORY / "recipes/pixart-alpha.toml"
RESULTS_PAGE = (REPOSITORY / "docs/RESULTS.md").read_text()
TRAINING_PAGE = (REPOSITORY / "docs/TRAINING.md").read_text()
RECIPES = sorted((REPOSITORY / "recipes").glob("*.toml"))
TABLES = {
    "data": DataConfig,
    "engine": EngineConfig,
    "captioning": CaptioningConfig,
    "columns": ColumnsConfig,
    "dataset_stats": DatasetStatsConfig,
    "model": ModelConfig,
    "sampling": SamplingConfig,
    "evaluation": EvaluationConfig,
    "toyworld": ToyworldConfig,
}
FIRST_STAGES = {
    "dreambooth": ["dreambooth"],
    "toyworld-dreambooth": ["dreambooth"],
    "toyworld-vae": ["vae"],
    "toyworld-control": ["control"],
    "toyworld-lcm": ["lcm", "dmd"],
    "toyworld-curation": ["all", "chosen", "sound"],
    "pixart-control": ["control"],
    "pixart-sigma-control": ["control"],
    "finetune": ["finetune"],
    "lora": ["style"],
    "toyworld-finetune": ["finetune"],
    "pixart-alpha-released": ["alpha-256", "alpha-512", "alpha-1024"],
    "pixart-lcm": ["lcm", "lcm-lora", "dmd"],
    "pixart-sigma-lcm": ["lcm", "dmd"],
    "pixart-sigma": ["sigma-vae", "sigma-256", "sigma-512"],
    "pixart-vae": ["vae", "vae-decoder"],
    "toyworld-zoo-vae": ["vae", "vae-8"],
    "speedrun": ["speedrun-256", "speedrun-512"],
}
# Paper, Table 4: stage -> resolution, steps, batch size; the learning rate is 2e-5 throughout.
TABLE_4 = {
    "stage1": (256, 300_000, 128 * 8),
    "stage2": (256, 150_000, 178 * 64),
    "stage3": (256, 90_000, 178 * 64),
    "stage3-512": (512, 100_000, 40 * 64),
    "stage3-1024": (1024, 16_000, 12 * 32),
}
STAGES = list(TABLE_4)
SHARDS = {"stage1": "imagenet_{000000..001280}", "stage2": "sa_{000000..000999}", "stage3": "hq_{00000..01399}"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_in_every_room(path: Path) -> None:
    recipe = load_recipe(path)
    for name, model in TABLES.items():
        assert isinstance(recipe.table(name, model), model)
    stages = FIRST_STAGES.get(path.stem, ["stage1", "stage2", "stage3"])
    assert stage_names(recipe)[: len(stages)] == stages
    for stage in stage_names(recipe):
        settings = stage_training(recipe, stage)
        assert settings.num_steps > 0
        name = settings.features or stage
        assert read_feature_table(recipe, name).shards == feature_table(recipe, name).shards


@pytest.mark.parametrize("stage", STAGES)
def test_the_papers_recipe_is_table_4(stage: str) -> None:
    recipe = load_recipe(PAPER)
    training = stage_training(recipe, stage)
    resolution = read_feature_table(recipe, stage).resolution
    assert (resolution, training.num_steps, training.global_batch_size) == TABLE_4[stage]
    assert training.learning_rate == 2e-5
    assert (training.weight_decay, training.gradient_clip, training.ema_decay) == (0.03, 0.01, 0.9999)
    assert feature_table(recipe, stage).buckets == (resolution > 256)


@pytest.mark.parametrize("stage", STAGES)
def test_the_papers_recipe_validates_on_a_hundredth(stage: str) -> None:
    recipe = load_recipe(PAPER)
    training = stage_training(recipe, stage)
    names = select_shards(
        expand_braces(SHARDS[stage.partition("-")[0]]), read_feature_table(recipe, stage).shards, key="shards"
    )
    held_out = select_shards(names, training.validation_shards, key="validation_shards")
    assert len(held_out) == pytest.approx(len(names) / 100, rel=0.05)
    assert training.num_validation_samples >= training.global_batch_size
    assert training.num_steps >= 10 * training.validate_every


@pytest.mark.parametrize(("name", "rate", "batch_size"), [("pixart-lcm", 2e-5, 16), ("pixart-sigma-lcm", 1e-5, 12)])
def test_students_are_distilled_with_published_settings(name: str, rate: float, batch_size: int) -> None:
    """PixArt-alpha's config of LCM and its script of LCM-LoRA, whose target is the student itself; Sigma's differs."""
    recipe = load_recipe(REPOSITORY / f"recipes/{name}.toml")
    for stage in set(stage_names(recipe)) - {"dmd"}:
        settings = stage_training(recipe, stage)
        assert (settings.objective, settings.learning_rate, settings.global_batch_size) == (
            *("consistency", rate, batch_size),
        )
        assert (settings.weight_decay, settings.gradient_clip, settings.adam_epsilon) == (0.0, 0.01, 1e-10)
        assert (settings.warmup_steps, settings.caption_dropout) == (100, 0.0)
        assert settings.networks == {"teacher": settings.starts_from}
        assert (settings.consistency.num_teacher_steps, settings.consistency.huber_c) == (50, 0.001)
        is_lora = stage == "lcm-lora"
        assert settings.ema_decay == (0.0 if is_lora else 0.95)
        assert settings.consistency.guidance_range == ((5.5, 5.5) if is_lora else (4.0, 16.0))
        if is_lora:
            assert (settings.lora.rank, settings.lora.alpha, settings.lora.targets) == (32, 8, [*TARGET_WORDS])
    typed = recipe.table("sampling", SamplingConfig).model_fields_set
    assert not typed & {"solver", "num_steps", "guidance_scale"}, "they would be drawn with those"


@pytest.mark.parametrize(
    ("name", "rate", "batch_size", "guidance", "time"),
    [("pixart-lcm", 1e-6, 16, 3.0, 400), ("pixart-sigma-lcm", 5e-7, 128, 8.0, 399)],
)
def test_students_of_one_step_have_the_settings_published(
    name: str, rate: float, batch_size: int, guidance: float, time: int
) -> None:
    """PixArt-DMD's script of 512 pixels for alpha, DMD2's of SDXL for Sigma; critics five times as fast."""
    settings = stage_training(load_recipe(REPOSITORY / f"recipes/{name}.toml"), "dmd")
    matching = settings.matching
    assert (settings.objective, settings.features, settings.starts_from) == ("distribution_matching", "lcm", "lcm")
    assert (settings.learning_rate, settings.global_batch_size, settings.weight_decay) == (rate, batch_size, 0.01)
    assert (settings.adam_betas, settings.gradient_clip, settings.caption_dropout) == ((0.9, 0.999), 10.0, 0.0)
    assert (matching.guidance_scale, matching.times) == (guidance, [[time]])
    assert matching.critic_learning_rate == pytest.approx(5 * rate) and matching.consistency_weight == 0


def test_the_first_model_costs_what_the_page_reckons() -> None:
    """Rows of docs/RESULTS.md are samples over a rate, those of trainings the recipe's, and the sum is below 1,500."""
    recipe = load_recipe(REPOSITORY / "recipes/speedrun.toml")
    rows = re.findall(r"^\| ([a-z].*?) \| ([\d,]+) \| ([\d.]+) \| (\d+) \| ([\d,]+) \|$", RESULTS_PAGE, re.MULTILINE)
    parts = {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in rows}
    total_hours = total_dollars = 0.0
    price = stage_training(recipe, "speedrun-256").dollars_per_device_hour
    for samples, rate, hours, dollars in parts.values():
        assert samples / rate / 3600 == pytest.approx(hours, abs=0.5)
        assert samples / rate / 3600 * price == pytest.approx(dollars, abs=0.5)
        total_hours, total_dollars = total_hours + samples / rate / 3600, total_dollars + samples / rate / 3600 * price
    assert f"| all | | | {total_hours:.0f} | {total_dollars:,.0f} |" in RESULTS_PAGE and total_dollars < 1500
    for pixels in (256, 512):
        settings = stage_training(recipe, f"speedrun-{pixels}")
        assert parts[f"training, {pixels} pixels"][0] == settings.num_steps * settings.global_batch_size
        assert feature_table(recipe, f"speedrun-{pixels}").resolution == pixels


@pytest.mark.parametrize("name", ["pixart-control", "pixart-sigma-control"])
def test_control_branches_train_with_published_settings(name: str) -> None:
    """PixArt-alpha's config of 1024 pixels, led by HED; its base has another VAE and fewer tokens than Sigma."""
    recipe = load_recipe(REPOSITORY / f"recipes/{name}.toml")
    settings, table = stage_training(recipe, "control"), feature_table(recipe, "control")
    assert (settings.trains, settings.control_copies, settings.num_steps) == ("control", 13, 20_000)
    assert (settings.learning_rate, settings.weight_decay, settings.gradient_clip) == (2e-5, 0.03, 0.01)
    assert (settings.adam_epsilon, settings.global_batch_size, settings.ema_decay) == (1e-10, 16, 0.0)
    assert (settings.warmup_steps, settings.caption_dropout) == (0, 0.5)
    assert (table.resolution, table.buckets, list(table.families)) == (1024, True, ["control-hed"])


def test_the_papers_stages_start_from_each_other_and_read_labels_then_text() -> None:
    recipe = load_recipe(PAPER)
    settings = {stage: stage_training(recipe, stage) for stage in stage_names(recipe)}
    assert list(settings) == STAGES
    assert [stage.starts_from for stage in settings.values()] == [None, *STAGES[:-1]]
    assert [stage.network for stage in settings.values()] == ["dit", *["pixart"] * 4]
    assert [feature_table(recipe, stage).text for stage in STAGES] == [False, *[True] * 4]


@pytest.mark.parametrize("stage", ["stage1", "stage3-1024"])
@pytest.mark.parametrize("line", ["num_stpes = 1", "num_steps = 0"])
def test_a_wrong_key_in_any_stage_stops_every_stage(tmp_path: Path, line: str, stage: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(PAPER.read_text().replace("num_steps = 16_000", line))
    with pytest.raises(UserError, match=rf"training\.stage3-1024\.{line.split()[0]} "):
        stage_training(load_recipe(path), stage)
    path.write_text(PAPER.read_text().replace("resolution = 1024", "resolution = 8192"))
    with pytest.raises(UserError, match=r"features\.stage3-1024\.resolution = 8192"):
        feature_table(load_recipe(path), stage)


# -- docs/TRAINING.md: how the paper's recipe is shared among GPUs ----------------------------------------------------


def _name(number: str, phase: str) -> str:
    return full_stage_name(number, phase or None)


SHARES = {
    _name(stage, phase): cells.replace(",", "").split(" | ")
    for stage, phase, cells in re.findall(r"^\| `STAGE=(\d)(?: PHASE=(\d+))?` \| (.*) \|$", TRAINING_PAGE, re.MULTILINE)
}
TYPED = re.findall(r"^ +make (\w+) +STAGE=(\d)(?: PHASE=(\d+))? +RUN=\S+(?: GPUS=8)?$", TRAINING_PAGE, re.MULTILINE)


def activation_bytes(resolution: int, *, num_text: int, is_recomputed: bool) -> int:
    """Bytes a sample keeps: per block 24 units of its tokens and two of its text's, a unit being width 1152 in bf16."""
    num_tokens = (resolution // 16) ** 2
    block = 24 * num_tokens + 2 * num_text
    return (28 * num_tokens + block if is_recomputed else 28 * block) * 1152 * 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_features_of_every_stage_are_made_by_its_name(path: Path) -> None:
    recipe = load_recipe(path)
    for stage in recipe.names("training"):
        read = stage_training(recipe, stage).features or stage
        name = table_of_stage(recipe, stage)
        assert name == read or (name == stage and name in recipe.names("features")), stage
        assert feature_table(recipe, name)


@pytest.mark.parametrize(("name", "stage"), [("lora", "style"), ("dreambooth", "dreambooth-lora")])
def test_adapters_keep_the_checkpoints_that_one_may_go_back_to(name: str, stage: str) -> None:
    settings = stage_training(load_recipe(REPOSITORY / f"recipes/{name}.toml"), stage)
    assert settings.keep_checkpoints * settings.checkpoint_every >= settings.num_steps


@pytest.mark.parametrize("stage", STAGES)
def test_the_pages_micro_batches_are_what_is_chosen_on_cards_of_80_gigabytes(stage: str) -> None:
    batch, *cells = SHARES[stage]
    settings = stage_training(load_recipe(PAPER), stage)
    num_text = 0 if stage == "stage1" else 120
    resolution = TABLE_4[stage][0]

    def step_bytes(size: int, kept: str, gradients: str) -> int:
        assert kept in ("all", "inputs"), "no stage of the page keeps products"
        # Gradients that are coming are far fewer bytes than the activations that go as they come.
        return size * activation_bytes(resolution, num_text=num_text, is_recomputed=kept == "inputs")

    chosen = [
        choose_shares(
            Demand(
                settings=settings,
                weights=WeightCounts(trained=675_000_000 if stage == "stage1" else 611_000_000),
                num_ranks=num_ranks,
                sample_tokens=(resolution // 16) ** 2,
                step_bytes=step_bytes,
                batch_bytes=lambda size: 0,
            ),
            available_bytes=int(80e9 * (1 - GPU_RESERVE)),
            basis="reckoned",
        )
        for num_ranks in (1, 8, 32)
    ]
    assert settings.global_batch_size == int(batch)
    assert cells == [
        f"{found.num_micro_batches} x {found.micro_batch_size} {found.total_bytes / 1e9:.0f} GB" for found in chosen
    ]


def test_the_page_types_every_stage() -> None:
    typed = [(room, _name(stage, phase)) for room, stage, phase in TYPED]
    assert set(typed) >= {(room, stage) for room in ("features", "train") for stage in STAGES}


def test_the_recipe_with_heads_of_64_is_the_papers_in_other_heads() -> None:
    paper, other = load_recipe(PAPER), load_recipe(REPOSITORY / "recipes/pixart-alpha-heads64.toml")
    heads = {"num_heads": 18, "head_dim": 64}
    assert other.tables == paper.tables | {"model": paper.tables["model"] | heads}
    shapes = [
        PixArtConfig(num_heads=model["num_heads"], head_dim=model["head_dim"], num_layers=model["num_layers"])
        for model in (paper.tables["model"], other.tables["model"])
    ]
    weights = [{name: weight.shape for name, weight in blank_network(shape).named_parameters()} for shape in shapes]
    assert weights[0] == weights[1]


# -- recipes that go on from released weights agree with what those were trained with ---------------------------------

STARTS = [
    (path, stage)
    for path in RECIPES
    for stage in stage_names(load_recipe(path))
    if str(stage_training(load_recipe(path), stage).starts_from).startswith("PixArt-alpha/")
]


@pytest.mark.parametrize(("path", "stage"), STARTS, ids=[f"{path.stem}-{stage}" for path, stage in STARTS])
def test_a_recipe_says_of_released_weights_what_they_were_trained_with(path: Path, stage: str) -> None:
    recipe = load_recipe(path)
    settings = stage_training(recipe, stage)
    features = feature_table(recipe, settings.features or stage)
    (published,) = (model for model in PUBLISHED if model.name == settings.starts_from)
    uses = Uses(
        text_encoder=(features.text_model,),
        max_tokens=features.max_tokens,
        cleaning=features.text_cleaning,
        vae=(features.vae_model,),
        positions=Positions(sample_size=features.resolution // 8, scale=settings.interpolation_scale)
        if settings.interpolation_scale is not None
        else None,
    )
    source = Fact(value=Positions(sample_size=published.sample_size, scale=published.scales[0]), source="config.json")
    origins = replace(published.origins("published"), positions=source)
    found = differences(origins, uses, is_same_text_encoder=is_same_text_encoder, is_same_codec=is_same_codec)
    assert [difference.name for difference in found] == settings.departs_in


def test_the_stages_of_sigma_start_from_each_other_and_are_what_was_published() -> None:
    recipe = load_recipe(REPOSITORY / "recipes/pixart-sigma.toml")
    stages = stage_names(recipe)
    assert [stage_training(recipe, stage).starts_from for stage in stages[1:]] == stages[:-1]
    first, *stages = stages
    table = feature_table(recipe, first)
    assert (table.max_tokens, table.text_cleaning) == (120, "diffusers"), "the first changes the VAE alone"
    # the last turns on what no published one has
    assert stage_training(recipe, stages.pop()).kv_compressed_blocks == list(range(14, 28))
    for stage, published in zip(stages, [model for model in PUBLISHED if "Sigma" in model.name], strict=True):
        features = feature_table(recipe, stage)
        assert (features.resolution, features.max_tokens) == (8 * published.sample_size, published.max_tokens)
        assert (features.text_cleaning, features.vae_model) == (published.cleaning, published.vae)
        assert stage_training(recipe, stage).interpolation_scale == published.scales[0]
