"""`sampling.weight_dtype`: a transformer with its weights in 8 bits, in all that drawing does with one."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_run import make_run, write_recipe

from encoders.living_bytes import plain_parts
from errors import UserError
from pipelines.store.manifest import read_manifest
from sampling.__main__ import main
from sampling.config import SamplingConfig
from sampling.renderer import Renderer
from sampling.trained_model import open_run_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def sample(run: Path, *flags: str, stage: int = 2, **table: object) -> dict[str, np.ndarray]:
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", str(stage), *flags])
    return {
        path.name: np.asarray(Image.open(path)).astype(int)
        for path in (run / "samples" / f"stage{stage}").glob("[!g]*.png")
    }


def largest_difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> int:
    assert first.keys() == second.keys()
    return max(int(np.abs(first[name] - second[name]).max()) for name in first)


@pytest.mark.parametrize("stage", [1, 2], ids=["dit", "pixart"])
@pytest.mark.parametrize("table", [{}, {"cache": 2}, {"dtype": "bfloat16"}], ids=["plain", "cache", "bfloat16"])
def test_images_are_nearly_those_of_whole_weights(run, stage, table):
    exact = sample(run, stage=stage, **table)
    rounded = sample(run, stage=stage, weight_dtype="int8", **table)
    assert 0 < largest_difference(exact, rounded) <= 24
    if not table:
        assert largest_difference(sample(run, stage=stage), exact) == 0, "what was drawn before is drawn again"


def test_it_is_a_setting_of_an_image(run, capsys):
    sample(run, weight_dtype="int8")
    folder = run / "samples" / "stage2"
    with Image.open(folder / "tall.png") as image:
        assert json.loads(image.info["settings"])["weight_dtype"] == "int8"
    manifest = read_manifest(folder)
    assert manifest.extra["weight_dtype"] == "int8" == manifest.fingerprint.fields["weight_dtype"]
    capsys.readouterr()
    sample(run)
    assert "weight_dtype: int8 -> None" in " ".join(capsys.readouterr().err.split())
    assert "weight_dtype" not in read_manifest(folder).fingerprint.fields, "as before there was a choice"
    capsys.readouterr()
    sample(run, "--plan", weight_dtype="int8")
    assert "guidance 4.5 · weights in int8: 18 passes" in " ".join(capsys.readouterr().err.split())


def test_blocks_are_rounded_and_nothing_else(run):
    renderer = Renderer(SamplingConfig(weight_dtype="int8", device="cpu"), open_run_model(run, "stage2"))
    in_8_bits = {name for name, weight in renderer.model.named_parameters() if len(plain_parts(weight)) > 1}
    linear = {f"{name}.weight" for name, layer in renderer.model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert in_8_bits == {name for name in linear if name.startswith("blocks.")}


def test_blocks_compile_whole(run):
    trained = open_run_model(run, "stage2")
    config = SamplingConfig(weight_dtype="int8", device="cpu")
    plain, compiled = Renderer(config, trained).model, Renderer(config, trained).model
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        inputs = torch.randn(2, 4, 4, 6), torch.tensor([3, 700]), torch.randn(2, 5, 32)
        torch.testing.assert_close(compiled(*inputs), plain(*inputs))


@pytest.mark.parametrize("table", [{"weight_dtype": "int8"}, {"text_encoder": "8bit"}], ids=["transformer", "encoder"])
def test_without_torchao_it_is_refused_before_anything_is_loaded(run, table, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(ModuleNotFoundError, match="torchao"):
        sample(run, **table)
    assert len(sample(run)) == 3


def test_another_value_is_refused(run):
    with pytest.raises(UserError, match=r"sampling\.weight_dtype.*'int8'"):
        sample(run, weight_dtype="int4")
