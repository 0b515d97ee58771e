"""`sampling.compile`: which batches are compiled, and that they give the images of those that are not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_run import make_run, write_recipe

from errors import UserError
from sampling.__main__ import main
from sampling.compiled_shapes import compiled_shapes, compiles_decoder
from sampling.config import SamplingConfig
from sampling.requests import ImageRequest


def requests(*sizes: tuple[int, int]) -> list[ImageRequest]:
    return [
        ImageRequest(number=i, key=str(i), prompt="", label=None, seed=i, width=width, height=height, file=f"{i}.png")
        for i, (height, width) in enumerate(sizes)
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CXX", "true")


def test_a_cpu_compiles_only_when_asked(monkeypatch):
    monkeypatch.setenv("CXX", "true")
    sizes = requests(*[(64, 64)] * 16)
    assert compiled_shapes(SamplingConfig(), sizes) == set()
    assert compiled_shapes(SamplingConfig(compile=True), sizes) == {(16, 64, 64)}


@pytest.mark.usefixtures("gpu")
def test_a_gpu_compiles_batches_of_a_shape_that_has_eight_images_or_more():
    few, enough = requests(*[(64, 64)] * 7), requests(*[(64, 64)] * 8)
    assert compiled_shapes(SamplingConfig(), few) == set()
    assert compiled_shapes(SamplingConfig(), enough) == {(8, 64, 64)}
    assert compiled_shapes(SamplingConfig(batch_size=1), enough) == {(1, 64, 64)}
    assert compiled_shapes(SamplingConfig(batch_size=3), enough) == set()  # 3, 3 and 2
    assert compiled_shapes(SamplingConfig(compile=True, batch_size=3), enough) == {(3, 64, 64), (2, 64, 64)}
    assert compiled_shapes(SamplingConfig(compile=False), enough) == set()
    assert compiled_shapes(SamplingConfig(device="cpu"), enough) == set()
    mixed = requests(*[(64, 48)] * 10, *[(64, 64)] * 10)
    assert compiled_shapes(SamplingConfig(batch_size=8), mixed) == {(8, 64, 48)}  # then 2 and 6, and 4


def test_the_decoder_is_compiled_in_jobs_of_a_gigapixel():
    few, many = requests(*[(1000, 1000)] * 999), requests(*[(1000, 1000)] * 1000)
    assert not compiles_decoder(SamplingConfig(), few)
    assert compiles_decoder(SamplingConfig(), many)
    assert compiles_decoder(SamplingConfig(compile=True), few)


def test_to_insist_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"sampling\.compile = true needs a C\+\+ compiler, and neither of"):
        compiled_shapes(SamplingConfig(compile=True), [])


def test_compiled_passes_draw_the_same_images(tmp_path: Path, monkeypatch):
    compile_ = torch.compile  # dynamo traces as it does for a GPU, without the minutes of generating code
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self.forward, backend="eager"))
    run = make_run(tmp_path)
    folder = run / "samples" / "stage2"

    def draw(**table: object) -> dict[str, np.ndarray]:
        for path in folder.glob("*.png"):
            path.unlink()
        main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", "2"])
        return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}

    for table in ({}, {"cache": 2, "guidance_interval": [0.2, 1.0]}):
        plain, compiled = draw(compile=False, **table), draw(compile=True, **table)
        assert plain.keys() == compiled.keys()
        for name, expected in plain.items():
            assert np.abs(compiled[name] - expected).max() <= 1
