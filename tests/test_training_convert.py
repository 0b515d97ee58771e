"""`python -m training.convert`: published weights in, a folder or an original file out."""

import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from sampling_run import make_run

from errors import UserError
from pixart.adapter_files import read_adapter, write_adapter
from pixart.adapter_layers import AdapterShape
from pixart.adapters import add_adapters, merge
from pixart.convert import load_diffusers, save_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.layers import position_embedding
from pixart.layouts import export_weights, original_layout
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.specs import ddpm_spec, flow_spec
from sampling.config import EncoderConfig
from sampling.foreign_weights import open_trained_model
from training.convert import main
from training.stages.stage import find_weights
from training.stages.starts import load_network

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


def _official_pixart(path: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Write what PixArt's own code saves: weights under `state_dict`, positions and the null caption among them."""
    torch.manual_seed(1)
    shape = PixArtConfig(num_layers=2, num_heads=6, head_dim=64, caption_channels=20, sample_size=8)
    weights = export_weights(PixArt(shape).to(dtype), original_layout(shape))
    positions = position_embedding(4, 4, channels=384, base_size=4, scale=1.0)[None]
    weights |= {"pos_embed": positions, "y_embedder.y_embedding": torch.randn(7, 20)}
    torch.save({"state_dict": weights}, path)
    return weights


FILE = "diffusion_pytorch_model.safetensors"
FOLDER_NAME = "transformer_blocks.1.ff.net.0.proj.bias"


def _folder_of(dit_file: Path, place: Path) -> Path:
    main([str(dit_file), str(place / "folder")])
    return place / "folder" / "transformer"


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_to_the_original_layout_and_back_gives_the_same_bytes(tmp_path: Path, caplog, dtype: torch.dtype) -> None:
    weights = _official_pixart(tmp_path / "official.pth", dtype=dtype)
    main([str(tmp_path / "official.pth"), str(tmp_path / "folder")])
    main([str(tmp_path / "official.pth"), str(tmp_path / "again.pth")])
    assert _same(torch.load(tmp_path / "again.pth")["state_dict"], weights) and not caplog.records
    main([str(tmp_path / "folder"), str(tmp_path / "back.pth")])
    without_null = {name: value for name, value in weights.items() if name != "y_embedder.y_embedding"}
    assert _same(torch.load(tmp_path / "back.pth")["state_dict"], without_null)
    assert "back.pth has no y_embedder.y_embedding" in caplog.text
    main([str(tmp_path / "folder"), str(tmp_path / "back.safetensors")])
    assert _same(load_file(tmp_path / "back.safetensors"), without_null)
    main([str(tmp_path / "back.safetensors"), str(tmp_path / "once-more")])
    files = ["transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"]
    for name in files:
        assert (tmp_path / "once-more" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def test_a_dit_goes_back_to_its_official_file(dit_file: Path, tmp_path: Path, caplog) -> None:
    main([str(dit_file), str(tmp_path / "dit")])
    main([str(tmp_path / "dit"), str(tmp_path / "dit.pt")])
    expected = torch.load(dit_file) | {"pos_embed": position_embedding(4, 4, channels=384, base_size=4, scale=1)[None]}
    assert _same(torch.load(tmp_path / "dit.pt"), expected) and not caplog.records


def test_a_stage_of_a_run_is_converted_by_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for number, source in enumerate(("training/stage2", "training/stage2/step-7", "training/stage2/step-7/model")):
        main([str(run / source), str(tmp_path / f"{number}.pth")])
    first, *others = (torch.load(tmp_path / f"{number}.pth")["state_dict"] for number in range(3))
    assert first and all(_same(other, first) for other in others)


def test_what_an_original_file_cannot_say_is_refused_or_said(tmp_path: Path, caplog) -> None:
    shape = PixArtConfig(num_layers=1, num_heads=3, head_dim=128, caption_channels=4, sample_size=4)
    for name, other in (("heads", shape), ("adaln", replace(shape, num_heads=6, head_dim=64, adaln="per-block"))):
        save_diffusers(PixArt(other), tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}\.pth would be no original file: .*{name}.*; name a folder"):
            main([str(tmp_path / name), str(tmp_path / f"{name}.pth")])
    save_diffusers(DiT(replace(DIT, timestep_shift=1)), tmp_path / "dit")
    with pytest.raises(UserError, match=r"timestep_shift is 1, diffusers' way"):
        main([str(tmp_path / "dit"), str(tmp_path / "dit.pt")])
    main([str(tmp_path / "dit"), str(tmp_path / "dit.pt"), "--timestep-shift", "0"])
    assert not caplog.records
    flow = process_of(flow_spec(shift=3.0)).scheduler_config()
    save_diffusers(PixArt(replace(shape, num_heads=2, head_dim=8, out_channels=4)), tmp_path / "flow" / "transformer")
    (tmp_path / "flow" / "scheduler").mkdir()
    (tmp_path / "flow" / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow))
    main([str(tmp_path / "flow"), str(tmp_path / "flow.pth")])
    assert "trained with flow" in caplog.text


@pytest.mark.parametrize("suffix", [".pth", ".PT", ".safetensors", ".SafeTensors"])
@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_an_original_of_a_width_that_nobody_has_published_is_read_back(tmp_path: Path, suffix: str, kind: str) -> None:
    torch.manual_seed(0)
    shape = PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=4, sample_size=4)
    network = PixArt(shape) if kind == "pixart" else DiT(replace(DIT, num_heads=2, head_dim=8))
    save_diffusers(network, tmp_path / "folder")
    main([str(tmp_path / "folder"), str(tmp_path / f"file{suffix}")])
    assert (tmp_path / f"file{suffix}").is_file()
    main([str(tmp_path / f"file{suffix}"), str(tmp_path / "back")])
    back = load_diffusers(tmp_path / "back" / "transformer")
    assert back.config == network.config and _same(back.state_dict(), network.state_dict())


