"""`python -m sampling` on checkpoints of tiny random models: contract, resume, parity with diffusers' pipeline."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from sampling_run import DIT, MAX_TOKENS, PIXART, PROMPTS, make_run, randomised, save_checkpoint, write_recipe
from sound_run import require_sound
from transformers import AutoTokenizer, T5EncoderModel

from encoders.kl import KLCodec
from errors import UserError
from pipelines.store.manifest import read_manifest
from pixart.convert import save_diffusers
from pixart.drawing.denoise import draw_noise, make_generators
from pixart.model import PixArt
from sampling import renderer
from sampling.__main__ import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def sample(run: Path, stage: int, *flags: str, **table: object) -> None:
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", str(stage), *flags])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the keys of all images drawn from now on."""
    drawn: list[str] = []
    draw = renderer.Renderer.draw

    def recording(self, requests, texts):
        drawn.extend(request.key for request in requests)
        return draw(self, requests, texts)

    monkeypatch.setattr(renderer.Renderer, "draw", recording)
    return drawn


def test_stage_2_writes_the_contract(run):
    sample(run, 2)
    require_sound(run)
    folder = run / "samples" / "stage2"
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [(row["key"], row["prompt"]) for row in rows] == [(row["key"], row["prompt"]) for row in PROMPTS]
    manifest = read_manifest(folder)
    assert (manifest.num_read, manifest.num_kept, manifest.rejected) == (3, 3, {})
    for row in rows:
        assert row["file"] == f"{row['key']}.png"
        with Image.open(folder / row["file"]) as image:
            assert image.size == (row["width"], row["height"]) == (32, 32)
            assert image.info["prompt"] == row["prompt"]
            assert image.info["seed"] == str(row["seed"])
            assert image.info["fingerprint"] == manifest.fingerprint.digest
            assert image.info["checkpoint"] == manifest.upstream["checkpoint"]
            assert json.loads(image.info["settings"])["num_steps"] == 3
    assert (folder / "grid.png").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["counts"]["sampling_stage2"] == {"read": 3, "kept": 3, "rejected": {}}
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


