"""Weights to and from files: diffusers' folders, PixArt's original .pth, DiT's official .pt.

Nothing goes missing silently: every stored key is used, known to be derived, or named in an error; every stored config
value is used or is the one we compute with.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from pixart.dit import DiT, DiTConfig
from pixart.evidence import origins_of_file
from pixart.layers import position_embedding
from pixart.layouts import (
    NULL_CAPTION,
    dit_diffusers_copies,
    dit_diffusers_layout,
    export_weights,
    load_weights,
    original_layout,
    pixart_diffusers_layout,
    require_finite,
)
from pixart.model import PIXART_XL_2_1024, PixArt, PixArtConfig
from pixart.origins import Origins
from pixart.published import default_file_scale
from pixart.stored_shapes import CONFIG_NAME, default_interpolation_scale
from pixart.tensor_files import StoredWeights, read_weight_file, read_weights
from pixart.transformer_config import read_transformer_config, to_json
from pixart.weight_files import WEIGHTS_NAME

# heads of the published models, S to XL, by width: weights do not tell
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# what every original has beside what tells a PixArt from a DiT
ORIGINAL_KEYS = ("x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.mlp.fc1.weight")
# a side of latents, where a file does not say it and nothing depends on it
ANY_SIDE = 32
# of a block of PixArt-Sigma that compresses keys and values
COMPRESSED_KEY = re.compile(r"blocks\.(\d+)\.attn\.sr\.weight")
# of stored positions to computed ones: in single precision, in float16, in bfloat16, whatever type they are kept in
POSITION_TOLERANCES = (1e-4, 5e-4, 4e-3)


def save_diffusers(model: PixArt | DiT, folder: Path) -> None:
    """Write `model` as a folder that diffusers' `PixArtTransformer2DModel` or `DiTTransformer2DModel` opens.

    diffusers knows DiT's timesteps only with `timestep_shift` 1; with 0 our own `load_diffusers` is exact and
    diffusers close. A PixArt with per-block adaLN, whose blocks compress keys and values, or that is told its
    guidance, it refuses by its `norm_type`.
    """
    if model.kind == "pixart":
        layout, copies = pixart_diffusers_layout(model.config), {}
    else:
        layout, copies = dit_diffusers_layout(model.config), dit_diffusers_copies(model.config)
    weights = export_weights(model, layout)
    weights |= {copy: weights[first].clone() for copy, first in copies.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{WEIGHTS_NAME}.safetensors"
    path.touch()
    mode = path.stat().st_mode
    save_file(weights, path, metadata={"format": "pt"})
    # safetensors puts a file of its own in the place, which its owner alone may read, whatever the umask says.
    path.chmod(mode)
    config = json.dumps(to_json(model.config), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")


def load_diffusers(folder: Path, *, timestep_shift: int | None = None) -> PixArt | DiT:
    """Open a diffusers folder of either model, with the weights in the dtype they are stored in.

    `timestep_shift` overrides DiT's: 0 fits official weights that were converted to diffusers' layout, such as
    facebook/DiT-XL-2-256.

    Raises:
        MissingFileError: config.json, the weights or a piece of them are missing.
        UserError: it is another model, a config that we do not compute, a damaged file, or keys or shapes that do not
            fit.
    """
    config = read_transformer_config(folder, timestep_shift=timestep_shift)
    weights = read_weights(folder)
    if config.kind == "pixart":
        return load_weights(config, weights, pixart_diffusers_layout(config), where=str(folder))
    copies = dit_diffusers_copies(config)
    # NaN is not equal to itself, and would be called a difference of copies
    require_finite({name: weights[name] for name in (*copies, *copies.values()) if name in weights}, where=str(folder))
    for copy, first in copies.items():
        if copy in weights and first in weights and not torch.equal(weights.pop(copy), weights[first]):
            raise UserError(f"{folder}: {copy} differs from {first}: DiT shares its embeddings among blocks")
    return load_weights(config, weights, dit_diffusers_layout(config), where=str(folder))


def load_original(path: Path, config: PixArtConfig | DiTConfig) -> PixArt | DiT:
    """Open PixArt's original .pth (the EMA weights where there are any) or DiT's official .pt.

    Such a file does not hold its shape: `config` says it, see `infer_config`. Positions are computed and not read; nor
    is PixArt's copy of the null caption, which is the text encoder's output for "".
    """
    return load_weights(config, read_weight_file(path).tensors, original_layout(config), where=str(path))


def original_weights(model: PixArt | DiT) -> dict[str, Tensor]:
    """Return the weights under the names of PixArt's original .pth or DiT's official .pt, with the positions they hold.

    What PixArt's files have besides, the null caption `y_embedder.y_embedding`, is no weight but the text encoder's
    output for "", which is not known here.

    Raises:
        UserError: the original code computes another network of these weights: per-block adaLN, timesteps of diffusers'
            DiT, or another number of heads than the published one of this width.
    """
    config, weights = model.config, export_weights(model, original_layout(model.config))
    if config.kind == "dit" and config.timestep_shift:
        raise UserError("timestep_shift is 1, diffusers' way with a DiT's timesteps, but the original code's is 0")
    if config.num_heads != (heads := PUBLISHED_HEADS.get(config.width, config.num_heads)):
        raise UserError(
            f"num_heads is {config.num_heads}, but whoever opens an original of width {config.width} takes {heads}"
        )
    side = config.sample_size // config.patch_size
    scale = config.interpolation_scale if config.kind == "pixart" else 1.0
    positions = position_embedding(side, side, channels=config.width, base_size=side, scale=scale)
    return {"pos_embed": positions[None], **weights}


def infer_config(
    weights: Mapping[str, Tensor], *, sample_size: int | None = None, num_heads: int | None = None
) -> PixArtConfig | DiTConfig:
    """Return the shape of a PixArt or DiT from its original weights.

    Args:
        sample_size: side of the latents it was trained at; read from the stored positions if it is not given.
        num_heads: of a width that was never published.

    Raises:
        UserError: the weights are of another model, of a width that nobody has published and of unknown heads, or hold
            no positions or others than are computed here.
    """
    is_dit = is_original_dit(weights)
    _require_original(weights, is_dit=is_dit)
    width, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    num_heads = PUBLISHED_HEADS.get(width, num_heads)
    if num_heads is None:
        raise UserError(f"width {width} is none of {sorted(PUBLISHED_HEADS)}: the number of heads is not known")
    if num_heads < 1 or width % num_heads:
        raise UserError(f"width {width} is not divided by num_heads, which the file says are {num_heads}")
    has_size_condition = any(key.startswith("csize_embedder.") for key in weights)
    positions = weights.get("pos_embed")
    if sample_size is None and positions is not None:
        sample_size = math.isqrt(positions.shape[-2]) * patch_size
    elif sample_size is None and has_size_condition:
        sample_size = PIXART_XL_2_1024.sample_size  # no other model is told the size
    elif sample_size is None:
        raise UserError("the weights hold no positions, so the resolution they were trained at must be given")
    shared: dict[str, Any] = {
        "num_layers": 1 + max(int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))),
        "num_heads": num_heads,
        "head_dim": width // num_heads,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": len(weights["final_layer.linear.weight"]) // patch_size**2,
        "sample_size": sample_size,
    }
    scale = None if positions is None else _stored_scale(positions)
    if scale is None:
        scale = default_file_scale(sample_size, num_null_tokens=num_null_tokens(weights))
    if is_dit:
        if scale not in (None, 1.0):
            raise UserError(f"pos_embed has positions {1 / scale:g} apart, those of a DiT are 1 apart")
        return DiTConfig(**shared, num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1)
    return PixArtConfig(
        **shared,
        caption_channels=weights["y_embedder.y_proj.fc1.weight"].shape[1],
        interpolation_scale=default_interpolation_scale(sample_size) if scale is None else scale,
        has_size_condition=has_size_condition,
        kv_compressed_blocks=tuple(sorted(int(match[1]) for key in weights if (match := COMPRESSED_KEY.match(key)))),
    )


def file_origins(path: Path, stored: StoredWeights) -> Origins:
    """Return what is known of an original file that has been read; without positions nothing of those.

    Raises:
        UserError: see `infer_config`.
    """
    positions = stored.tensors.get("pos_embed")
    side = ANY_SIDE if positions is None else None
    config = infer_config(stored.tensors, sample_size=side, num_heads=stored.num_heads)
    shape = dataclasses.asdict(config) | ({"sample_size": None} if positions is None else {})
    return origins_of_file(
        path, shape, kind=config.kind, num_null_tokens=num_null_tokens(stored.tensors), record=stored.origins
    )


def is_original_dit(weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights of an original file are a DiT's, which has a table of classes."""
    return "y_embedder.embedding_table.weight" in weights


