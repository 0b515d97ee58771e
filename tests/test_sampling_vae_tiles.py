"""`sampling.vae_tiles`: the same images in less memory, chosen by what is free."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_run import make_run, write_recipe

from encoders import vae_tiles
from encoders.kl import KLCodec
from errors import UserError
from sampling import renderer
from sampling.__main__ import main
from sampling.config import SamplingConfig
from sampling.renderer import Renderer
from sampling.trained_model import open_run_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def sample(run: Path, **table: object) -> dict[str, np.ndarray]:
    main(["--recipe", str(write_recipe(run, **table)), "--run", str(run), "--stage", "3"])
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in (run / "samples" / "stage3").glob("*.png")}


def test_tiles_draw_the_same_images(run, monkeypatch):
    monkeypatch.setattr(vae_tiles, "TILE_BYTES", 4_000)
    whole = sample(run)
    for path in (run / "samples" / "stage3").glob("*.png"):
        path.unlink()
    tiled = sample(run, vae_tiles=True)
    assert len(tiled) == 4 and tiled.keys() == whole.keys()
    assert max(np.abs(tiled[name] - whole[name]).max() for name in tiled) <= 1


def test_it_is_no_setting_of_an_image(run, capsys):
    sample(run)
    capsys.readouterr()
    sample(run, vae_tiles=True)
    assert "nothing to do" in capsys.readouterr().err


def test_a_decoder_that_cannot_be_cut_is_refused_when_it_must_be(run, monkeypatch):
    monkeypatch.setattr(KLCodec, "can_tile", False)
    with pytest.raises(UserError, match=r"sampling\.vae_tiles = true: the VAE .*vae is not made of blocks"):
        sample(run, vae_tiles=True)
    sample(run, vae_tiles="auto")


@pytest.mark.parametrize(("times", "expected"), [(10.0, False), (1.5, False), (1.0, True), (0.1, True)])
def test_on_a_gpu_what_is_free_decides(run, monkeypatch, times, expected):
    drawer = Renderer(SamplingConfig(device="cpu"), open_run_model(run, "stage3"))
    shape = torch.Size([1, 4, 16, 16])
    taken = drawer.codec.decoding_bytes(shape)
    assert not drawer._is_tiled(shape), "on a CPU bytes stay"
    drawer.device = torch.device("cuda")
    monkeypatch.setattr(renderer, "_free_bytes", lambda device: int(times * taken))
    assert drawer._is_tiled(shape) is expected
    drawer.config = drawer.config.model_copy(update={"vae_tiles": False})
    assert not drawer._is_tiled(shape)
