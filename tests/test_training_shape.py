"""A network has the shape of the weights it starts from, and a recipe's `[model]` may not contradict them."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import torch
from training_run import D_TEXT, arguments, make_run

from errors import UserError
from pipelines.command import parse_command
from pipelines.recipe import ModelConfig
from pixart.convert import save_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.layouts import export_weights, original_layout
from pixart.model import PixArt, PixArtConfig
from training.stages.stage import TrainingJob, open_stage

SHAPE = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "sample_size": 4}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def job_of(run: Path, stage: int, **settings: object) -> TrainingJob:
    return open_stage(parse_command("training", "", argv=arguments(run, stage, **settings), has_stages=True))


def write_checkpoint(job: TrainingJob, *, step: int) -> Path:
    trainer = {
        "num_steps": 12,
        "starts_from": job.settings.starts_from,
        "plan_fingerprint": job.fingerprint.digest,
        "fingerprint": job.fingerprint.fields,
    }
    folder = tiny_checkpoint.write_checkpoint(job.directory, step, trainer=trainer)
    (job.directory / "latest").write_text(f"step-{step}\n")
    return folder


def saved(network: DiT | PixArt, folder: Path) -> str:
    save_diffusers(network, folder)
    return str(folder)


@pytest.fixture
def write_model(run: Path) -> Iterator[Callable[[str], int]]:
    """Puts other lines into `[model]` of the recipe, for one test."""
    recipe = run.parent / "recipe.toml"
    was = recipe.read_text()
    begin, end = was.index("[model]"), was.index("[training]")
    yield lambda lines: recipe.write_text(f"{was[:begin]}[model]\n{lines}\n{was[end:]}")
    recipe.write_text(was)


def test_the_shape_is_that_of_the_weights_a_stage_starts_from(
    run: Path, tmp_path: Path, write_model: Callable[[str], int]
) -> None:
    told = job_of(run, 1, starts_from="scratch")
    write_model("")
    assert job_of(run, 1, starts_from="scratch").model == ModelConfig()
    dit = DiT(DiTConfig(**SHAPE, num_classes=5))
    job = job_of(run, 1, starts_from=saved(dit, tmp_path / "dit"))
    assert job.model == told.model == ModelConfig(num_layers=2, num_heads=2, head_dim=8, num_classes=5)
    wide = DiT(DiTConfig(num_layers=1, num_heads=6, head_dim=64, sample_size=4, num_classes=7))
    torch.save(export_weights(wide, original_layout(wide.config)), tmp_path / "dit.pt")
    job = job_of(run, 1, starts_from=str(tmp_path / "dit.pt"))
    assert job.model == ModelConfig(num_layers=1, num_heads=6, head_dim=64, num_classes=7)
    per_block = PixArt(PixArtConfig(**SHAPE, caption_channels=D_TEXT, adaln="per-block"))
    job = job_of(run, 2, starts_from=saved(per_block, tmp_path / "per-block"))
    assert job.model == ModelConfig(num_layers=2, num_heads=2, head_dim=8, adaln="per-block")
    job = job_of(run, 2, starts_from=saved(dit, tmp_path / "dit"))
    assert job.model.adaln == "single" and job.model.num_classes == 5


@pytest.mark.parametrize(
    ("typed", "stage", "said"),
    [
        (
            "num_layers = 28",
            1,
            r"recipe\.toml: model\.num_layers = 28, but .*starts_from \(.*dit\) have 2: leave model",
        ),
        ("num_classes = 6", 1, r"model\.num_classes = 6, but .* have 5"),
        ("patch_size = 4", 2, r"model\.patch_size = 4, but .* have 2"),
        ("num_classes = 6", 2, None),
        ('adaln = "per-block"', 2, None),
    ],
)
def test_a_typed_shape_that_the_weights_contradict_is_refused(
    run: Path, tmp_path: Path, write_model: Callable[[str], int], typed: str, stage: int, said: str | None
) -> None:
    write_model(typed)
    folder = saved(DiT(DiTConfig(**SHAPE, num_classes=5)), tmp_path / "dit")
    if said is None:
        job_of(run, stage, starts_from=folder)
        return
    with pytest.raises(UserError, match=said):
        job_of(run, stage, starts_from=folder)


def test_a_stage_that_goes_on_has_the_shape_it_was_trained_with(run: Path) -> None:
    """`[model]` may be left out later, also where the weights before are gone."""
    first = write_checkpoint(job_of(run, 1), step=12)
    before = job_of(run, 2)
    write_checkpoint(before, step=6)
    recipe = run.parent / "recipe.toml"
    text = recipe.read_text()
    recipe.write_text(text[: text.index("[model]")] + text[text.index("[training]") :])
    assert job_of(run, 1).model == job_of(run, 2).model == before.model
    assert job_of(run, 2).fingerprint == before.fingerprint
    shutil.rmtree(first.parent)
    assert job_of(run, 2).model == before.model


def test_fresh_weights_need_a_shape_that_somebody_has_given(run: Path) -> None:
    """A recipe that fine-tunes has no `[model]`: from scratch it took XL/2, whatever it was to go on from."""
    recipe = run.parent / "recipe.toml"
    text = recipe.read_text()
    try:
        recipe.write_text(text[: text.index("[model]")] + text[text.index("[training]") :])
        said = r"training\.stage1 starts from scratch, and nothing says the shape of its network: give \[model\]"
        with pytest.raises(UserError, match=said):
            job_of(run, 1, starts_from="scratch")
        typed = [*arguments(run, 1, starts_from="scratch"), "--set", "model.num_layers=2"]
        job = open_stage(parse_command("training", "", argv=typed, has_stages=True))
        assert job.model == ModelConfig(num_layers=2)
    finally:
        recipe.write_text(text)


TINY = {"num_layers": 2, "head_dim": 64, "num_heads": 6}  # S's width, which an original file's heads are known of
PUBLISHED = {
    "pixart-alpha-256": PixArtConfig(**TINY, caption_channels=D_TEXT, sample_size=4),
    "pixart-alpha-512": PixArtConfig(**TINY, caption_channels=D_TEXT, sample_size=64, interpolation_scale=1.0),
    "pixart-alpha-1024-MS": PixArtConfig(
        **TINY, caption_channels=D_TEXT, sample_size=128, interpolation_scale=2.0, has_size_condition=True
    ),
    "pixart-sigma-1024": PixArtConfig(**TINY, caption_channels=D_TEXT, sample_size=128, interpolation_scale=2.0),
    "dit": DiTConfig(**TINY, sample_size=4, num_classes=5),
    "dit-512": DiTConfig(**TINY, sample_size=64, num_classes=5),
}
AGREEING: dict[str, Any] = {**TINY, "patch_size": 2}
CONTRADICTING = {"num_layers": 28, "num_heads": 16, "head_dim": 72, "patch_size": 4}


def written(config: PixArtConfig | DiTConfig, layout: str, folder: Path) -> str:
    """Write weights of a shape: as diffusers' folder, that of a pipeline, or an original file."""
    network = config.network()
    if layout == "pipeline":
        save_diffusers(network, folder / "pipeline" / "transformer")
        return str(folder / "pipeline")
    if layout == "folder":
        return saved(network, folder / "folder")
    shape = config if config.kind == "pixart" else replace(config, timestep_shift=0)
    weights = export_weights(shape.network(), original_layout(shape))
    torch.save({"state_dict": weights}, folder / "file.pth")
    return str(folder / "file.pth")


