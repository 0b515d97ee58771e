"""`auto` of a dtype: settled once for a folder, whatever machines draw it, and told in what they write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sampling_run import make_run, write_recipe

from pipelines.engine.run import EngineConfig
from pipelines.store.manifest import Fingerprint, ShardDirectory, read_manifest
from sampling import precision, renderer
from sampling.__main__ import main
from sampling.config import SamplingConfig
from sampling.precision import settle

ALL_FLOAT32 = {"dtype": "float32", "vae_dtype": "float32"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def sample(run: Path, **table: object) -> dict[str, bytes]:
    """Draw what is missing; returns the images' bytes."""
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", "2"])
    return {path.name: path.read_bytes() for path in (run / "samples" / "stage2").glob("[!g]*.png")}


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, is_gpu: bool) -> None:
    """Settle as a GPU's machine does; what is drawn is drawn here, in its dtypes."""
    monkeypatch.setattr(precision, "_is_drawn_on_a_gpu", lambda *_, **__: is_gpu)


def told_by(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return {name: json.loads(image.info[name]) for name in ("settings", "computed_in")}


def test_an_image_tells_what_it_was_computed_in(run, monkeypatch):
    folder = run / "samples" / "stage2"
    sample(run)
    told, manifest = told_by(folder / "tall.png"), read_manifest(folder)
    assert told["computed_in"] == ALL_FLOAT32 and told["settings"].items() >= ALL_FLOAT32.items()
    assert manifest.extra.items() >= ALL_FLOAT32.items()
    assert not manifest.fingerprint.fields.keys() & ALL_FLOAT32.keys(), "a CPU's are left out, as they always were"
    on_a_gpu(monkeypatch, True)
    monkeypatch.setattr(renderer, "open_in_bfloat16_if_it_holds", lambda open_: (open_("bfloat16"), "bfloat16"))
    for path in folder.glob("[!g]*.png"):
        path.unlink()
    sample(run)
    told, manifest = told_by(folder / "tall.png"), read_manifest(folder)
    gpu = {"dtype": "bfloat16", "vae_dtype": "tested"}
    assert told["computed_in"] == {"dtype": "bfloat16", "vae_dtype": "bfloat16"}
    assert told["settings"].items() >= gpu.items() and manifest.extra.items() >= gpu.items()
    assert manifest.fingerprint.fields.items() >= gpu.items()


@pytest.mark.parametrize("began_on_a_gpu", [False, True], ids=["begun on a CPU", "begun on a GPU"])
def test_a_folder_goes_on_as_it_was_begun(run, monkeypatch, capsys, began_on_a_gpu):
    on_a_gpu(monkeypatch, began_on_a_gpu)
    first = sample(run)
    on_a_gpu(monkeypatch, not began_on_a_gpu)
    capsys.readouterr()
    assert sample(run) == first
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing to do" in said and "begun" not in said
    (run / "samples" / "stage2" / "tall.png").unlink()
    assert sample(run, batch_size=2) == first
    said = " ".join(capsys.readouterr().err.split())
    begun_on = "a GPU" if began_on_a_gpu else "a CPU or by an earlier version"
    assert f"was begun on {begun_on} and goes on as there, in" in said
    assert "1 of 3 images to draw" in said


def test_dtypes_of_ones_own_draw_all_anew(run, monkeypatch, capsys):
    on_a_gpu(monkeypatch, True)
    first = sample(run)
    capsys.readouterr()
    second = sample(run, **ALL_FLOAT32)
    assert all(second[name] != first[name] for name in first)
    said = " ".join(capsys.readouterr().err.split())
    assert "dtype: bfloat16 -> float32" in said and "vae_dtype: tested -> float32" in said


def test_a_cpus_fingerprint_is_the_one_it_has_always_been(tmp_path, monkeypatch):
    inputs, directory = {"checkpoint": "x"}, ShardDirectory(tmp_path)
    config = SamplingConfig(num_steps=7)

    def settled(config: SamplingConfig) -> precision.Settled:
        return settle(config, inputs, directory=directory, requests=[], engine=EngineConfig())

    on_a_gpu(monkeypatch, False)
    assert settled(config).fingerprint == Fingerprint.of({"checkpoint": "x", "num_steps": 7})
    on_a_gpu(monkeypatch, True)
    own = config.model_copy(update={"dtype": "bfloat16", "vae_dtype": "tested"})
    assert settled(config) == settled(own), "auto is what it stands for"
    fields = settled(config.model_copy(update=ALL_FLOAT32)).fingerprint.fields
    assert fields == {"checkpoint": "x", "num_steps": 7, **ALL_FLOAT32}


@pytest.mark.parametrize(
    ("device", "has_gpu", "gpus_per_worker", "num_images", "expected"),
    [
        ("auto", False, 0.0, 1000, False),
        ("auto", True, 0.0, 1000, True),
        ("auto", False, 1.0, 1000, True),  # Ray's workers have one, and this machine none
        ("auto", False, 1.0, 3, False),  # drawn here
        ("cpu", True, 1.0, 1000, False),
        ("cuda", False, 0.0, 3, True),
    ],
)
def test_the_machine_that_draws_decides(monkeypatch, device, has_gpu, gpus_per_worker, num_images, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("pipelines.engine.run.is_cluster", lambda: False)
    config, engine = SamplingConfig(device=device), EngineConfig(gpus_per_worker=gpus_per_worker)
    assert precision._is_drawn_on_a_gpu(config, engine, num_images=num_images) is expected
