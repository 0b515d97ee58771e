"""Previews while a stage trains: what they show, and that nothing of the training is otherwise for them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sound_run import require_sound
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training_run import untimed
from tiny_encoders import save_codec, save_tokenizer
from training_run import D_TEXT, all_metrics, arguments, make_run, train
from transformers import T5Config, T5EncoderModel
from wandb_files import history

from errors import UserError
from pipelines.command import parse_command
from pipelines.store.manifest import manifest_path
from pipelines.store.previews import preview_folder, preview_steps, read_previews, write_previews
from sampling.config import SamplingConfig
from sampling.renderer import Renderer
from sampling.requests import ImageRequest
from sampling.text_encoding import load_texts
from sampling.trained_model import open_run_model
from toyworld.previews import preview_rows
from training.data.stage_data import survey_stage
from training.launch.preflight import Preflight, say_oddities
from training.previews.page import write_page
from training.previews.plan import describe_previews, require_previews
from training.previews.texts import EMBEDDINGS
from training.stages.stage import TrainingJob, open_stage

PROMPTS = ["a red circle", "a blue square at the left"]
NUM_STEPS = 6


def save_text_encoder(folder: Path) -> Path:
    """Write a random T5 encoder as wide as the embeddings of the tiny run's features."""
    folder.mkdir()
    torch.manual_seed(0)
    shape = {"d_model": D_TEXT, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    T5EncoderModel(T5Config(vocab_size=save_tokenizer(folder), **shape)).save_pretrained(folder)
    return folder


def make_drawing_run(folder: Path) -> Path:
    """A tiny run whose features name a text encoder and a VAE that are there."""
    run = make_run(folder)
    text, vae = save_text_encoder(folder / "t5"), save_codec(folder / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5, "shift_factor": 0.1}))
    for features in (run / "features").iterdir():
        path = manifest_path(features)
        manifest = (
            path.read_text().replace('"toy/t5"', json.dumps(str(text))).replace('"toy/vae"', json.dumps(str(vae)))
        )
        path.write_text(manifest)
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("toy/t5", str(text)).replace("toy/vae", str(vae)))
    return run


def settings(**changed: object) -> dict[str, object]:
    drawn = {"preview_prompts": PROMPTS, "preview_every": 4, "preview_num_steps": 2}
    return {"starts_from": "scratch", "num_steps": NUM_STEPS, "checkpoint_every": 3, **drawn, **changed}


def stage(run: Path, name: str = "stage2") -> Path:
    return run / "training" / name


def shown(run: Path, step: int) -> dict[str, bytes]:
    return {each.prompt: Image.open(each.path).tobytes() for each in read_previews(stage(run), step)}


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: of its average, its weights, masters and moments."""
    folder = stage(run) / f"step-{step}"
    found = dict(load_file(folder / "model" / "diffusion_pytorch_model.safetensors"))
    for path in sorted((folder / "deepspeed").glob("*.pt")):
        leaves = torch.utils._pytree.tree_leaves(torch.load(path, weights_only=False))
        found |= {f"{path.name} {number}": leaf for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    return found


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_drawing_run(tmp_path_factory.mktemp("features"))


@pytest.fixture
def run(features: Path, tmp_path: Path) -> Path:
    return copy_of(features, tmp_path)


def copy_of(features: Path, folder: Path) -> Path:
    (folder / "run").mkdir(parents=True)
    shutil.copy(features.parent / "recipe.toml", folder)
    shutil.copytree(features / "features", folder / "run" / "features")
    return folder / "run"


@pytest.mark.parametrize(
    "zero",
    [
        {"zero_stage": 0, "keep_activations": "inputs"},
        {"zero_stage": 3, "dtype": "bf16", "process": "flow", "trains": ["blocks.*", "final*"]},
    ],
)
@pytest.mark.slow
def test_a_run_with_previews_and_resumes_over_them_is_that_without_to_the_bit(features, tmp_path, zero) -> None:
    plain, drawn = copy_of(features, tmp_path / "plain"), make_drawing_run(tmp_path / "drawn")
    train(plain, 2, **settings(preview_prompts=[], **zero))
    said = train(drawn, 2, **settings(num_steps=3, **zero))
    assert "encoding 2 prompts of previews" in said
    shutil.rmtree(drawn.parent / "t5")  # which a resume does not need
    said = train(drawn, 2, **settings(**zero))
    assert "encoding" not in said
    ours, theirs = state(drawn, NUM_STEPS), state(plain, NUM_STEPS)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert untimed(all_metrics(drawn, 2))[:1] == untimed(all_metrics(plain, 2))[:1]
    last = [untimed(all_metrics(run, 2))[-1] for run in (drawn, plain)]
    assert last[0] == last[1] and last[0]["step"] == NUM_STEPS
    assert preview_steps(stage(drawn)) == [0, 3, 4, 6], "3 was the last once"
    drawings = [shown(drawn, step) for step in (0, 3, 4, 6)]
    assert all(list(each) == PROMPTS for each in drawings)
    assert len({each[PROMPTS[0]] for each in drawings}) == 4, "the weights have moved"
    require_sound(drawn, room="training")


def test_the_last_preview_is_what_make_sample_draws(run) -> None:
    train(run, 2, **settings(num_steps=2, num_processes=1, preview_seed=7, preview_guidance_scale=2.0))
    trained = open_run_model(run, "stage2")
    config = SamplingConfig(num_steps=2, guidance_scale=2.0, text_dtype="bfloat16", num_threads=1)
    requests = [
        ImageRequest(
            key=str(number), prompt=prompt, number=0, label=None, seed=7, width=32, height=32, file=f"{number}.png"
        )
        for number, prompt in enumerate(PROMPTS)
    ]
    assert trained.text is not None
    images = Renderer(config, trained).draw(requests, load_texts(requests, config, trained.text)).images()
    assert [image.tobytes() for image in images] == list(shown(run, 2).values())


def pictures_on_tensorboard(run: Path) -> dict[str, list[int]]:
    board = EventAccumulator(str(stage(run) / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    return {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}


def wandb_runs(run: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """The id of each offline run of W&B in a stage's folder, and what it has logged."""
    paths = sorted((stage(run) / "wandb").glob("offline-run-*/run-*.wandb"))
    return [(path.stem.removeprefix("run-"), history(path)) for path in paths]


