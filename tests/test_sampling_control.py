"""`sampling.control`: what an image leads, through which branch, when it is drawn anew, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from led_drawing import drawn, listening, pixels, sample, save_noise, words
from PIL import Image
from safetensors.torch import load_file
from sampling_run import (
    MAX_TOKENS,
    PIXART,
    make_run,
    save_adapter,
    save_adapter_checkpoint,
    save_branch,
    save_control_checkpoint,
    save_edges,
)
from sound_run import require_sound
from test_pixart_control import Research
from transformers import AutoTokenizer, T5EncoderModel

from encoders.weights import identity_of
from errors import MissingFileError, UserError
from pipelines.store.bases import describe_base
from pixart.drawing.denoise import draw_noise, make_generators
from sampling.branches import add_branch
from sampling.trained_model import open_checkpoint_model, open_run_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "run")
    save_control_checkpoint(run, "edges")
    save_edges(tmp_path / "edges.png")
    return run


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    return listening(caplog, monkeypatch)


def test_an_image_is_that_of_diffusers_parts_in_a_plain_loop(run: Path, tmp_path: Path) -> None:
    found = drawn(run, control=str(tmp_path / "edges.png"), size="48x32", seed=3)
    base, step = run / "training" / "stage3" / "step-7", run / "training" / "edges" / "step-7"
    network = Research(base / "model", PIXART.width, num_copies=1).eval()
    missing = network.load_state_dict(load_file(step / "control" / "diffusion_pytorch_model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    vae: Any = AutoencoderKL.from_pretrained(run / "vae")
    scale = json.loads((base / "trainer.json").read_text())["vae"]["scaling_factor"]
    with Image.open(tmp_path / "edges.png") as image:
        edges = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC, reducing_gap=3.0))
    scheduler: Any = DPMSolverMultistepScheduler.from_pretrained(base / "scheduler")
    scheduler.set_timesteps(3)
    tokens = [
        AutoTokenizer.from_pretrained(run / "t5")(
            text, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        for text in ("", "a star")
    ]
    ids, mask = (torch.cat([item[name] for item in tokens]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        encoded = torch.from_numpy(edges.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        control = (vae.encode(encoded).latent_dist.mean * scale).repeat(2, 1, 1, 1)
        encoder: Any = T5EncoderModel.from_pretrained(run / "t5")
        text = encoder(ids, attention_mask=mask).last_hidden_state
        latents = draw_noise(make_generators([3]), (4, 4, 6))
        for time in scheduler.timesteps:
            rows = torch.cat([latents, latents])
            null, led = network(rows, time.expand(2), text, mask, control)[:, :4].chunk(2)
            latents = scheduler.step(null + 4.5 * (led - null), time, latents, return_dict=False)[0]
        decoded = vae.decode(latents / scale).sample[0]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 2
    assert np.abs(found - drawn(run, size="48x32", seed=3)).max() > 20


def test_strength_goes_from_what_the_base_draws_to_the_whole_branch(run: Path, tmp_path: Path) -> None:
    control = str(tmp_path / "edges.png")
    base = drawn(run, "3", size="48x32")
    assert np.array_equal(drawn(run, control=control, control_strength=0.0, size="48x32"), base)
    whole = drawn(run, control=control, size="48x32")
    half = drawn(run, control=control, control_strength=0.5, size="48x32")
    assert not np.array_equal(whole, half) and not np.array_equal(half, base)
    assert np.array_equal(drawn(run, control=control, size="48x32"), whole)


def test_another_image_of_the_same_name_is_drawn_by_anew_and_its_map_kept(run: Path, tmp_path: Path) -> None:
    control = tmp_path / "edges.png"
    first = drawn(run, control=str(control))
    folder = run / "samples" / "edges-prompt"
    (map_file,) = (folder / "control").glob("*.png")
    former = pixels(map_file)
    assert former.shape == first.shape == (32, 48, 3), "the bucket nearest to 60 x 40"
    save_edges(control, seed=1)
    second = drawn(run, control=str(control))
    assert not np.array_equal(first, second) and not np.array_equal(pixels(map_file), former)
    before = map_file.stat().st_mtime_ns
    moved = tmp_path / "elsewhere" / "moved.png"
    moved.parent.mkdir()
    shutil.move(control, moved)
    assert np.array_equal(drawn(run, control=str(moved)), second)
    assert map_file.stat().st_mtime_ns == before, "the same image from elsewhere draws nothing"
    map_file.unlink()
    assert np.array_equal(drawn(run, control=str(moved)), second) and map_file.is_file()
    require_sound(run)


def test_each_prompt_is_led_by_its_own_image_and_those_without_are_drawn_as_the_base_draws(
    run: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"key": "a", "prompt": "a star", "control": "maps/wide.png"},
        {"key": "b", "prompt": "a star", "control": str(save_edges(tmp_path / "tall.png", size=(40, 60), seed=2))},
        {"key": "c", "prompt": "a star", "control": None},
        {"key": "d", "prompt": "a star", "aspect_ratio": 1.5},
        {"key": "e", "prompt": "a star", "control": "maps/wide.png", "aspect_ratio": 1.0},
    ]
    save_edges(run / "maps" / "wide.png", seed=3)
    (run / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table: dict[str, object] = {"prompts": "{run}/prompts.jsonl", "batch_size": 4}
    folder = sample(run, "edges", **table)
    assert "2 of 5 prompts have no control image and are drawn without" in words(said)
    sizes = {key: pixels(folder / f"{key}.png").shape[:2] for key in "abcde"}
    assert sizes == {"a": (32, 48), "b": (48, 32), "c": (32, 32), "d": (32, 48), "e": (32, 32)}
    assert sorted(path.stem for path in (folder / "control").glob("*.png")) == ["a", "b", "e"]
    grid = pixels(folder / "grid.png")
    assert (grid == 255).all(axis=2).any()
    plain = sample(run, "3", **(table | {"num_steps": 3}))
    assert "has no control branch: the control images of 3 prompts are not looked at" in words(said)
    for key in "cd":
        assert np.array_equal(pixels(folder / f"{key}.png"), pixels(plain / f"{key}.png"))
    assert not np.array_equal(pixels(folder / "e.png"), pixels(plain / "e.png"))
    # one at a time as in a batch
    before = {key: pixels(folder / f"{key}.png") for key in "abcde"}
    shutil.rmtree(folder)
    sample(run, "edges", **(table | {"batch_size": 1}))
    assert all(np.abs(pixels(folder / f"{key}.png") - before[key]).max() <= 1 for key in "abcde")
    require_sound(run)


def test_a_line_names_the_image_that_is_not_there(run: Path) -> None:
    (run / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "control": "gone.png"}\n')
    with pytest.raises(MissingFileError, match=r"p\.jsonl:2: control .*run/gone\.png does not exist"):
        sample(run, "edges", prompts="{run}/p.jsonl")
    (run / "p.jsonl").write_text('{"prompt": "b", "control": 3}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:1: control 3 is no path of an image"):
        sample(run, "edges", prompts="{run}/p.jsonl")


def test_a_branch_is_named_by_its_stage_checkpoint_folder_or_file(run: Path, tmp_path: Path) -> None:
    control, step = str(tmp_path / "edges.png"), run / "training" / "edges" / "step-7"
    expected = drawn(run, control=control)
    places = ["{run}/training/edges", str(step), str(step / "control")]
    places.append(str(step / "control" / "diffusion_pytorch_model.safetensors"))
    for place in places:
        assert np.array_equal(drawn(run, "3", control=control, control_branch=place), expected), place
    for place in (str(step), str(step / "control")):
        assert np.array_equal(drawn(run, "3", control=control, checkpoint=place), expected), place
    trained = add_branch(open_run_model(run, "stage3"), "{run}/training/edges", run=run)
    assert (
        trained.name == "stage 3, step 7 + edges, step-7" and trained.identity == open_run_model(run, "edges").identity
    )


def test_weights_know_their_branch_by_its_bytes(run: Path) -> None:
    first = open_run_model(run, "edges")
    assert first.name == "edges, step 7" and first.branch is not None and first.branch.num_copies == 1
    save_control_checkpoint(run, "edges", seed=6)
    second = open_run_model(run, "edges")
    assert first.identity != second.identity
    assert (
        first.identity.partition("+")[0] == second.identity.partition("+")[0] == open_run_model(run, "stage3").identity
    )


def test_a_branch_on_adapters_is_drawn_with_them(run: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "style")
    save_control_checkpoint(run, "styled", adapter=adapter)
    control = str(tmp_path / "edges.png")
    expected = drawn(run, "edges", control=control, lora=[str(adapter)])
    assert np.array_equal(drawn(run, "styled", control=control), expected)
    assert np.array_equal(drawn(run, "styled"), drawn(run, "3", lora=[str(adapter)]))


def test_what_is_odd_about_a_branch_is_said(run: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    stage3 = open_run_model(run, "stage3")
    other = {"identity": "sha256:1", "location": "/its/weights", "adapters": []}
    parts: dict[str, Any] = {
        "process": stage3.process,
        "text": {**(stage3.text or {}), "model": "/other/t5"},
        "vae": stage3.vae,
    }
    add_branch(stage3, str(save_branch(tmp_path / "other", base=other, **parts)), run=run)
    assert "was trained on the weights of /its/weights, and is added to others" in words(said)
    assert "was trained with text '/other/t5', and is drawn with" in words(said)
    with pytest.raises(UserError, match=r"was trained with process flow, but stage 3, step 7 with ddpm"):
        parts["process"] = {"name": "flow"}
        flow = save_branch(tmp_path / "flow", base=other, **parts)
        add_branch(stage3, str(flow), run=run)


def test_a_branch_that_has_learnt_on_adapters_misses_those_alone_that_are_not_there(
    run: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    adapter = save_adapter_checkpoint(run, "styled") / "adapter"
    base = run / "training" / "stage2" / "step-7" / "model"
    known = describe_base(base, (adapter,), run=run, identity=identity_of(base), shape=dataclasses.asdict(PIXART))
    branch = str(save_branch(tmp_path / "branch", base=known, process={"name": "ddpm"}))
    add_branch(open_run_model(run, "styled"), branch, run=run)
    assert "add that, too" not in words(said)
    add_branch(open_run_model(run, "stage2"), branch, run=run)
    assert "was trained on its base with {run}/training/styled/step-7/adapter: add that, too" in words(said)


def test_a_branch_of_another_shape_or_of_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    stage3 = open_run_model(run, "stage3")
    wide = save_branch(tmp_path / "wide", config=dataclasses.replace(PIXART, head_dim=16))
    cases = {
        str(wide): r"sampling\.control_branch: .*before_proj.weight is \(32, 32\), .* needs \(24, 24\)",
        "{run}/training/stage2": r"sampling\.control_branch .*stage2 is a checkpoint of a whole network, and no",
        str(run / "t5"): r"sampling\.control_branch: .*t5 is no control branch: the folder holds none of",
        str(tmp_path / "gone.pth"): r"sampling\.control_branch: .*gone\.pth does not exist",
        "someone/control/file.pth": r"sampling\.control_branch: .*`hf download someone/control file\.pth`",
        "someone/control": r"sampling\.control_branch = 'someone/control' .* not in the hub cache",
    }
    for place, match in cases.items():
        with pytest.raises((UserError, MissingFileError), match=match):
            add_branch(stage3, place, run=run)
    with pytest.raises(UserError, match=r"edges, step 7 has a control branch of its own"):
        add_branch(open_run_model(run, "edges"), "{run}/training/edges", run=run)
    with pytest.raises(UserError, match="branches are for a PixArt"):
        add_branch(open_run_model(run, "stage1"), "{run}/training/edges", run=run)
    with pytest.raises(UserError, match=r"is a control branch, and no adapter: name it as sampling\.control_branch"):
        drawn(run, "3", lora=["{run}/training/edges"])


def test_images_that_cannot_lead_are_refused_before_anything_is_drawn(run: Path, tmp_path: Path) -> None:
    image = tmp_path / "edges.png"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(save_noise(tmp_path / "noise.png").read_bytes()[:300])
    save_edges(tmp_path / "line.png", size=(200_000, 2))
    cases = {
        str(tmp_path / "gone.png"): r"sampling\.control .*gone\.png does not exist",
        str(tmp_path): r"sampling\.control .* is a folder",
        str(tmp_path / "text.png"): r"sampling\.control .*text\.png cannot lead what is drawn: not_an_image",
        str(tmp_path / "cut.png"): r"sampling\.control .*cut\.png cannot lead what is drawn: corrupt_image",
        str(tmp_path / "line.png"): r"sampling\.control .*line\.png cannot lead what is drawn: too_elongated",
    }
    for place, match in cases.items():
        with pytest.raises((UserError, MissingFileError), match=match):
            drawn(run, control=place)
    assert not list((run / "samples").rglob("*.png"))
    with pytest.raises(
        UserError, match=r"sampling\.control is set, but stage 3, step 7 has no control branch: name one"
    ):
        drawn(run, "3", control=str(image))
    with pytest.raises(UserError, match=r"sampling\.control is set, but stage 1, step 7 knows classes"):
        sample(run, "1", control=str(image))
    with pytest.raises(UserError, match=r"sampling\.control_strength is 0\.5, but nothing leads what is drawn"):
        drawn(run, control_strength=0.5)
    with pytest.raises(UserError, match=r"sampling\.control_is is 'photo', but nothing leads what is drawn"):
        drawn(run, "3", control_is="photo")
    with pytest.raises(UserError, match=r"sampling\.control_strength.*less than or equal to 2"):
        drawn(run, control=str(image), control_strength=2.5)
    (run / "p.jsonl").write_text(json.dumps({"prompt": "b", "control": str(image)}))
    with pytest.raises(UserError, match=r"sampling\.control is set, and 1 of the prompts have a control image"):
        sample(run, "edges", prompts="{run}/p.jsonl", control=str(image))


def test_a_plan_says_image_crop_branch_and_strength(run: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    image = save_edges(tmp_path / "large.png", size=(640, 400))
    sample(run, "edges", "--plan", prompt="a star", control=str(image), control_strength=0.8)
    assert "large.png: 640x400, resized to 51x32 and cut in the middle to 48x32" in words(said)
    assert "(1 copies) at strength 0.8" in words(said)
    assert "memory while encoding control images" in words(said) and "transformer and control branch" in words(said)
    assert not (run / "samples").exists()


def test_turned_and_transparent_images_lead_as_they_are_shown(run: Path, tmp_path: Path) -> None:
    with Image.open(tmp_path / "edges.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter to the right
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        image.convert("RGBA").save(tmp_path / "alpha.png")
        image.convert("L").save(tmp_path / "grey.png")
    expected = drawn(run, control=str(tmp_path / "edges.png"))
    for name in ("turned", "alpha", "grey"):
        assert np.array_equal(drawn(run, control=str(tmp_path / f"{name}.png")), expected), name


def test_an_image_of_one_colour_is_said_to_lead_nothing(
    run: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    drawn(run, control=str(tmp_path / "edges.png"))
    assert "leads nothing" not in words(said)
    lines = np.zeros((40, 60, 4), np.uint8)
    lines[20] = 255
    Image.fromarray(lines).save(tmp_path / "transparent.png")
    drawn(run, control=str(tmp_path / "transparent.png"))
    assert "transparent.png is of one colour all over, and leads nothing; what is transparent is white" in words(said)


def test_nothing_that_leads_is_said_once(run: Path, said: pytest.LogCaptureFixture) -> None:
    sample(run, "edges")
    assert words(said).count("nothing leads what is drawn, so its control branch adds nothing") == 1
    for row in ("wide", "tall", "square"):
        led, plain = (run / "samples" / stage / f"{row}.png" for stage in ("edges", "stage3"))
        sample(run, "3")
        assert np.array_equal(pixels(led), pixels(plain))


def test_a_checkpoints_name_needs_no_run(run: Path) -> None:
    step = run / "training" / "edges" / "step-7"
    assert open_checkpoint_model(step).identity == open_run_model(run, "edges").identity
