"""States saved when the layers for query, key and value were one: taken apart, once, so that training goes on."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.store.checkpoints import Checkpoint

# In `trainer.json`; states without one are of the former layout.
LAYOUT_KEY, LAYOUT = "weight_layout", 2
SEPARATED = {
    "attention.qkv": ("attention.query", "attention.key", "attention.value"),
    "cross_attention.key_value": ("cross_attention.key", "cross_attention.value"),
}
MOMENTS = ("exp_avg", "exp_avg_sq")


def has_former_layout(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's state must be taken apart before it fits."""
    return checkpoint.trainer.get(LAYOUT_KEY, 1) < LAYOUT


def separate_state(source: Path, folder: Path) -> None:
    """Write DeepSpeed's state `source`, whole (ZeRO 0) or in its universal form, to `folder` in today's layout."""
    shutil.copytree(source, folder)
    for path in folder.glob("*model_states.pt"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        separate_model_state(state)
        torch.save(state, path)
    for weight in (folder / "zero").glob("*.*"):
        if weight.is_dir():
            _separate_universal(weight)


def separate_model_state(state: dict[str, Any]) -> None:
    """Take a model state of DeepSpeed apart in place: weights, their shapes, and without ZeRO the optimizer's state."""
    former_names = list(state["module"])
    state["module"] = _separate_all(state["module"])
    if state["param_shapes"] is not None:
        state["param_shapes"] = [
            {name: shape for former in shapes for name, shape in _separate_shape(former, shapes[former])}
            for shapes in state["param_shapes"]
        ]
    optimizer = state["optimizer"]
    if optimizer is None:
        return
    if "fp32_groups" in optimizer:  # bf16 weights with masters beside them
        masters = dict(zip(former_names, optimizer["fp32_groups"][0], strict=True))
        optimizer["fp32_groups"] = [list(_separate_all(masters).values())]
        optimizer = optimizer["optimizer_state_dict"]
    _separate_adam(optimizer, former_names)


def _separate_adam(optimizer: dict[str, Any], former_names: list[str]) -> None:
    """Number the moments of Adam anew: a weight's number is its place in the network."""
    states, names = optimizer["state"], _in_order(former_names)
    if states:
        # Clones, for Adam counts steps in place.
        parts = {
            name: {key: value.clone() for key, value in states[i].items() if key not in MOMENTS}
            for i, former in enumerate(former_names)
            for name in _separate(former)
        }
        for moment in MOMENTS:
            whole = {former: states[i][moment] for i, former in enumerate(former_names)}
            for name, value in _separate_all(whole).items():
                parts[name][moment] = value
        optimizer["state"] = {i: parts[name] for i, name in enumerate(names)}
    optimizer["param_groups"][0]["params"] = list(range(len(names)))


def _separate_universal(weight: Path) -> None:
    """Replace the folder of a weight's values and moments by those of the weights that took its place."""
    names = _separate(weight.name)
    if names == [weight.name]:
        return
    folders = [weight.with_name(name) for name in names]
    for folder in folders:
        folder.mkdir()
    for file in weight.glob("*.pt"):
        content = torch.load(file, map_location="cpu", weights_only=True)
        whole = content["param"] if isinstance(content, dict) else content  # ZeRO 3's is flat, and no more than that
        for i, folder in enumerate(folders):
            part = whole.chunk(len(names))[i].clone() if whole.dim() else whole  # the number of steps is one number
            torch.save(content | {"param": part} if isinstance(content, dict) else part, folder / file.name)
    shutil.rmtree(weight)


def _separate(name: str) -> list[str]:
    """Return the names that took a weight's or bias's place: its own, if there are none."""
    module, _, part = name.rpartition(".")
    for former, names in SEPARATED.items():
        if module.endswith(f".{former}"):
            return [f"{module.removesuffix(former)}{name}.{part}" for name in names]
    return [name]


def _separate_all(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take values by former name apart, in today's order; a value without elements (a share of ZeRO 3) stays so."""
    parts: dict[str, Tensor] = {}
    for former, value in values.items():
        names = _separate(former)
        rows = value.chunk(len(names)) if value.numel() else [value] * len(names)
        parts |= {name: part.clone() for name, part in zip(names, rows, strict=True)}
    return {name: parts[name] for name in _in_order(values)}


def _separate_shape(former: str, shape: torch.Size) -> list[tuple[str, torch.Size]]:
    names = _separate(former)
    return [(name, torch.Size((shape[0] // len(names), *shape[1:]))) for name in names]


def _in_order(former_names: Iterable[str]) -> list[str]:
    """Return today's names in the order of the network's parameters: layer by layer, of each weight and bias."""
    layers: dict[str, list[str]] = {}
    for former in former_names:
        for name in _separate(former):
            layer, _, part = name.rpartition(".")
            layers.setdefault(layer, []).append(part)
    return [f"{layer}.{part}" for layer, parts in layers.items() for part in parts]
