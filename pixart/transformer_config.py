"""Our shapes of networks to and from `config.json` of diffusers' transformers.

Every stored key is one of four: it says the shape, it must have the value that we compute with, nothing is computed
with it, or it is unknown and therefore refused unless it is off.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import MissingFileError, UserError
from pixart.dit import DiTConfig
from pixart.model import PixArtConfig
from pixart.stored_shapes import (
    CONDITIONED_SIDE,
    CONFIG_NAME,
    DIT_DEFAULTS,
    PIXART_DEFAULTS,
    SINGLE_NORM_TYPES,
    adaln_of,
    default_interpolation_scale,
    kind_of,
)
from pixart.weight_files import describe_originals, read_json

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
    "num_vector_embeds": None,
}
# diffusers' default of its DiT, which comes with weights that were trained with 1e-6
DIT_NORM_EPS = 1e-5
# of groups in a norm and linear projections that only transformers of feature maps have, and of steps that a PixArt,
# whose blocks know no table of them, is never asked for
WITHOUT_EFFECT = ("norm_num_groups", "use_linear_projection", "num_embeds_ada_norm")
SHAPE_KEYS = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "in_channels", "sample_size")


def to_json(config: PixArtConfig | DiTConfig) -> dict[str, Any]:
    """Return what `config.json` must say for diffusers to build the network, or to refuse one that it has not."""
    shared = {
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
    if config.kind == "dit":
        return {
            **shared,
            "_class_name": "DiTTransformer2DModel",
            "norm_type": "ada_norm_zero",
            "num_embeds_ada_norm": config.num_classes,
            "timestep_shift": config.timestep_shift,
        }
    single = SINGLE_NORM_TYPES[bool(config.kv_compressed_blocks), config.has_guidance_condition]
    return {
        **shared,
        "_class_name": "PixArtTransformer2DModel",
        "norm_type": single if config.adaln == "single" else "ada_norm_zero",
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_channels,
        "interpolation_scale": config.interpolation_scale,
        "use_additional_conditions": config.has_size_condition,
        **({"kv_compressed_blocks": list(config.kv_compressed_blocks)} if config.kv_compressed_blocks else {}),
        **({"guidance_condition": True} if config.has_guidance_condition else {}),
    }


def read_transformer_config(folder: Path, *, timestep_shift: int | None = None) -> PixArtConfig | DiTConfig:
    """Return the shape that a diffusers folder describes; `timestep_shift` overrides a DiT's.

    Raises:
        MissingFileError: the folder has no config.json.
        UserError: it is of another model, or one of its keys asks for what we do not compute; names the file.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise MissingFileError(f"{folder} has no config.json of a transformer{describe_originals(folder)}")
    stored = read_json(path)
    kind = kind_of(stored, path)
    try:
        if kind == "pixart":
            return _pixart_config({**PIXART_DEFAULTS, **stored})
        return _dit_config({**DIT_DEFAULTS, **stored}, timestep_shift)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _pixart_config(stored: Mapping[str, Any]) -> PixArtConfig:
    _require_known(stored, PIXART_DEFAULTS)
    shared = _shape(stored)
    sample_size, width = shared["sample_size"], shared["num_heads"] * shared["head_dim"]
    if stored["cross_attention_dim"] not in (None, width):
        raise UserError(
            f"cross_attention_dim is {stored['cross_attention_dim']}, but captions are projected to the width, {width}"
        )
    scale, has_size_condition = stored["interpolation_scale"], stored["use_additional_conditions"]
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (is_number and scale > 0 and math.isfinite(scale)):
        raise UserError(f"interpolation_scale is {scale!r}, not a positive number")
    return PixArtConfig(
        **shared,
        caption_channels=_whole(stored, "caption_channels"),
        # both defaults as diffusers has them
        interpolation_scale=default_interpolation_scale(sample_size) if scale is None else scale,
        has_size_condition=sample_size == CONDITIONED_SIDE if has_size_condition is None else bool(has_size_condition),
        adaln=adaln_of(stored),
        **_extensions(stored),
    )


def _extensions(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return what diffusers' PixArt has not, and is told by a `norm_type` that it refuses."""
    blocks, is_guided, norm_type = stored["kv_compressed_blocks"], stored["guidance_condition"], stored["norm_type"]
    if not isinstance(blocks, list) or any(type(block) is not int for block in blocks):
        raise UserError(f"kv_compressed_blocks is {blocks!r}, not a list of numbers of blocks")
    if not isinstance(is_guided, bool):
        raise UserError(f"guidance_condition is {is_guided!r}, not true or false")
    said = next((key for key, norm in SINGLE_NORM_TYPES.items() if norm == norm_type), (bool(blocks), is_guided))
    for name, value, is_there, is_said in (
        ("kv_compressed_blocks", blocks, bool(blocks), said[0]),
        ("guidance_condition", is_guided, is_guided, said[1]),
    ):
        if is_there != is_said:
            raise UserError(f"norm_type is {norm_type!r}, which {name} {value!r} contradicts")
    return {"kv_compressed_blocks": tuple(blocks), "has_guidance_condition": is_guided}


def _dit_config(stored: Mapping[str, Any], timestep_shift: int | None) -> DiTConfig:
    stored = dict(stored)
    if stored.get("norm_eps") == DIT_NORM_EPS:
        del stored["norm_eps"]
    _require_known(stored, DIT_DEFAULTS)
    shift = stored["timestep_shift"] if timestep_shift is None else timestep_shift
    if shift not in (0, 1):
        raise UserError(f"timestep_shift is {shift!r}, not 0 or 1")
    return DiTConfig(**_shape(stored), num_classes=_whole(stored, "num_embeds_ada_norm"), timestep_shift=shift)


def _require_known(stored: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Refuse what a config says and we do not compute."""
    for key, value in stored.items():
        if key.startswith("_") or key in shape or key in WITHOUT_EFFECT:
            continue
        if key in FIXED_CONFIG and value != FIXED_CONFIG[key]:
            raise UserError(f"{key} is {value!r}, but only {FIXED_CONFIG[key]!r} is supported")
        if key not in FIXED_CONFIG and value not in (None, False):
            raise UserError(f"{key} is {value!r}, a setting that is not known here: without it the output may be wrong")


def _shape(stored: Mapping[str, Any]) -> dict[str, int]:
    sizes = {key: _whole(stored, key) for key in SHAPE_KEYS}
    return {
        "num_layers": sizes["num_layers"],
        "num_heads": sizes["num_attention_heads"],
        "head_dim": sizes["attention_head_dim"],
        "patch_size": sizes["patch_size"],
        "in_channels": sizes["in_channels"],
        "out_channels": sizes["in_channels"] if stored["out_channels"] is None else _whole(stored, "out_channels"),
        "sample_size": sizes["sample_size"],
    }


def _whole(stored: Mapping[str, Any], key: str) -> int:
    value = stored[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} is {value!r}, not a positive whole number")
    return value
