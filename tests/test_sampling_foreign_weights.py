"""Pipelines of others are drawn as diffusers draws them, under the scheduler settings that they bring."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from sampling_run import PIXART, make_run, randomised, write_recipe
from transformers import AutoTokenizer, T5EncoderModel

from errors import MissingFileError, UserError
from pixart.convert import save_diffusers
from pixart.drawing.denoise import draw_noise, make_generators
from pixart.model import PixArt
from pixart.processes.specs import ddpm_spec, flow_spec
from sampling.__main__ import main
from sampling.foreign_weights import open_trained_model

BASE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS = {
    "scaled": {**BASE, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "karras": {**BASE, "use_karras_sigmas": True, "solver_order": 3, "final_sigmas_type": "sigma_min"},
    "trailing": {**BASE, "timestep_spacing": "trailing", "solver_type": "heun", "euler_at_final": True},
    "leading": {**BASE, "timestep_spacing": "leading", "steps_offset": 1, "thresholding": True},
    "flow": FLOW,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    save_diffusers(randomised(PixArt(PIXART)), folder / "ddpm")
    save_diffusers(randomised(PixArt(PIXART.__class__(**{**vars(PIXART), "out_channels": 4}))), folder / "flow")
    return folder


def save_pipeline(run: Path, folder: Path, settings: dict[str, object], **keywords: object) -> PixArtAlphaPipeline:
    pipeline = PixArtAlphaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(run / "t5"),
        text_encoder=T5EncoderModel.from_pretrained(run / "t5"),
        vae=AutoencoderKL.from_pretrained(run / "vae"),
        transformer=PixArtTransformer2DModel.from_pretrained(run / ("flow" if settings == FLOW else "ddpm")),
        scheduler=DPMSolverMultistepScheduler(**settings),
    )
    pipeline.save_pretrained(folder, **keywords)
    return pipeline


def draw(run: Path, folder: Path, **table: object) -> np.ndarray:
    settings = {"prompt": "a red circle", "size": "32x32", "num_steps": 5, "checkpoint": str(folder), "seed": 3}
    recipe = write_recipe(run, **(settings | table))
    main(["--recipe", str(recipe), "--run", str(run), "--stage", "2"])
    (path,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipelines_schedule_and_sampler_give_the_image_of_diffusers(run: Path, tmp_path: Path, name: str) -> None:
    pipeline = save_pipeline(run, tmp_path / "saved", SCHEDULERS[name])
    actual = draw(run, tmp_path / "saved")
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_noise(make_generators([3]), (4, 4, 4))
    options = {"use_resolution_binning": False, "clean_caption": False, "width": 32, "height": 32, "latents": noise}
    expected = np.asarray(pipeline("a red circle", num_inference_steps=5, **options).images[0]).astype(int)
    assert np.abs(actual - expected).max() <= 1
    process = open_trained_model(str(tmp_path / "saved"), None).process
    plain = ddpm_spec() if name != "flow" else flow_spec()
    assert process != plain, "the image would be that of a plain schedule"


@pytest.mark.parametrize(
    "keywords",
    [
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "20KB"},
        {"safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "20KB"},
    ],
    ids=["variant", "variant in pieces", "pickles", "pickles in pieces"],
)
def test_a_pipelines_files_have_whatever_names_diffusers_gives(run: Path, tmp_path: Path, keywords: dict) -> None:
    save_pipeline(run, tmp_path / "plain", BASE)
    save_pipeline(run, tmp_path / "saved", BASE, **keywords)
    assert (draw(run, tmp_path / "saved", seed=4) == draw(run, tmp_path / "plain", seed=4)).all()


def test_settings_that_another_solver_does_not_take_are_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_pipeline(run, tmp_path / "saved", SCHEDULERS["karras"])
    draw(run, tmp_path / "saved", solver="iddpm", num_steps=2, seed=5)
    said = " ".join(capsys.readouterr().err.split())
    assert "use_karras_sigmas True" in said and "sampling.solver iddpm takes none of that" in said


def rename_class(folder: Path, class_name: str) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": class_name}))


def test_what_is_missing_or_another_process_is_said_before_anything_is_loaded(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_pipeline(run, folder, {**BASE, "trained_betas": [0.01] * 1000}, max_shard_size="20KB")
    with pytest.raises(UserError, match=r"scheduler_config\.json: trained_betas is a list of 1000, but only None is"):
        open_trained_model(str(folder), None)
    DPMSolverMultistepScheduler(**BASE).save_pretrained(folder / "scheduler")
    trained = open_trained_model(str(folder), None)
    assert trained.process == ddpm_spec() and trained.text is not None and trained.text["max_tokens"] == 120
    rename_class(folder, "PixArtSigmaPAGPipeline")
    trained = open_trained_model(str(folder), None)
    assert trained.text is not None and trained.text["max_tokens"] == 300
    rename_class(folder, "FluxPipeline")
    with pytest.raises(
        UserError, match=r"model_index\.json: _class_name FluxPipeline is none of PixArtAlphaPipeline, P"
    ):
        open_trained_model(str(folder), None)
    rename_class(folder, "PixArtAlphaPipeline")
    next((folder / "transformer").glob("*-00002-of-*")).unlink()
    with pytest.raises(MissingFileError, match=r"transformer lacks 1 of the \d+ files that .*index\.json names"):
        open_trained_model(str(folder), None)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json is no JSON or has been cut short"):
        open_trained_model(str(folder), None)
    with pytest.raises(MissingFileError, match=r"sampling\.checkpoint: .*nothing\.safetensors does not exist"):
        open_trained_model("nothing.safetensors", None)