def test_weights_that_are_no_sound_numbers_are_not_converted(dit_file: Path, tmp_path: Path) -> None:
    weights = torch.load(dit_file)
    name = "blocks.1.mlp.fc1.weight"
    torch.save(weights | {name: weights[name].index_fill(0, torch.tensor([3]), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"nan\.pt: 384 of the 589,824 numbers of blocks.1.mlp.* are not finite"):
        main([str(tmp_path / "nan.pt"), str(tmp_path / "new")])
    torch.save(weights | {name: weights[name].to(torch.int8)}, tmp_path / "int8.pt")
    save_file(
        load_file(_folder_of(dit_file, tmp_path) / FILE) | {FOLDER_NAME: torch.zeros(4, dtype=torch.int8)},
        tmp_path / "folder" / "transformer" / FILE,
    )
    for source, named in (("int8.pt", name), ("folder", FOLDER_NAME)):
        with pytest.raises(UserError, match=rf"{source}.*: {named} is int8: weights that were quantised are not read"):
            main([str(tmp_path / source), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_weights_of_another_shape_are_named_with_their_file(dit_file: Path, tmp_path: Path) -> None:
    folder = _folder_of(dit_file, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("\ufeff" + json.dumps(config | {"num_layers": 3}), encoding="utf-8")
    with pytest.raises(UserError, match=r"folder/transformer: the weights do not fit .*: missing tr.* in all\)"):
        main([str(tmp_path / "folder"), str(tmp_path / "new")])
    (folder / "config.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    main([str(tmp_path / "folder"), str(tmp_path / "new")])  # the mark of Windows' editors is no damage


def test_what_cannot_be_converted_is_refused(dit_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        main([str(dit_file), str(tmp_path)])
    save_diffusers(PixArt(PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=4)), tmp_path / "pixart")
    with pytest.raises(UserError, match=r"SOURCE \(.*pixart\) is a PixArt: only a class-conditional DiT"):
        main([str(tmp_path / "pixart"), str(tmp_path / "new"), "--reparameterize"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main([str(tmp_path / "nothing"), str(tmp_path / "new")])


def _spoil(kind: str, weight: torch.Tensor) -> torch.Tensor:
    if kind == "int8":
        return weight.to(torch.int8)
    return weight.index_fill(0, torch.tensor([1]), float(kind))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("network", ["pixart", "dit"])
@pytest.mark.parametrize(
    ("kind", "message"), [("int8", "is int8"), ("nan", "are not finite"), ("-inf", "are not finite")]
)
def test_spoilt_weights_are_refused_by_every_reader(
    tmp_path: Path, dit_file: Path, layout: str, network: str, kind: str, message: str
) -> None:
    """By the conversion, as the start of a stage, and by sampling, with the file and the weight."""
    good = dit_file
    if network == "pixart":
        good = tmp_path / "good.pth"
        _official_pixart(good)
    if layout == "original":
        path, bad = tmp_path / "bad.pth", "final_layer.linear.weight"
        weights = torch.load(good)
        weights = weights.get("state_dict", weights)
        torch.save(weights | {bad: _spoil(kind, weights[bad])}, path)
        named = path
    else:
        path, bad = tmp_path / "bad", "pos_embed.proj.weight"
        main([str(good), str(path)])
        named = path / "transformer"
        file = named / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        save_file(weights | {bad: _spoil(kind, weights[bad])}, file)
    pattern = rf"{re.escape(str(named))}\)?: .*{re.escape(bad)} {message}"
    with pytest.raises(UserError, match=pattern):
        main([str(path), str(tmp_path / "new")])
    with pytest.raises(UserError, match=pattern):
        load_network(named, None, sample_size=8, key=f"training.stage1.starts_from ({named})")
    with pytest.raises(UserError, match=pattern):
        open_trained_model(str(path), EncoderConfig(text_model="google/t5", vae_model="someone/vae")).load()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_few_bits_are_read(dit_file: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    few = {name: value.to(dtype) for name, value in torch.load(dit_file).items() if name != "pos_embed"}
    torch.save(few, tmp_path / "few.pt")
    found = load_network(tmp_path / "few.pt", None, sample_size=8, key="x").state_dict()
    assert torch.equal(found["final.weight"], few["final_layer.linear.weight"])


@pytest.mark.parametrize("name", ["y_embedder.y_embedding", "pos_embed"])
def test_what_a_file_holds_beside_weights_is_finite_too(tmp_path: Path, name: str) -> None:
    weights = _official_pixart(tmp_path / "bad.pth")
    torch.save({"state_dict": weights | {name: weights[name] * float("nan")}}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=rf"bad\.pth: .*{name}"):
        main([str(tmp_path / "bad.pth"), str(tmp_path / "new.pth")])


def test_adapters_are_merged_into_a_conversion_each_times_its_weight(tmp_path: Path) -> None:
    config = PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=8, sample_size=4)
    torch.manual_seed(0)
    base, shape = PixArt(config), AdapterShape(rank=2, alpha=2.0, targets=("mlp", "final"))
    save_diffusers(base, tmp_path / "base")
    files = []
    for name in ("a", "b"):
        beside = load_diffusers(tmp_path / "base")
        assert isinstance(beside, PixArt)
        add_adapters(beside, shape, key="x.lora.targets")
        weights = {key: torch.randn_like(value) for key, value in beside.named_parameters() if value.requires_grad}
        write_adapter(tmp_path / name, weights, config, shape=shape, belongs_to={})
        files.append(tmp_path / name)
    expected = PixArt(config)
    expected.load_state_dict(base.state_dict())
    merge(expected, [(read_adapter(files[0], config), 0.8), (read_adapter(files[1], config), -0.5)])
    typed = ["--lora", f"{files[0]},{files[1] / 'adapter_model.safetensors'}"]
    main([str(tmp_path / "base"), str(tmp_path / "merged"), *typed, "--weights=0.8,-0.5"])
    merged = load_diffusers(tmp_path / "merged" / "transformer").state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in expected.state_dict().items())
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"- `{files[0]}` (sha256:" in card and "): 0.8\n" in card and "): -0.5\n" in card
    refused = {
        ("0.8", *typed): "WEIGHTS has 1 numbers for 2 adapters of LORA: type as many",
        ("0.8,x", *typed): "WEIGHTS is '0.8,x': type finite numbers",
        ("0.8,inf", *typed): "WEIGHTS is '0.8,inf': type finite numbers",
        ("0.8",): "WEIGHTS is '0.8', but LORA names no adapters",
        ("", "--lora", f"{files[0]},"): "LORA is '.*,': type paths with a comma between them",
        ("", "--lora", str(tmp_path / "base")): "LORA: .*base is no adapter: the folder holds none",
    }
    for (weights, *lora), message in refused.items():
        with pytest.raises(UserError, match=message):
            main([str(tmp_path / "base"), str(tmp_path / "other"), *lora, "--weights", weights])
    assert not (tmp_path / "other").exists()


def test_a_card_does_not_say_where_its_writer_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "ann", tmp_path / "ann" / "work"
    config = PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=8, sample_size=4)
    save_diffusers(PixArt(config), here / "base")
    save_diffusers(PixArt(config), home / "other")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for number, (typed, said) in enumerate(
        {"base": "(base/", str(here / "base"): "(base/", "~/other": "(~/other/"}.items()
    ):
        main([typed, f"merged-{number}"])
        card = Path(f"merged-{number}", "README.md").read_text()
        assert str(home) not in card and said in card


def test_adapters_of_another_process_are_not_merged_and_those_of_other_weights_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("convert"), "propagate", True)
    config = PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=8, sample_size=4)
    save_diffusers(PixArt(config), tmp_path / "base")
    beside, shape = PixArt(config), AdapterShape(rank=2, alpha=2.0, targets=("mlp",))
    add_adapters(beside, shape, key="x.lora.targets")
    weights = {key: value.detach() for key, value in beside.named_parameters() if value.requires_grad}
    base = {"identity": "sha256:1", "location": "/its/weights", "adapters": []}
    for process in ("flow", "ddpm"):
        belongs_to = {"base": base, "process": {"name": process}}
        write_adapter(tmp_path / process, weights, config, shape=shape, belongs_to=belongs_to)
    with pytest.raises(UserError, match=r"flow/adapter_model\.safetensors was trained with process flow, but .* ddpm"):
        main([str(tmp_path / "base"), str(tmp_path / "merged"), "--lora", str(tmp_path / "flow")])
    main([str(tmp_path / "base"), str(tmp_path / "merged"), "--lora", str(tmp_path / "ddpm")])
    assert "was trained on the weights of /its/weights, and is added to others" in " ".join(caplog.text.split())
