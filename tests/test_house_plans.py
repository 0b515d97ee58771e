"""PLAN=1 makes the checks of the run: for each fault a room's plan and its run end with the same line and status 2."""

import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from feature_run import write_run
from sampling_run import make_run as make_sampling_run
from sampling_run import write_recipe as write_sampling_recipe
from tiny_models import save_llava
from training_run import arguments, make_run
from warm_python import WarmProcess

import captioning.__main__ as captioning_main
import features.__main__ as features_main
import sampling.__main__ as sampling_main
from pipelines.command import run_command
from pixart.convert import save_diffusers
from pixart.model import PixArt, PixArtConfig
from sampling import app
from tests.raw_shards import write_laion

NO_GPU = ("engine.gpus_per_worker=1.0", "engine.in_process=false")


@pytest.fixture(autouse=True)
def two_cores_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a Ray of this machine, whose start takes seconds."""
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    monkeypatch.setattr("pipelines.engine.cluster.start_ray", lambda: SimpleNamespace(nodes=lambda: nodes))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def said_by(room: str, main: Callable[[], None], flags: list[str], *, capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", [room, *flags])
    capsys.readouterr()
    status = run_command(room, main)
    said = " ".join(capsys.readouterr().err.split())
    assert status == 2, said
    return said.rpartition(f"{room}: ")[2]


def require_same(room: str, main: Callable[[], None], flags: list[str], message: str, *, capsys, monkeypatch) -> None:
    ran = said_by(room, main, flags, capsys=capsys, monkeypatch=monkeypatch)
    planned = said_by(room, main, [*flags, "--plan"], capsys=capsys, monkeypatch=monkeypatch)
    assert planned == ran and message in ran


def overriding(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["captioning.model=nobody/llava"], "captioning.model = 'nobody/llava' (main) is no local folder"),
        (["captioning.model={folder}"], "the folder holds no weights"),
        (["captioning.device=cuda"], "captioning.device is cuda, but torch"),
        (NO_GPU, "engine.gpus_per_worker = 1, but Ray sees no GPU: set engine.gpus_per_worker=0"),
        (["engine.cpus_per_worker=64.0", "engine.in_process=false"], "at most 2 CPUs on one node: lower engine.cpus_p"),
        (["captioning.shards=['x*']"], "captioning.shards"),
        (["captioning.clip_model=nobody/clip"], "captioning.clip_model = 'nobody/clip'"),
        (["without transformers"], "the package transformers is not installed, which captioning needs"),
    ],
)
def test_captioning(tmp_path: Path, overrides: list[str], message: str, capsys, monkeypatch) -> None:
    write_laion(tmp_path / "run" / "raw" / "laion_00000.tar", 3, first=0)
    model = save_llava(tmp_path / "llava")
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "recipe.toml").write_text(f'[data]\nshards = "{{run}}/raw/*.tar"\n[captioning]\nmodel = "{model}"\n')
    flags = ["--recipe", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / "run")]
    flags += overriding(*(override.replace("{folder}", str(bare)) for override in overrides if "=" in override))
    if overrides == ["without transformers"]:
        monkeypatch.setitem(sys.modules, "transformers", None)
    require_same("captioning", captioning_main.main, flags, message, capsys=capsys, monkeypatch=monkeypatch)


@pytest.fixture(scope="module")
def feature_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("features"), num_shards=1, samples_per_shard=4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features.text_model=nobody/t5"], "features.text_model = 'nobody/t5' (main) is no local folder"),
        (["features.vae_model=nobody/vae"], "features.vae_model = 'nobody/vae' (main) is no local folder"),
        (["features.device=cuda"], "features.device is cuda, but torch"),
        (NO_GPU, "engine.gpus_per_worker = 1, but Ray sees no GPU: set engine.gpus_per_worker=0"),
        (["features.stage2.shards=['x*']"], "features.stage2.shards"),
        (["features.stage2.resolution=250"], "features.stage2.resolution 250 is not a multiple of 16"),
        ([], "but only 1.0 kB are free on this disk"),
        (["without diffusers"], "the package diffusers is not installed, which features needs"),
    ],
)
def test_features(feature_run: Path, overrides: list[str], message: str, capsys, monkeypatch) -> None:
    if not overrides:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    flags = ["--recipe", str(feature_run.parent / "recipe.toml"), "--run", str(feature_run), "--stage", "2"]
    flags += overriding(*(override for override in overrides if "=" in override))
    if overrides == ["without diffusers"]:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    require_same("features", features_main.main, flags, message, capsys=capsys, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.prompts=none.txt"], "none.txt"),
        (["sampling.device=cuda"], "sampling.device is cuda, but torch"),
        ([*NO_GPU, "sampling.max_images_in_process=0"], "engine.gpus_per_worker = 1, but Ray sees no GPU"),
        (["sampling.solver=euler"], "sampling.solver"),
        (["sampling.text_encoder=precomputed", "sampling.text_embeddings=none"], "sampling.text_embeddings none"),
        (["vae"], "cannot be loaded: the folder holds no weights"),
        (["in the way"], "is in the way: it is no image that this command has drawn"),
        (["sampling.checkpoint=nobody/x"], "sampling.checkpoint = 'nobody/x'"),
        (["without diffusers"], "the package diffusers is not installed, which sampling needs"),
        (
            ["sampling.prompt=a", "sampling.prompts=b.txt"],
            "(--set) and sampling.prompts (--set) are both typed",
        ),
    ],
)
def test_sampling(tmp_path: Path, overrides: list[str], message: str, capsys, monkeypatch) -> None:
    run = make_sampling_run(tmp_path / "run")
    if overrides == ["vae"]:
        (run / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    if overrides == ["without diffusers"]:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    if overrides == ["in the way"]:
        (run / "samples" / "stage2").mkdir(parents=True)
        (run / "samples" / "stage2" / "wide.png").write_bytes(b"mine")
    recipe = write_sampling_recipe(run)
    flags = ["--recipe", str(recipe), "--run", str(run), "--stage", "2"]
    flags += overriding(*(override for override in overrides if "=" in override))
    require_same("sampling", sampling_main.main, flags, message, capsys=capsys, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"starts_from": "scratch", "global_batch_size": 7},
            "training.global_batch_size 7 is not a multiple of 2: 2 ranks",
        ),
        ({"starts_from": "none.pth"}, "training.stage2.starts_from = 'none.pth' is no stage of"),
        ({"starts_from": "{shape}"}, "model.num_layers = 2, but the weights of"),
        ({"starts_from": "scratch", "trains": ["nothing.*"]}, "pattern 'nothing.*' fits none of the"),
        ({"starts_from": "scratch", "products": "fp8"}, "training.products = 'fp8' needs training.dtype = 'bf16'"),
        ({"starts_from": "scratch", "validation_shards": ["laion_1"], "global_batch_size": 64}, "laion_1"),
        ({"starts_from": "scratch", "validation_shards": ["*"]}, "leaves nothing to train on"),
    ],
)
def test_training(tmp_path: Path, settings: dict, message: str) -> None:
    run = make_run(tmp_path)
    if settings.get("starts_from") == "{shape}":
        other = PixArtConfig(num_layers=1, num_heads=2, head_dim=8, caption_channels=16, sample_size=4)
        save_diffusers(PixArt(other), tmp_path / "shape")
        settings = {"starts_from": str(tmp_path / "shape")}
    lines = []
    for option in ([], ["--plan"]):
        process = WarmProcess("training", [*arguments(run, 2, **settings), *option])
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        lines.append(" ".join(said.split()).rpartition("training: ")[2])
    assert message in lines[0] and lines[1] in lines[0]


def test_the_app(tmp_path: Path, capsys, monkeypatch) -> None:
    """A port that somebody listens at, and a missing Gradio, are said before anything is built."""
    run = make_sampling_run(tmp_path / "run")
    flags = ["--recipe", str(write_sampling_recipe(run)), "--run", str(run), "--stage", "2"]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        typed = [*flags, *overriding(f"app.port={port}")]
        message = f"app.port {port} of 127.0.0.1 cannot be used"
        require_same("sampling.app", app.main, typed, message, capsys=capsys, monkeypatch=monkeypatch)
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = "the package gradio is not installed, which app needs"
    require_same("sampling.app", app.main, flags, message, capsys=capsys, monkeypatch=monkeypatch)


def test_guidance_that_burns_colours_out_is_said(tmp_path: Path, capsys, monkeypatch) -> None:
    run = make_sampling_run(tmp_path / "run")
    flags = ["--recipe", str(write_sampling_recipe(run)), "--run", str(run), "--stage", "2", "--plan"]
    for scale, is_said in ((7.5, False), (45.0, True)):
        monkeypatch.setattr(sys, "argv", ["sampling", *flags, "--set", f"sampling.guidance_scale={scale}"])
        assert run_command("sampling", sampling_main.main) == 0
        assert ("guidance_scale 45 burns colours out" in " ".join(capsys.readouterr().err.split())) == is_said