@pytest.mark.parametrize("layout", ["folder", "pipeline", "original"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_layout_decides_the_shape(
    run: Path, tmp_path: Path, write_model: Callable[[str], int], name: str, layout: str
) -> None:
    """Keys that agree are taken, each that contradicts is refused with both values and the weights."""
    config = PUBLISHED[name]
    stage = 2 if config.kind == "pixart" else 1
    start = written(config, layout, tmp_path)
    own, other = (
        ({"adaln": "single"}, {"adaln": "per-block"}) if stage == 2 else ({"num_classes": 5}, {"num_classes": 7})
    )
    for typed in ({}, AGREEING | own):
        write_model("\n".join(f"{key} = {value!r}".replace("'", '"') for key, value in typed.items()))
        model = job_of(run, stage, starts_from=start).model
        assert {key: getattr(model, key) for key in AGREEING | own} == AGREEING | own
    for key, value in {**CONTRADICTING, **other}.items():
        write_model(f"{key} = {value!r}".replace("'", '"'))
        has = (AGREEING | own)[key]
        said = (
            rf"recipe\.toml: model\.{key} = {value!r}, but .*{Path(start).name}.* have {has!r}: leave model\.{key} out"
        )
        with pytest.raises(UserError, match=said):
            job_of(run, stage, starts_from=start)


@pytest.mark.parametrize("key", ["num_layers", "num_heads", "head_dim", "patch_size", "num_classes"])
def test_a_checkpoint_of_ours_decides_the_shape_of_the_next_stage(
    run: Path, write_model: Callable[[str], int], key: str
) -> None:
    was = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "patch_size": 2, "num_classes": 5}
    write_checkpoint(job_of(run, 1), step=12)
    write_model(f"{key} = {was[key]}")
    assert getattr(job_of(run, 2).model, key) == was[key]
    write_model(f"{key} = {was[key] + 4}")
    if key == "num_classes":  # a PixArt knows no classes
        job_of(run, 2)
        return
    with pytest.raises(UserError, match=rf"model\.{key} = {was[key] + 4}, but .*step-12.* have {was[key]}"):
        job_of(run, 2)
