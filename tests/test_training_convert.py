"""`python -m training.convert`: published weights in, a folder out."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from errors import UserError
from pixart.convert import load_diffusers, save_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.layouts import export_weights, original_layout
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.specs import ddpm_spec, flow_spec
from sampling.config import EncoderConfig
from sampling.foreign_weights import open_trained_model
from training.convert import main
from training.stages.stage import find_weights

DIT = DiTConfig(num_layers=2, num_heads=6, head_dim=64, num_classes=5, sample_size=8)  # a published width


@pytest.fixture(scope="module")
def dit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official .pt of a DiT."""
    torch.manual_seed(0)
    dit = DiT(DIT)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    path = tmp_path_factory.mktemp("official") / "dit.pt"
    torch.save(export_weights(dit, original_layout(DIT)) | {"pos_embed": torch.zeros(1, 16, 384)}, path)
    return path


def test_an_official_file_becomes_a_folder(dit_file: Path, tmp_path: Path, capsys) -> None:
    for name in (".dit.0123abcd.tmp", ".dit.tmp", ".other.0123abcd.tmp"):
        (tmp_path / name / "left-by-a-kill").mkdir(parents=True)
        os.utime(tmp_path / name / "left-by-a-kill", (0, 0))
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".dit.4567abcd.tmp").mkdir()  # somebody is at it, perhaps
    main([str(dit_file), str(tmp_path / "dit")])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".dit.4567abcd.tmp", ".dit.tmp", ".other.0123abcd.tmp", "dit"),
    ]
    dit = load_diffusers(tmp_path / "dit" / "transformer")
    assert isinstance(dit, DiT) and dit.config == DIT
    weights = torch.load(dit_file, weights_only=True)
    assert torch.equal(dit.final.weight, weights["final_layer.linear.weight"])
    assert "class-conditional DiT, 5." in capsys.readouterr().err


@pytest.mark.parametrize("adaln", ["single", "per-block"])
def test_a_dit_is_reparameterised_and_compared(dit_file: Path, tmp_path: Path, capsys, adaln: str) -> None:
    flags = ["--reparameterize", "--caption-channels", "20", "--adaln", adaln]
    main([str(dit_file), str(tmp_path / "a"), *flags])
    main([str(dit_file), str(tmp_path / "dit")])
    main([str(tmp_path / "dit"), str(tmp_path / "b"), *flags])
    model, same, dit = (load_diffusers(tmp_path / name / "transformer") for name in ("a", "b", "dit"))
    assert isinstance(model, PixArt) and model.config.adaln == adaln
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())
    latents, moment = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    expected = dit(latents, moment, None)
    torch.testing.assert_close(model(latents, moment, torch.randn(2, 3, 20)), expected, rtol=1e-5, atol=1e-5)
    printed = capsys.readouterr().err.split("at t = 500 the output is the DiT's without class to ")[1]
    assert float(printed.split()[0]) < 1e-5


def test_converted_weights_keep_their_process(tmp_path: Path) -> None:
    shape = PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=4, sample_size=4, out_channels=4)
    flow = process_of(flow_spec(shift=3.0)).scheduler_config()
    save_diffusers(PixArt(shape), tmp_path / "step-7" / "model")
    (tmp_path / "step-7" / "scheduler").mkdir()
    (tmp_path / "step-7" / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow))
    main([str(tmp_path / "step-7" / "model"), str(tmp_path / "converted")])
    assert find_weights(str(tmp_path / "converted"), key="x").process == flow_spec(shift=3.0)
    PixArtTransformer2DModel.from_pretrained(tmp_path / "converted", subfolder="transformer")
    DPMSolverMultistepScheduler.from_pretrained(tmp_path / "converted", subfolder="scheduler")
    encoders = EncoderConfig(text_model="google/t5", vae_model="someone/vae")
    drawn = open_trained_model(str(tmp_path / "converted"), encoders)
    assert drawn.process == flow_spec(shift=3.0) and drawn.load().config.out_channels == 4
    # Somebody else's scheduler does not count, neither for training nor for sampling.
    (tmp_path / "step-7" / "model").rename(tmp_path / "step-7" / "mine")
    for process in (
        find_weights(str(tmp_path / "step-7" / "mine"), key="x").process,
        open_trained_model(str(tmp_path / "step-7" / "mine"), encoders).process,
    ):
        assert process == ddpm_spec()


def test_what_cannot_be_converted_is_refused(dit_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        main([str(dit_file), str(tmp_path)])
    save_diffusers(PixArt(PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=4)), tmp_path / "pixart")
    with pytest.raises(UserError, match=r"SOURCE \(.*pixart\) is a PixArt: only a class-conditional DiT"):
        main([str(tmp_path / "pixart"), str(tmp_path / "new"), "--reparameterize"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main([str(tmp_path / "nothing"), str(tmp_path / "new")])