def test_stage_1_draws_every_class(run):
    sample(run, 1)
    rows = pq.read_table(run / "samples" / "stage1" / "samples.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == [f"class {label}" for label in range(DIT.num_classes)]
    sample(run, 1, classes=[4, 2])
    rows = pq.read_table(run / "samples" / "stage1" / "samples.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["class_0004", "class_0002"]


def test_stage_3_takes_the_nearest_trained_aspect_ratio(run):
    sample(run, 3)
    rows = pq.read_table(run / "samples" / "stage3" / "samples.parquet").to_pylist()
    assert {row["key"]: (row["width"], row["height"]) for row in rows} == {
        "wide": (48, 32),
        "tall": (32, 48),
        "square": (32, 32),
    }


def test_a_second_run_does_nothing_and_loads_nothing(run):
    sample(run, 2)
    grid = run / "samples" / "stage2" / "grid.png"
    before = grid.stat().st_mtime_ns
    command = [sys.executable, "-X", "importtime", "-m", "sampling", "--recipe", str(run / "recipe.toml")]
    result = subprocess.run([*command, "--run", str(run), "--stage", "2"], capture_output=True, text=True, check=True)
    assert "nothing to do" in result.stderr
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time")}
    assert not imported & {"torch", "transformers", "diffusers", "ray"}
    assert grid.stat().st_mtime_ns == before


def test_only_missing_or_stale_images_are_drawn(run, monkeypatch):
    drawn = count_draws(monkeypatch)
    sample(run, 2)
    folder = run / "samples" / "stage2"
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    drawn.clear()
    (folder / "tall.png").unlink()
    (folder / "square.png").write_bytes(b"\x89PNG half a file")
    sample(run, 2)
    assert sorted(drawn) == ["square", "tall", "wide"]  # `wide` shares its batch with `tall`
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before
    drawn.clear()
    sample(run, 2, images_per_prompt=2)
    assert sorted(drawn) == ["square", "square", "tall", "wide"]  # the batch of the first `square` was not full
    drawn.clear()
    sample(run, 2, guidance_scale=1.0)
    assert len(drawn) == 3
    drawn.clear()
    save_checkpoint(run, 2, randomised(PixArt(PIXART), seed=1), step=8)
    sample(run, 2, guidance_scale=1.0)
    assert len(drawn) == 3


@pytest.mark.parametrize("name", ["tall.png", "grid.png"])
def test_a_finished_image_cut_short_is_made_anew_and_no_other_file_touched(run, monkeypatch, name, capsys):
    sample(run, 2)
    folder = run / "samples" / "stage2"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    whole = before[name]
    (folder / name).write_bytes(whole[:-40])  # prompt, seed and size stand before the pixels
    drawn = count_draws(monkeypatch)
    sample(run, 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    written = {path.name for path in folder.glob("*.png") if path.stat().st_mtime_ns != times[path.name]}
    assert written == {name, "grid.png"}
    assert bool(drawn) == (name == "tall.png")
    assert f"drew {int(name == 'tall.png')} of 3 images" in " ".join(capsys.readouterr().err.split())


def test_an_image_with_changed_bytes_is_named_where_it_is_read(run):
    sample(run, 2)
    path = run / "samples" / "stage2" / "tall.png"
    data = path.read_bytes()
    first = data.index(b"IDAT") + 4
    path.write_bytes(data[:first] + bytes(20) + data[first + 20 :])
    (path.parent / ".done" / "samples.json").unlink()
    with pytest.raises(
        UserError, match=r"tall\.png cannot be read as an image: bytes of .*; delete it, and the command"
    ):
        sample(run, 2)


def interrupt(run: Path, monkeypatch: pytest.MonkeyPatch, *, num_draws: int, **table: object) -> None:
    draw, num_drawn = renderer.Renderer.draw, 0

    def failing(self, requests, texts):
        nonlocal num_drawn
        num_drawn += 1
        if num_drawn > num_draws:
            raise KeyboardInterrupt
        return draw(self, requests, texts)

    with monkeypatch.context() as patch:
        patch.setattr(renderer.Renderer, "draw", failing)
        with pytest.raises(KeyboardInterrupt):
            sample(run, 2, **table)


def test_what_other_settings_drew_over_is_drawn_again(run, monkeypatch):
    table = {"batch_size": 1, "images_per_prompt": 4}
    sample(run, 2, **table)
    folder = run / "samples" / "stage2"
    expected = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    shutil.rmtree(folder)
    # Pieces of a job are finished under settings, and others that were tried in between drew over some of their images.
    interrupt(run, monkeypatch, num_draws=10, **table)
    assert list(folder.glob(".parts/samples/*.report"))
    interrupt(run, monkeypatch, num_draws=4, **table, guidance_scale=1.0)
    sample(run, 2, **table)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == expected


def test_an_interrupted_run_continues(run, monkeypatch):
    draw = renderer.Renderer.draw
    num_batches = 0

    def failing(self, requests, texts):
        nonlocal num_batches
        num_batches += 1
        if num_batches == 2:
            raise KeyboardInterrupt
        return draw(self, requests, texts)

    with monkeypatch.context() as patch:
        patch.setattr(renderer.Renderer, "draw", failing)
        with pytest.raises(KeyboardInterrupt):
            sample(run, 2)
    folder = run / "samples" / "stage2"
    assert len(list(folder.glob("*.png"))) == 2
    assert not (folder / "samples.parquet").exists()
    drawn = count_draws(monkeypatch)
    sample(run, 2)
    assert len(drawn) == 1
    assert read_manifest(folder).num_kept == 3


@pytest.mark.parametrize("solver", ["dpm-solver++", "iddpm", "sa-solver"])
def test_images_do_not_depend_on_the_batch(run, solver):
    sample(run, 2, batch_size=3, solver=solver)
    folder = run / "samples" / "stage2"
    together = {path.name: pixels(path) for path in folder.glob("*.png") if path.name != "grid.png"}
    for path in folder.glob("*.png"):
        path.unlink()
    sample(run, 2, batch_size=1, solver=solver)
    assert len(together) == 3
    for name, expected in together.items():
        assert np.abs(pixels(folder / name) - expected).max() <= 1


def test_large_images_are_decoded_one_by_one(run, monkeypatch):
    num_decoded: list[int] = []
    decoded = KLCodec.pixels

    def recording(self, latents, **how):
        num_decoded.append(len(latents))
        return decoded(self, latents, **how)

    monkeypatch.setattr(KLCodec, "pixels", recording)
    monkeypatch.setattr(renderer, "MAX_DECODED_PIXELS", 2 * 32 * 32)
    sample(run, 2, batch_size=3)
    assert num_decoded == [2, 1]


def test_images_per_prompt_are_single_images_of_their_seeds(run):
    sample(run, 2, prompt="a green star", images_per_prompt=2, seed=5)
    folder = run / "samples" / "stage2-prompt"
    second = pq.read_table(folder / "samples.parquet").to_pylist()[1]
    expected = pixels(folder / second["file"])
    sample(run, 2, prompt="a green star", seed=6)
    (row,) = pq.read_table(folder / "samples.parquet").to_pylist()
    assert row["seed"] == second["seed"] == 6
    assert np.abs(pixels(folder / row["file"]) - expected).max() <= 1


@pytest.mark.parametrize(
    ("out_channels", "guidance_scale", "size", "negative"),
    [
        (8, 4.5, "32x32", ""),
        (8, 1.0, "48x32", ""),
        (8, 4.5, "48x32", "Dark, two squares"),
        (4, 4.5, "48x32", "Dark, two squares"),
        (4, 1.0, "32x32", ""),
    ],
)
def test_diffusers_pipeline_draws_the_same_image(run, out_channels, guidance_scale, size, negative):
    """With the scheduler that lies beside the model; eight channels are of ddpm, four of flow."""
    save_checkpoint(run, 2, randomised(PixArt(replace(PIXART, out_channels=out_channels))))
    prompt, seed = "A red circle, left", 11
    settings = {"guidance_scale": guidance_scale, "size": size, "negative_prompt": negative}
    sample(run, 2, prompt=prompt, seed=seed, num_steps=20, **settings)
    folder = run / "samples" / "stage2-prompt"
    (row,) = pq.read_table(folder / "samples.parquet").to_pylist()
    pipeline = PixArtAlphaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(run / "t5"),
        text_encoder=T5EncoderModel.from_pretrained(run / "t5"),
        vae=AutoencoderKL.from_pretrained(run / "vae"),
        transformer=PixArtTransformer2DModel.from_pretrained(run / "training" / "stage2" / "step-7" / "model"),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(
            run / "training" / "stage2" / "step-7", subfolder="scheduler"
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt,
        negative_prompt=negative,
        num_inference_steps=20,
        guidance_scale=guidance_scale,
        width=row["width"],
        height=row["height"],
        latents=draw_noise(make_generators([seed]), (4, row["height"] // 8, row["width"] // 8)),
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=MAX_TOKENS,
    ).images[0]
    actual = pixels(folder / row["file"])
    assert actual.std() > 1
    assert np.abs(actual - np.asarray(image).astype(int)).max() <= 2


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_flow_draws_with_its_own_solvers(run, solver, capsys):
    save_checkpoint(run, 2, randomised(PixArt(replace(PIXART, out_channels=4))))
    sample(run, 2, "--plan", solver=solver, num_steps=4)
    num_passes = {"euler": 4, "heun": 7}[solver] * 3 * 2
    assert f"{num_passes} passes of one image" in " ".join(capsys.readouterr().err.split())
    sample(run, 2, solver=solver, num_steps=4)
    assert pixels(run / "samples" / "stage2" / "square.png").std() > 1


def test_another_process_than_the_checkpoints_is_refused(run):
    with pytest.raises(
        UserError,
        match=r"sampling\.solver = 'euler' .* stage 2, step 7 \(.*step-7/model\), which is of process ddpm: dpm-sol",
    ):
        sample(run, 2, solver="euler")
    with pytest.raises(UserError, match=r"training\.stage2\.process is 'flow' in the recipe, but .*7 was trained"):
        sample(run, 2, "--set", 'training.stage2.process="flow"')
    sample(run, 2, "--plan", "--set", 'training.process="flow"', "--set", 'training.stage2.process="ddpm"')


def test_a_bare_transformer_folder_takes_its_encoders_from_features(run):
    save_diffusers(randomised(PixArt(replace(PIXART, sample_size=8))), run / "pipeline" / "transformer")
    recipe = write_recipe(run, checkpoint=str(run / "pipeline"))
    features = f'[features]\ntext_model = "{run / "t5"}"\nvae_model = "{run / "vae"}"\nmax_tokens = 40\n'
    recipe.write_text(recipe.read_text() + features)
    main(["--recipe", str(recipe), "--run", str(run), "--stage", "2"])
    rows = pq.read_table(run / "samples" / "stage2" / "samples.parquet").to_pylist()
    assert {(row["width"], row["height"]) for row in rows} == {(80, 48), (48, 80), (64, 64)}


def test_plan_writes_nothing(run, capsys):
    sample(run, 3, "--plan")
    output = " ".join(capsys.readouterr().err.split())
    assert "would draw 3 of 3 images" in output and "18 passes" in output
    assert not (run / "samples").exists()


def test_truncation_names_the_lost_words(run, capsys):
    sample(run, 2, prompt="a circle " * 5 + "and a purple elephant")
    # the tiny tokenizer has one token per character, and the log wraps
    printed = "".join(capsys.readouterr().err.split())
    assert "themodelreads40tokens" in printed and "lost:ircleandapurpleelephant" in printed
    assert "drew1of1images(1of1promptscutat40tokens)" in printed
    (row,) = pq.read_table(run / "samples" / "stage2-prompt" / "samples.parquet").to_pylist()
    assert row["lost_words"].replace(" ", "") == "ircleandapurpleelephant"


@pytest.mark.parametrize(
    ("stage", "table", "message"),
    [
        (2, {"prompts": "{run}/none.txt"}, r"sampling\.prompts .*none\.txt does not exist"),
        (1, {"prompt": "a fox"}, "knows classes, not text"),
        (1, {"classes": [5]}, r"sampling\.classes 5: stage 1, step 7 has 5 classes"),
        (2, {"prompt": "  "}, "the prompt is empty"),
        (2, {"size": "33x32"}, "33 is not a positive multiple of 16"),
        (2, {"solver": "ddim"}, r"sampling\.solver = 'ddim'"),
        (
            2,
            {"checkpoint": "no/such/folder/here"},
            r"sampling\.checkpoint: model folder no/such/folder/here does not exist",
        ),
        (2, {"checkpoint": "nobody/has-this"}, r"sampling\.checkpoint = 'nobody/has-this' .* not in the hub cache"),
        (2, {"checkpoint": "no/such.pth"}, r"sampling\.checkpoint: no/such\.pth does not exist"),
    ],
)
def test_mistakes_get_one_clear_line(run, stage, table, message):
    with pytest.raises(UserError, match=message):
        sample(run, stage, **table)


def test_sizes_outside_the_trained_ones_are_warned_of(run, capsys):
    sample(run, 3, prompt="a fox", size="48x32")
    assert "not at this one" not in capsys.readouterr().err
    sample(run, 3, prompt="a fox", size="64x16")
    printed = " ".join(capsys.readouterr().err.split())
    assert "sampling.size 64x16: stage 3, step 7 was trained at 32 pixels, in 3 sizes, and not at this one" in printed


def test_ten_thousand_words_leave_an_image_that_carries_them_all(run, capsys):
    prompt = " ".join(f"word{number}" for number in range(10_000))
    sample(run, 2, prompt=prompt)
    (path,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
    with Image.open(path) as image:
        assert image.info["prompt"] == prompt
    printed = "".join(capsys.readouterr().err.split())
    assert "themodelreads40tokens" in printed and len(printed) < 2000


def test_missing_checkpoint_names_the_command(run):
    shutil.rmtree(run / "training" / "stage2" / "step-7")
    with pytest.raises(FileNotFoundError, match=r"make train RUN=.* STAGE=stage2"):
        sample(run, 2)


def test_another_vae_scale_is_refused(run):
    config = run / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.45", "0.18215"))
    with pytest.raises(UserError, match=r"scaling_factor is 0\.18215, but 0\.45 is needed"):
        sample(run, 2)
    assert not list((run / "samples" / "stage2").glob("*.png"))
