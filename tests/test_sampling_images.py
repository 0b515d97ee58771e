"""What samples and scores are known by: settings at their default are left out, and files made before that go on."""

import json
from pathlib import Path

import pydantic
import pytest
from former_run import as_formerly, times_of
from PIL import Image, PngImagePlugin
from sampling_run import make_run, write_recipe

from pipelines.recipe import Decides
from pipelines.store.manifest import read_manifest
from sampling import renderer
from sampling.__main__ import main
from sampling.config import SamplingConfig
from sampling.precision import WRITTEN_OUT


class LaterSampling(SamplingConfig):
    """`[sampling]` with keys that there are not yet."""

    rescale: Decides[float] = pydantic.Field(default=0.0, description="decides an image")
    patience: int = pydantic.Field(default=3, description="decides nothing")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def sample(run: Path, **table: object) -> None:
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", "2"])


def with_later_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("config", "images"):
        monkeypatch.setattr(f"sampling.{module}.SamplingConfig", LaterSampling)


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    drawn: list[str] = []
    draw = renderer.Renderer.draw

    def recording(self, requests, texts):
        drawn.extend(request.key for request in requests)
        return draw(self, requests, texts)

    monkeypatch.setattr(renderer.Renderer, "draw", recording)
    return drawn


def images_as_formerly(folder: Path) -> None:
    """Samples as they were when every field that there was then was written out, in the manifest and in the images."""
    defaults = SamplingConfig.fingerprint_defaults()
    digest = as_formerly(folder, {name: defaults[name] for name in WRITTEN_OUT})
    fields = read_manifest(folder).fingerprint.fields
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            if "prompt" not in image.info:
                continue
            chunks = PngImagePlugin.PngInfo()
            for name in ("prompt", "seed", "checkpoint"):
                chunks.add_itxt(name, image.info[name])
            chunks.add_itxt("fingerprint", digest)
            chunks.add_itxt("settings", json.dumps(fields, sort_keys=True))
            image.load()
        image.save(path, format="PNG", pnginfo=chunks)


@pytest.mark.parametrize("is_former", [False, True], ids=["now", "formerly"])
def test_a_new_key_draws_nothing_again_and_a_lost_image_alone(run, monkeypatch, is_former, capsys):
    sample(run)
    folder = run / "samples" / "stage2"
    assert "negative_prompt" not in read_manifest(folder).fingerprint.fields
    if is_former:
        images_as_formerly(folder)
    digest, before = read_manifest(folder).fingerprint.digest, times_of(folder)
    with_later_keys(monkeypatch)
    drawn = count_draws(monkeypatch)
    sample(run, patience=9)
    assert drawn == [] and times_of(folder) == before
    (folder / "tall.png").unlink()
    sample(run, batch_size=1)
    assert drawn == ["tall"] and read_manifest(folder).fingerprint.digest == digest
    capsys.readouterr()
    sample(run, batch_size=1, rescale=0.7, num_steps=2)
    said = " ".join(capsys.readouterr().err.split())
    assert len(drawn) == 4 and "rescale: 0.0 -> 0.7" in said and "num_steps: 3 -> 2" in said


def test_images_of_before_are_known_without_a_manifest(run, monkeypatch):
    sample(run)
    folder = run / "samples" / "stage2"
    images_as_formerly(folder)
    (folder / "manifest.json").unlink()
    (folder / ".done" / "samples.json").unlink()
    drawn = count_draws(monkeypatch)
    sample(run)
    assert drawn == [] and (folder / "manifest.json").is_file()
