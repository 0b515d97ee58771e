"""Weights to and from files: diffusers' folders, PixArt's original .pth, DiT's official .pt.

Nothing goes missing silently: every stored key is used, known to be derived, or named in an error; every stored config
value is used or is the one we compute with.
"""

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from errors import UserError
from pixart.dit import DiT, DiTConfig
from pixart.layouts import (
    dit_diffusers_copies,
    dit_diffusers_layout,
    export_weights,
    load_weights,
    original_layout,
    pixart_diffusers_layout,
)
from pixart.model import PIXART_XL_2_1024, PixArt, PixArtConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"
DIFFUSERS_VERSION = "0.38.0"  # the oldest whose classes we are tested against
# config values that we compute with and that a folder may therefore not contradict
FIXED_CONFIG = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "only_cross_attention": False,
    "upcast_attention": False,
}
# latent side whose multiples scale the positions of a config without `interpolation_scale`: diffusers'
# `PixArtTransformer2DModel` takes `max(sample_size // 64, 1)`
DIFFUSERS_POSITION_BASE = 64
# heads of the published models, S to XL, by width: weights do not tell
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def save_diffusers(model: PixArt | DiT, folder: Path) -> None:
    """Write `model` as a folder that diffusers' `PixArtTransformer2DModel` or `DiTTransformer2DModel` opens.

    diffusers knows DiT's timesteps only with `timestep_shift` 1; with 0 our own `load_diffusers` is exact and
    diffusers close. A PixArt with per-block adaLN it refuses by its `norm_type`.
    """
    if model.kind == "pixart":
        config, layout, copies = _to_pixart_json(model.config), pixart_diffusers_layout(model.config), {}
    else:
        config, layout = _to_dit_json(model.config), dit_diffusers_layout(model.config)
        copies = dit_diffusers_copies(model.config)
    weights = export_weights(model, layout)
    weights |= {copy: weights[first].clone() for copy, first in copies.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / f"{WEIGHTS_NAME}.safetensors", metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_diffusers(folder: Path, *, timestep_shift: int | None = None) -> PixArt | DiT:
    """Open a diffusers folder of either model, with the weights in the dtype they are stored in.

    `timestep_shift` overrides DiT's: 0 fits official weights that were converted to diffusers' layout, such as
    facebook/DiT-XL-2-256. Raises ValueError for another model class, a config we do not compute, and keys or shapes
    that do not fit.
    """
    stored = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    weights = _read_weights(folder)
    # not `_class_name`: folders from before diffusers 0.28 call both models Transformer2DModel
    norm_type = stored.get("norm_type")
    if norm_type == "ada_norm_single" or (norm_type == "ada_norm_zero" and stored.get("caption_channels")):
        pixart_config = _from_pixart_json(stored)
        return load_weights(pixart_config, weights, pixart_diffusers_layout(pixart_config))
    if norm_type == "ada_norm_zero":
        dit_config = _from_dit_json(stored, timestep_shift)
        for copy, first in dit_diffusers_copies(dit_config).items():
            if copy in weights and first in weights and not torch.equal(weights.pop(copy), weights[first]):
                raise UserError(f"{copy} differs from {first}: DiT shares its embeddings among blocks")
        return load_weights(dit_config, weights, dit_diffusers_layout(dit_config))
    raise UserError(f"{folder / CONFIG_NAME} describes {stored.get('_class_name')}, not a PixArt or DiT transformer")


def load_original(path: Path, config: PixArtConfig | DiTConfig) -> PixArt | DiT:
    """Open PixArt's original .pth (the EMA weights where there are any) or DiT's official .pt.

    Such a file does not hold its shape: `config` says it, see `infer_config`. Positions are computed and not read; nor
    is PixArt's copy of the null caption, which is the text encoder's output for "".
    """
    return load_weights(config, read_original(path), original_layout(config))


def read_original(path: Path) -> dict[str, Tensor]:
    """Return the weights of an original file, the EMA weights where there are any.

    Raises:
        UserError: the file is not a checkpoint of torch, or holds more than weights.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a checkpoint of torch: {str(error).splitlines()[0]}") from None
    for wrapper in ("state_dict_ema", "ema", "state_dict"):
        if wrapper in weights:
            return weights[wrapper]
    return weights


def infer_config(weights: Mapping[str, Tensor], *, sample_size: int | None = None) -> PixArtConfig | DiTConfig:
    """Return the shape of a published PixArt or DiT from its original weights.

    `sample_size`, the side of the latents it was trained at, is read from the stored positions if it is not given.

    Raises:
        UserError: the weights are of another model, of a width nobody has published, or hold no positions.
    """
    is_dit = "y_embedder.embedding_table.weight" in weights
    if "x_embedder.proj.weight" not in weights or not (is_dit or "y_embedder.y_proj.fc1.weight" in weights):
        raise UserError("the weights are neither an original PixArt nor a DiT")
    width, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    if width not in PUBLISHED_HEADS:
        raise UserError(f"width {width} is none of {sorted(PUBLISHED_HEADS)}: the number of heads is not known")
    has_size_condition = any(key.startswith("csize_embedder.") for key in weights)
    if sample_size is None and "pos_embed" in weights:
        sample_size = math.isqrt(weights["pos_embed"].shape[-2]) * patch_size
    elif sample_size is None and has_size_condition:
        sample_size = PIXART_XL_2_1024.sample_size  # no other model is told the size
    elif sample_size is None:
        raise UserError("the weights hold no positions, so the resolution they were trained at must be given")
    shared: dict[str, Any] = {
        "num_layers": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        "num_heads": PUBLISHED_HEADS[width],
        "head_dim": width // PUBLISHED_HEADS[width],
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": len(weights["final_layer.linear.weight"]) // patch_size**2,
        "sample_size": sample_size,
    }
    if is_dit:
        return DiTConfig(**shared, num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1)
    return PixArtConfig(
        **shared,
        caption_channels=weights["y_embedder.y_proj.fc1.weight"].shape[1],
        interpolation_scale=_default_interpolation_scale(sample_size),
        has_size_condition=has_size_condition,
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS_NAME}.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {key: value for name in names for key, value in _load_file(folder / name).items()}
    pickled = folder / f"{WEIGHTS_NAME}.bin"
    if pickled.exists() and not (folder / f"{WEIGHTS_NAME}.safetensors").exists():
        return torch.load(pickled, map_location="cpu", weights_only=True)
    return _load_file(folder / f"{WEIGHTS_NAME}.safetensors")


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read, it may have been cut short: {error}") from None


def _shared_json(config: PixArtConfig | DiTConfig) -> dict[str, Any]:
    return {
        "_diffusers_version": DIFFUSERS_VERSION,
        "activation_fn": FIXED_CONFIG["activation_fn"],
        "norm_eps": FIXED_CONFIG["norm_eps"],
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
    }


def _from_shared_json(stored: dict[str, Any]) -> dict[str, int]:
    for key, value in FIXED_CONFIG.items():
        # diffusers' default 1e-5 comes with DiTs that were trained with 1e-6
        if stored.get(key, value) != value and (key, stored[key]) != ("norm_eps", 1e-5):
            raise UserError(f"the transformer's config has {key} {stored[key]}, only {value} is supported")
    return {
        "num_layers": stored["num_layers"],
        "num_heads": stored["num_attention_heads"],
        "head_dim": stored["attention_head_dim"],
        "patch_size": stored["patch_size"],
        "in_channels": stored["in_channels"],
        "out_channels": stored.get("out_channels") or stored["in_channels"],
        "sample_size": stored["sample_size"],
    }


def _to_pixart_json(config: PixArtConfig) -> dict[str, Any]:
    return {
        **_shared_json(config),
        "_class_name": "PixArtTransformer2DModel",
        "norm_type": "ada_norm_single" if config.adaln == "single" else "ada_norm_zero",
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_channels,
        "interpolation_scale": config.interpolation_scale,
        "use_additional_conditions": config.has_size_condition,
    }


def _default_interpolation_scale(sample_size: int) -> float:
    # also that of PixArt's own configs
    return max(sample_size // DIFFUSERS_POSITION_BASE, 1)


def _from_pixart_json(stored: dict[str, Any]) -> PixArtConfig:
    shared = _from_shared_json(stored)
    sample_size = shared["sample_size"]
    has_size_condition = stored.get("use_additional_conditions")
    return PixArtConfig(
        **shared,
        caption_channels=stored["caption_channels"],
        # both defaults as diffusers has them
        interpolation_scale=stored.get("interpolation_scale") or _default_interpolation_scale(sample_size),
        has_size_condition=sample_size == 128 if has_size_condition is None else has_size_condition,
        adaln="single" if stored["norm_type"] == "ada_norm_single" else "per-block",
    )


def _to_dit_json(config: DiTConfig) -> dict[str, Any]:
    return {
        **_shared_json(config),
        "_class_name": "DiTTransformer2DModel",
        "norm_type": "ada_norm_zero",
        "num_embeds_ada_norm": config.num_classes,
        "timestep_shift": config.timestep_shift,
    }


def _from_dit_json(stored: dict[str, Any], timestep_shift: int | None) -> DiTConfig:
    return DiTConfig(
        **_from_shared_json(stored),
        num_classes=stored["num_embeds_ada_norm"],
        timestep_shift=stored.get("timestep_shift", 1) if timestep_shift is None else timestep_shift,
    )
