"""An image that leads, with all else that changes how is drawn: adapters, 8 bits, fewer passes, compiled ones."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_run import (
    PIXART,
    make_run,
    randomised,
    save_adapter,
    save_checkpoint,
    save_control_checkpoint,
    save_edges,
    write_recipe,
)

from encoders.living_bytes import plain_parts
from pipelines.command import parse_command
from pipelines.store.manifest import read_manifest
from pixart.guidance_condition import with_guidance_condition
from pixart.model import PixArt
from pixart.processes.specs import lcm_student
from sampling.__main__ import main
from sampling.config import SamplingConfig
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.contestants import draw_samples, find_contestants
from sampling.prompts import Prompt
from sampling.renderer import Renderer
from sampling.requests import make_requests
from sampling.text_encoding import encode_prompts
from sampling.trained_model import open_run_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("together") / "run")
    save_control_checkpoint(run, "edges")
    save_adapter(run / "style")
    save_edges(run / "edges.png")
    return run


def drawn(run: Path, stage: str = "edges", **table: object) -> np.ndarray:
    settings = {"prompt": "a star", "control": "{run}/edges.png", "size": "48x32", **table}
    settings = {name: value for name, value in settings.items() if value is not None}
    main(["--recipe", str(write_recipe(run, **settings)), "--run", str(run), "--stage", stage])
    folder = run / "samples" / (f"stage{stage}-prompt" if stage.isdigit() else f"{stage}-prompt")
    (path,) = (path for path in folder.glob("*.png") if path.name != "grid.png")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


OTHERS = {
    "lora": {"lora": ["{run}/style"], "lora_weights": [0.7]},
    "int8": {"weight_dtype": "int8"},
    "cache": {"cache": 2},
    "interval": {"guidance_interval": [0.2, 0.8]},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("names", [("lora",), ("int8",), ("lora", "int8"), ("cache", "interval"), tuple(OTHERS)])
def test_an_image_leads_whatever_else_is_set(run: Path, names: tuple[str, ...]) -> None:
    table = {key: value for name in names for key, value in OTHERS[name].items()}
    led, plain = drawn(run, **table), drawn(run, control=None, **table)
    assert np.abs(led - plain).max() > 20
    assert np.array_equal(drawn(run, control_strength=0.0, **table), plain)
    without = drawn(run)
    is_close = set(names) <= {"int8", "bfloat16"}
    assert np.abs(led - without).max() <= 40 if is_close else not np.array_equal(led, without)
    manifest = read_manifest(run / "samples" / "edges-prompt")
    assert "control_strength" not in manifest.fingerprint.fields


STUDENT_OTHERS = {
    "lora": {"lora": ["{run}/style"], "lora_weights": [0.7]},
    "int8": {"weight_dtype": "int8"},
    "control": {"control": "{run}/edges.png", "control_branch": "{run}/training/edges", "control_strength": 0.8},
}


@pytest.mark.parametrize("number", [0, 1, 2], ids=["one", "two", "three"])
@pytest.mark.parametrize("guidance", [7.5, (4.0, 16.0)], ids=["inside", "told"])
def test_a_student_is_led_with_adapters_and_in_8_bits(run: Path, number: int, guidance: float | tuple) -> None:
    network = PixArt(PIXART) if isinstance(guidance, float) else with_guidance_condition(PixArt(PIXART))
    folder = save_checkpoint(run, 2, randomised(network, seed=9))
    trainer = json.loads((folder / "trainer.json").read_text())
    trainer["process"]["student"] = lcm_student(guidance=guidance)
    (folder / "trainer.json").write_text(json.dumps(trainer))
    plain = {"stage": "2", "control": None}
    found: dict[tuple[str, ...], np.ndarray] = {(): drawn(run, **plain)}
    for names in itertools.combinations(STUDENT_OTHERS, number + 1):
        table = {key: value for name in names for key, value in STUDENT_OTHERS[name].items()}
        found[names] = drawn(run, **(plain | table))
        (path,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
        with Image.open(path) as image:
            settings = json.loads(image.info["settings"])
        assert (settings["solver"], settings["num_steps"]) == ("lcm", 3), "the steps are typed, the solver is not"
    images = list(found.values())
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(images, 2))


def test_lcm_lora_draws_what_a_branch_leads(run: Path) -> None:
    trainer = json.loads((run / "training" / "stage3" / "step-7" / "trainer.json").read_text())
    base = {"identity": "sha256:1", "location": "/teacher", "adapters": []}
    process = {**trainer["process"], "student": lcm_student(guidance=4.5)}
    fast = save_adapter(run / "fast", base=base, process=process, text=trainer["text"], vae=trainer["vae"])
    led = drawn(run, lora=[str(fast)], weight_dtype="int8")
    manifest = read_manifest(run / "samples" / "edges-prompt")
    assert manifest.fingerprint.fields["solver"] == "lcm"
    assert np.abs(led - drawn(run, lora=[str(fast)], weight_dtype="int8", control=None)).max() > 10


def test_copies_are_in_8_bits_too_and_what_joins_them_is_not(run: Path) -> None:
    config = SamplingConfig(weight_dtype="int8", device="cpu")
    network = Renderer(config, open_run_model(run, "edges")).model
    in_8_bits = {name for name, weight in network.named_parameters() if len(plain_parts(weight)) > 1}
    linear = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert in_8_bits == {name for name in linear if name.startswith(("blocks.", "control.copies."))}
    assert any(name.startswith("control.copies.0.") for name in in_8_bits)


def test_compiled_passes_are_led_by_the_strength_of_their_batch(run: Path) -> None:
    trained = open_run_model(run, "edges")
    config = SamplingConfig(num_steps=2, device="cpu", vae_dtype="float32", dtype="float32", text_dtype="float32")
    renderer = Renderer(config, trained)
    captured = Renderer(config, trained, compiled_shapes=())
    captured.compiled_shapes = frozenset({(1, 32, 48)})  # the memory of captured passes, with nothing compiled
    assert trained.text is not None
    prompt = Prompt(key="a", text="a star", seed=1, control=run / "edges.png")
    (request,) = make_requests([prompt], config, trained)
    texts = encode_prompts(["", "a star"], config, trained.text)
    for strength in (1.0, 0.4, 1.0, 0.0):
        update = {"control_strength": strength}
        renderer.config, captured.config = (config.model_copy(update=update) for _ in range(2))
        (expected,) = renderer.draw([request], texts).images()
        (found,) = captured.draw([request], texts).images()
        difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max()
        assert difference <= 1, strength


def test_png_files_say_what_led_them(run: Path) -> None:
    drawn(run, control_strength=0.5, lora=["{run}/style"])
    (path,) = (path for path in (run / "samples" / "edges-prompt").glob("*.png") if path.name != "grid.png")
    with Image.open(path) as image:
        settings = json.loads(image.info["settings"])
        assert settings["control_strength"] == 0.5 and settings["control_is"] == "map"
        assert image.info["control"].startswith("sha256:")


def test_checkpoints_are_scored_by_what_an_image_leads_beside_those_that_it_does_not(run: Path) -> None:
    rows = [{"key": str(number), "prompt": "a star", "control": "edges.png"} for number in range(2)]
    (run / "led.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(run, prompts="{run}/led.jsonl", control_strength=0.5)
    argv = ["--recipe", str(recipe), "--run", str(run), "--stage", "edges"]
    command = parse_command("sampling.evaluation", "", argv=argv, has_stages=True)
    led, base = find_contestants(command, EvaluationConfig(compare=[f"{run}:3"]))
    assert led.inputs()["control_strength"] == 0.5 and "control_strength" not in base.inputs()
    assert led.job.title.endswith("control at 0.5") and "control" not in base.job.title
    draw_samples([led, base], run=run)
    for row in rows:
        with (
            Image.open(led.folder / f"{row['key']}.png") as image,
            Image.open(base.folder / f"{row['key']}.png") as other,
        ):
            assert image.size == (48, 32) and other.size == (32, 32)
    main(argv)  # the folder is that of the command
    assert led.job.is_done()
