"""A run with tiny random models and checkpoints of all three stages, as training leaves them, for tests of sampling."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_checkpoint import TRAINER
from tiny_encoders import save_codec, save_text_encoder

from encoders.weights import identity_of
from pipelines.store.bases import describe_base
from pixart.adapter_files import write_adapter
from pixart.adapter_layers import AdapterShape
from pixart.adapters import add_adapters
from pixart.branching import add_branch
from pixart.control_files import write_branch
from pixart.convert import save_diffusers
from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.specs import ddpm_spec, flow_spec

MAX_TOKENS = 40
DIT = DiTConfig(num_layers=2, num_heads=2, head_dim=12, num_classes=5, sample_size=4)
PIXART = PixArtConfig(num_layers=2, num_heads=2, head_dim=12, caption_channels=32, sample_size=4)
FLOW = flow_spec(shift=2.0)
PROMPTS = [
    {"key": "wide", "prompt": "a red circle, left", "aspect_ratio": 1.5, "scene": {}},
    {"key": "tall", "prompt": "two blue squares on a dark table", "aspect_ratio": 0.66, "scene": {}},
    {"key": "square", "prompt": "a star", "scene": {}},
]


def randomised(model: PixArt | DiT, seed: int = 0) -> PixArt | DiT:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def save_checkpoint(
    run: Path, stage: int, model: PixArt | DiT, *, buckets: tuple[str, ...] = (), step: int = 7
) -> Path:
    """Write what training leaves of a stage, less the optimizer's state; returns the step's folder.

    As many channels out as in are of flow.
    """
    process = ddpm_spec() if model.config.out_channels > model.config.in_channels else FLOW
    is_dit = isinstance(model, DiT)
    folder = run / "training" / f"stage{stage}" / f"step-{step}"
    save_diffusers(model, folder / "model")
    text = {"model": str(run / "t5"), "revision": None, "max_tokens": MAX_TOKENS, "d_text": 32}
    trainer = TRAINER | {
        "stage": f"stage{stage}",
        "step": step,
        "num_steps": step,
        "num_ranks": 1,
        "zero_stage": 0,
        "dtype": "fp32",
        "kind": "dit" if is_dit else "pixart",
        "resolution": 32,
        "buckets": list(buckets),
        "vae": {"model": str(run / "vae"), "revision": None, "scaling_factor": 0.45, "shift_factor": 0.0},
        "text": None if is_dit else text,
        "process": process,
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = process_of(process).scheduler_config()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "trainer.json").write_text(json.dumps(trainer))
    (folder.parent / "latest").write_text(folder.name)
    return folder


def make_run(run: Path) -> Path:
    """Write encoders, prompts and one checkpoint per stage."""
    save_text_encoder(run / "t5")
    save_codec(run / "vae")
    (run / "raw").mkdir()
    (run / "raw" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    save_checkpoint(run, 1, randomised(DiT(DIT)))
    save_checkpoint(run, 2, randomised(PixArt(PIXART)))
    save_checkpoint(run, 3, randomised(PixArt(PIXART)), buckets=("32x32", "32x48", "48x32"))
    return run


def write_recipe(run: Path, **sampling: object) -> Path:
    """Write a recipe whose [sampling] differs from a quick default as given; returns its path."""
    table = {"prompts": "{run}/raw/prompts.jsonl", "num_steps": 3, "text_dtype": "float32", "batch_size": 2} | sampling
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    path = run / "recipe.toml"
    path.write_text("\n".join(["[engine]", "num_workers = 2", "[sampling]", *lines]) + "\n")
    return path


def save_adapter(folder: Path, *, seed: int = 3, config: PixArtConfig = PIXART, **belongs_to: object) -> Path:
    """Write an adapter of random numbers for a network of this shape as training does; returns its folder."""
    network = PixArt(config)
    shape = AdapterShape(rank=2, alpha=2.0, targets=("attention", "mlp"))
    add_adapters(network, shape, key="training.x.lora.targets")
    generator = torch.Generator().manual_seed(seed)
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    weights = {name: torch.randn(weight.shape, generator=generator) * 0.5 for name, weight in trained.items()}
    write_adapter(folder, weights, config, shape=shape, belongs_to=belongs_to)
    return folder


def save_adapter_checkpoint(run: Path, name: str, *, seed: int = 3) -> Path:
    """Write what training leaves of a stage of adapters on stage 2's weights; returns the step's folder."""
    base = run / "training" / "stage2" / "step-7"
    trainer = json.loads((base / "trainer.json").read_text())
    weights = base / "model"
    belongs = describe_base(weights, (), run=run, identity=identity_of(weights), shape=dataclasses.asdict(PIXART))
    folder = run / "training" / name / "step-7"
    save_adapter(folder / "adapter", seed=seed, base=belongs, process=trainer["process"], text=None, vae=trainer["vae"])
    (folder / "trainer.json").write_text(json.dumps(trainer | {"stage": name, "base": belongs}))
    (folder.parent / "latest").write_text(folder.name)
    return folder


def save_branch(folder: Path, *, seed: int = 5, config: PixArtConfig = PIXART, **belongs_to: object) -> Path:
    """Write a control branch of random numbers for a network of this shape as training does; returns its folder."""
    network = PixArt(config)
    add_branch(network, 1, key="training.x.control.num_copies")
    weights = {name: value for name, value in randomised(network, seed).state_dict().items() if "control." in name}
    write_branch(folder, weights, config, belongs_to=belongs_to)
    return folder


def save_control_checkpoint(
    run: Path, name: str, *, seed: int = 5, kind: str = "canny", adapter: Path | None = None
) -> Path:
    """Write what training leaves of a stage of a control branch on stage 3's weights, which an adapter may change.

    Returns the step's folder.
    """
    base = run / "training" / "stage3" / "step-7"
    trainer, weights = json.loads((base / "trainer.json").read_text()), base / "model"
    added = () if adapter is None else (adapter,)
    belongs = describe_base(weights, added, run=run, identity=identity_of(weights), shape=dataclasses.asdict(PIXART))
    control = {"family": f"control-{kind}", "kind": kind, "settings": {}, "num_copies": 1}
    folder = run / "training" / name / "step-7"
    parts = {"process": trainer["process"], "text": trainer["text"], "vae": trainer["vae"]}
    save_branch(folder / "control", seed=seed, base=belongs, control=control, name=name, **parts)
    (folder / "trainer.json").write_text(json.dumps(trainer | {"stage": name, "base": belongs, "control": control}))
    (folder.parent / "latest").write_text(folder.name)
    return folder


def save_edges(path: Path, *, size: tuple[int, int] = (60, 40), seed: int = 0) -> Path:
    """Write an image of white lines on black, width x height pixels; returns its path."""
    generator = np.random.default_rng(seed)
    lines = np.zeros((size[1], size[0], 3), np.uint8)
    lines[generator.integers(size[1], size=3)] = 255
    lines[:, generator.integers(size[0], size=3)] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(lines).save(path)
    return path