@pytest.mark.slow
def test_previews_and_metrics_are_on_the_boards_and_a_resume_goes_on_there(run, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = settings(num_processes=1, wandb_project="crescents", log_every=1, preview_every=3)
    assert "Weights & Biases: offline, in" in train(run, 2, **told | {"num_steps": 3})
    shutil.rmtree(preview_folder(stage(run), 3))  # as a stop before it was drawn leaves it
    train(run, 2, **told)
    assert shown(run, 3).keys() == set(PROMPTS)
    assert pictures_on_tensorboard(run) == {f"preview/{number:02d}": [0, 3, 3, 6] for number in range(2)}
    (first, before), (second, after) = wandb_runs(run)
    assert first == second == json.loads((stage(run) / "wandb.json").read_text())["id"]
    losses = {line["_step"]: line["loss"] for line in [*before, *after] if "loss" in line}
    assert losses == {line["step"]: line["loss"] for line in all_metrics(run, 2)}
    drawn = {line["_step"]: line["preview/01/caption"] for line in [*before, *after] if "preview/01/caption" in line}
    assert drawn == dict.fromkeys([0, 3, 6], PROMPTS[1])
    require_sound(run, room="training")


def test_boards_that_fail_or_are_not_installed_end_no_training(run, monkeypatch) -> None:
    told = settings(num_processes=1, wandb_project="p", preview_prompts=[], num_steps=1)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(run.parent / "netrc"))
    said = train(run, 2, **told)
    assert "Weights & Biases gets nothing more of this stage: No API key configured" in said
    assert "1 steps in" in said and "Traceback" not in said
    monkeypatch.setattr("training.launch.preflight.has_wandb", lambda: False)
    warnings: list[str] = []
    monkeypatch.setattr("training.launch.preflight.log.warning", warnings.append)
    job = job_with(run, **told)
    say_oddities(job, Preflight(survey=survey_stage(job), num_ranks=1, previews=None))
    assert "training.stage2.wandb_project 'p': the package wandb is not installed (pip install" in warnings[0]


def test_a_preview_that_fails_is_a_warning(run) -> None:
    """Here the VAE of the features is another one by now."""
    vae = run.parent / "vae"
    shutil.copytree(next(iter_vaes(run)), vae)
    for path in (run.parent / "recipe.toml", *(manifest_path(folder) for folder in (run / "features").iterdir())):
        path.write_text(path.read_text().replace(str(next(iter_vaes(run))), str(vae)))
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.6}))
    said = train(run, 2, **settings(num_processes=1, num_steps=1))
    assert "no previews after step 0:" in said and "no previews after step 1:" in said and "1 steps in" in said
    assert "scaling_factor" in said and "Traceback" not in said
    assert preview_steps(stage(run)) == []


def iter_vaes(run: Path) -> Iterator[Path]:
    yield Path(json.loads(manifest_path(run / "features" / "latent-32").read_text())["extra"]["vae"]["model"])


def test_a_dit_draws_classes(run) -> None:
    drawn = {"preview_classes": [0, 4], "preview_prompts": PROMPTS, "preview_num_steps": 2}
    train(run, 1, num_steps=2, num_processes=1, **drawn)
    found = read_previews(stage(run, "stage1"), 2)
    assert [each.prompt for each in found] == ["class 0", "class 4"]
    assert not (stage(run, "stage1") / EMBEDDINGS).exists(), "prompts that stages share are of those that read text"


