"""Control branches between diffusers' research layout, which our checkpoints have, and PixArt-delta's .pth."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from encoders.branches import find_branch
from encoders.weights import cached_hub_file
from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.store.bases import base_of
from pipelines.store.checkpoints import TRAINER, Checkpoint, find_checkpoint, open_checkpoint
from pipelines.store.files import atomic_file, atomic_folder
from pixart.belonging import METADATA
from pixart.control_files import (
    CONFIG_NAME,
    StoredBranch,
    infer_config,
    is_branch,
    original_branch,
    read_branch,
    write_branch,
)
from pixart.convert import original_weights
from pixart.model import PixArt, PixArtConfig
from pixart.tensor_files import read_weight_file
from pixart.weight_files import is_original_name, read_json
from training.stages.stage import StartingPoint
from training.stages.starts import load_network, with_adapters

CARD = "README.md"
# To begin messages with.
KEY = "SOURCE"


def find_source(location: str) -> Path | None:
    """Return the file of the control branch that `location` names, None where it names something else.

    It is a stage that has trained one, its checkpoint, a folder, or a file by path or as the hub calls it.
    """
    path = typed_path(location)
    if is_original_name(location) and not path.exists():
        path = cached_hub_file(location, key=KEY)
    checkpoint = _checkpoint(path)
    is_ours = _is_branch(path) if checkpoint is None else checkpoint.has_control
    return find_branch(location, key=KEY) if is_ours else None


def convert_branch(source: Path, target: Path, *, location: str, say: Callable[[str], None]) -> None:
    """Write the branch in the file `source` to `target`: a folder for diffusers, a file with PixArt-delta's names.

    The original code takes its base from the same file. So it is there where it is known: of our checkpoints.

    Raises:
        UserError: the branch is damaged, or has no original layout.
    """
    checkpoint = _checkpoint(typed_path(location))
    base = None if checkpoint is None else _base(checkpoint)
    config = infer_config(read_weight_file(source).tensors, where=str(source)) if base is None else base.config
    branch = read_branch(source, config)
    known = branch.belongs_to
    if not is_original_name(target.name):
        with atomic_folder(target) as folder:
            write_branch(folder, branch.weights, config, belongs_to=known)
            (folder / CARD).write_text(_card(target.name, branch), encoding="utf-8")
    else:
        weights = original_branch(branch.weights, config)
        if base is None:
            say(f"{target} is without its base, which the original code takes from the same file (base_model.)")
        else:
            weights |= {f"base_model.{name}": value for name, value in original_weights(base).items()}
        _write_file(target, weights, known)
    say(f"{target}: a control branch of {branch.num_copies} copies of blocks of width {config.width}")


def _checkpoint(path: Path) -> Checkpoint | None:
    for folder in (path, path.parent):  # or it is named by its own folder in a checkpoint
        if (folder / TRAINER).is_file():
            return open_checkpoint(folder)
    return find_checkpoint(path)


def _is_branch(path: Path) -> bool:
    """Whether what is no checkpoint of ours is a control branch: a folder by its config, a file by its weights."""
    if (path / CONFIG_NAME).is_file():
        return "ControlNet" in str(read_json(path / CONFIG_NAME).get("_class_name"))
    return path.is_file() and is_original_name(path.name) and is_branch(read_weight_file(path).tensors)


def _base(checkpoint: Checkpoint) -> PixArt:
    """Return the network that a checkpoint's branch was trained on, in the shape it had then."""
    base = base_of(checkpoint, identify=None)
    key = f"the base of {checkpoint.weights} ({base.path})"
    start = StartingPoint(base.path, base.identity, adapters=base.adapters, shape=base.shape)
    sample_size = PixArtConfig(**base.shape).sample_size
    network = with_adapters(load_network(base.path, None, sample_size=sample_size, key=key), start, key=key)
    if network.kind != "pixart":
        raise UserError(f"{key} is a class-conditional DiT now, and the branch was trained on a PixArt")
    return network


def _write_file(target: Path, weights: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
    with atomic_file(target) as temporary:
        if target.suffix.lower() == ".safetensors":
            note = {METADATA: json.dumps(dict(known), sort_keys=True)} if known else {}
            save_file(
                {name: value.contiguous() for name, value in weights.items()}, temporary, {"format": "pt", **note}
            )
        else:
            torch.save({"state_dict": dict(weights)}, temporary)


def _card(title: str, branch: StoredBranch) -> str:
    """Return what the folder says of itself."""
    known = branch.belongs_to
    base = known.get("name", "FILL IN: the weights it was trained on")
    made = known.get("control", {})
    settings = ", ".join(f"{name} {value}" for name, value in made.get("settings", {}).items())
    led = (
        f"{made['kind']}{f' ({settings})' if settings else ''}" if made else "FILL IN: how its control images are made"
    )
    return (
        f"# {title}\n\n"
        f"A control branch for PixArt (ControlNet-Transformer, PixArt-delta): {branch.num_copies} copies of blocks.\n\n"
        f"- base: {base}\n- led by: {led}\n- licence: FILL IN\n\n"
        "In this project `sampling.control_branch` names it. diffusers has its class in "
        "`examples/research_projects/pixart/controlnet_pixart_alpha.py`, `PixArtControlNetAdapterModel`; that class is "
        "for bases of width 1152 alone.\n"
    )