def num_null_tokens(weights: Mapping[str, Tensor]) -> int | None:
    """Return how many rows of the null caption an original file holds, as many as its text encoder read tokens."""
    stored = weights.get(NULL_CAPTION)
    return len(stored) if stored is not None and stored.ndim == 2 else None


def _require_original(weights: Mapping[str, Tensor], *, is_dit: bool) -> None:
    kind = "y_embedder.embedding_table.weight" if is_dit else "y_embedder.y_proj.fc1.weight"
    if any(weights[key].ndim < 2 if key in weights else True for key in (*ORIGINAL_KEYS, kind)):
        if "pos_embed.proj.weight" in weights:
            raise UserError("the weights have diffusers' names: name their folder, which needs a config.json, too")
        raise UserError("the weights are neither an original PixArt nor a DiT")
    if weights["x_embedder.proj.weight"].ndim != 4:
        raise UserError(
            f"x_embedder.proj.weight is {tuple(weights['x_embedder.proj.weight'].shape)}, not 4-dimensional"
        )
    if "pos_embed" in weights and weights["pos_embed"].ndim < 2:
        raise UserError(f"pos_embed is {tuple(weights['pos_embed'].shape)}, not 3-dimensional")


def _stored_scale(positions: Tensor) -> float | None:
    """Return how far the stored positions [1, N, D] are pulled apart, None of zeros, which nobody has filled.

    PixArt-Sigma's differ from alpha's at 256 pixels, and nothing else in the file tells them apart.

    Raises:
        UserError: they are not the sines and cosines of a square grid.
    """
    stored = positions.float().flatten(0, -2)  # [N, D]
    side, channels = math.isqrt(len(stored)), stored.shape[1]
    if not stored.any():
        return None
    if stored.isfinite().all():
        scale = 1 / (_column_step(stored[:side], channels // 4) or math.inf)
        # what people type comes before what was measured
        candidates = [near for near in (round(8 * scale) / 8, round(scale, 2), round(scale, 3), scale) if near > 0]

        @functools.cache
        def error(near: float) -> float:
            grid = position_embedding(side, side, channels=channels, base_size=side, scale=near)
            return float((grid - stored).abs().max()) if grid.shape == stored.shape else math.inf

        for tolerance in POSITION_TOLERANCES:
            for near in candidates:
                if error(near) <= tolerance:
                    return near
    raise UserError("pos_embed does not hold the sines and cosines of a square grid, and no others are computed")


def _column_step(row: Tensor, cosine: int) -> float:
    """Return how far the columns of a row of positions [side, D] are apart.

    Their first frequency is 1. The first column tells the angle of the step, each later one more exactly, where the
    turns that an angle leaves out are known from the columns before it.
    """
    step, column = (math.atan2(float(row[1, 0]), float(row[1, cosine])), 1) if len(row) > 1 else (1.0, 1)
    while column < len(row) - 1:
        column = min(2 * column, len(row) - 1)
        angle = math.atan2(float(row[column, 0]), float(row[column, cosine]))
        step = (angle + math.tau * round((column * step - angle) / math.tau)) / column
    return step