def job_with(run: Path, stage: int = 2, **changed: object) -> TrainingJob:
    return open_stage(parse_command("training", "", argv=arguments(run, stage, **changed), has_stages=True))


@pytest.mark.parametrize(
    ("stage", "changed", "message"),
    [
        (2, {"preview_every": 0}, r"training\.preview_every = 0: Input should be greater than or equal to 1"),
        (2, {"preview_prompts": [""]}, r"training\.preview_prompts\.0 = ''"),
        (2, {"preview_size": "64"}, r"preview_size = '64': a size is width x height in pixels, such as 1024x768"),
        (2, {"preview_size": "32x40"}, r"training\.stage2\.preview_size 32x40: 40 is not a multiple of 16"),
        (1, {"preview_classes": [5]}, r"training\.stage1\.preview_classes 5: model\.num_classes is 5"),
        (2, {"preview_guidance_scale": 0.5}, r"preview_guidance_scale = 0\.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run, stage: int, changed: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        job = job_with(run, stage, **{**settings(preview_prompts=PROMPTS), **changed})
        require_previews(job, survey_stage(job))


@pytest.mark.parametrize(
    ("stage", "key", "message"),
    [
        (
            1,
            "preview_prompts=['a']",
            r"training\.stage1\.preview_prompts = \['a'\] is for network pixart, but .* 'dit'",
        ),
        (2, "preview_classes=[1]", r"training\.stage2\.preview_classes = \[1\] is for network dit, but .* 'pixart'"),
    ],
)
def test_previews_of_the_other_network_are_refused_in_a_stages_own_table(run, stage, key, message) -> None:
    argv = [*arguments(run, stage), "--set", f"training.stage{stage}.{key}"]
    with pytest.raises(UserError, match=message):
        open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_a_text_encoder_that_is_not_there_is_refused_before_the_ranks_start(tmp_path) -> None:
    run = make_drawing_run(tmp_path)
    text = tmp_path / "t5"
    shutil.rmtree(text)
    said = train(run, 2, status=2, **settings(num_processes=1))
    assert f"model folder {text} does not exist" in said and "Traceback" not in said


def test_words_that_are_lost_are_said_and_a_plan_says_what_previews_take(run, monkeypatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("training.previews.plan.log.warning", warnings.append)
    job = job_with(run, **settings(preview_prompts=["a red circle"], preview_size="48x32", preview_guidance_scale=1.0))
    plan = require_previews(job, survey_stage(job))
    assert plan is not None
    assert (
        "training.stage2.preview_prompts: the model reads 12 tokens; of 'a red circle' these words are" in warnings[0]
    )
    assert "training.stage2.preview_size 48x32 is none of the 1 sizes that are trained on" in warnings[1]
    said = describe_previews(job, plan)
    assert said.startswith("1 prompts at 48x32, every 4 steps, 3 times; on one rank each about as long as 1 samples")


def test_the_page_shows_prompts_as_text_and_every_step(run) -> None:
    prompt = "<b>a & b</b>"
    for step in (0, 4):
        write_previews(stage(run), step, [(prompt, Image.new("RGB", (8, 8), (step, 0, 0)))])
    write_previews(stage(run), 4, [(prompt, Image.new("RGB", (8, 8))), ("c", Image.new("RGB", (8, 8)))])
    page = write_page(stage(run)).read_text()
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page and "<b>a" not in page
    assert [page.count(f'src="step-{name}.png"') for name in ("0/00", "4/00", "4/01")] == [1, 1, 1]
    assert "http" not in page


def test_two_equal_prompts_have_a_row_each(run) -> None:
    """The same words from other noise, one day, or typed twice: none of the pictures is lost."""
    for step in (0, 4):
        colours = [(step, 0, 0), (0, step, 0), (0, 0, step)]
        pictures = zip(("a", "b", "a"), colours, strict=True)
        write_previews(stage(run), step, [(prompt, Image.new("RGB", (8, 8), colour)) for prompt, colour in pictures])
    page = write_page(stage(run)).read_text()
    assert page.count('<th scope="row">a</th>') == 2 and page.count('<th scope="row">b</th>') == 1
    assert [page.count(f'src="step-4/0{number}.png"') for number in range(3)] == [1, 1, 1]
    rows = preview_rows(run, "stage2")
    assert [row.prompt for row in rows] == ["a", "b", "a"]
    assert [[step for step, _ in row.pictures] for row in rows] == [[0, 4]] * 3
    assert len({picture for row in rows for step, picture in row.pictures if step == 4}) == 3
