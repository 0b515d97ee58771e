"""The shape that a `config.json` of diffusers' transformers describes, in the recipe's words and without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from errors import UserError
from pixart.weight_files import read_json

CONFIG_NAME = "config.json"
# what a config says by leaving a key out: the defaults of diffusers' classes
PIXART_DEFAULTS: dict[str, Any] = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 128,
    "norm_type": "ada_norm_single",
    "cross_attention_dim": None,  # where it is left out the weights' shapes say it
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "kv_compressed_blocks": [],  # ours; diffusers' PixArt has none
    "guidance_condition": False,  # as well
}
DIT_DEFAULTS: dict[str, Any] = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": None,
    "sample_size": 32,
    "norm_type": "ada_norm_zero",
    "cross_attention_dim": None,
    "caption_channels": None,
    "num_embeds_ada_norm": 1000,
    "timestep_shift": 1,  # ours; diffusers' timesteps have no other
}
# of a PixArt with blocks that compress keys and values: diffusers, which would pass over them, refuses what it says
COMPRESSED_NORM_TYPE = "ada_norm_single_kv_compression"
# of one that is told its guidance, with which diffusers would draw as if it were told none, and of one that does both
GUIDED_NORM_TYPE, GUIDED_COMPRESSED_NORM_TYPE = "ada_norm_single_guidance", f"{COMPRESSED_NORM_TYPE}_guidance"
# by whether keys and values are compressed, and whether it is told its guidance
SINGLE_NORM_TYPES = {
    (False, False): "ada_norm_single",
    (True, False): COMPRESSED_NORM_TYPE,
    (False, True): GUIDED_NORM_TYPE,
    (True, True): GUIDED_COMPRESSED_NORM_TYPE,
}
# by class, where a config leaves out its norm_type
NORM_TYPES = {"PixArtTransformer2DModel": "ada_norm_single", "DiTTransformer2DModel": "ada_norm_zero"}
# latent side whose multiples scale the positions of a config without `interpolation_scale`: diffusers'
# `PixArtTransformer2DModel` takes `max(sample_size // 64, 1)`
DIFFUSERS_POSITION_BASE = 64
# latent side at which a config without `use_additional_conditions` is told the size of images, as diffusers has it
CONDITIONED_SIDE = 128
# keys of `[model]` by those of a config
RECIPE_KEYS = {
    "num_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "patch_size": "patch_size",
}


def default_interpolation_scale(sample_size: int) -> float:
    """Return how far the positions are pulled apart where nothing says it, as diffusers and PixArt's configs do."""
    return max(sample_size // DIFFUSERS_POSITION_BASE, 1)


def kind_of(stored: Mapping[str, Any], path: Path) -> str:
    """Return `pixart` or `dit`, by what a config says.

    Raises:
        UserError: it is of another model; names the file.
    """
    # not `_class_name` alone: folders from before diffusers 0.28 call both models Transformer2DModel
    norm_type = stored.get("norm_type", NORM_TYPES.get(str(stored.get("_class_name"))))
    reads_captions = stored.get("caption_channels") is not None
    if norm_type in SINGLE_NORM_TYPES.values() or (norm_type == "ada_norm_zero" and reads_captions):
        return "pixart"
    if norm_type == "ada_norm_zero":
        return "dit"
    of_norm = "" if norm_type is None else f" of norm_type {norm_type}"
    raise UserError(f"{path} describes {stored.get('_class_name')}{of_norm}, not a PixArt or DiT")


def stored_shape(folder: Path) -> dict[str, Any]:
    """Return the keys of `[model]` that a folder of weights decides: a PixArt knows no classes, a DiT no adaLN.

    Raises:
        MissingFileError: the folder has no config.json.
        UserError: it is damaged or of another model; names the file.
    """
    path = folder / CONFIG_NAME
    found = read_json(path)
    kind = kind_of(found, path)
    stored = {**(PIXART_DEFAULTS if kind == "pixart" else DIT_DEFAULTS), **found}
    shape = {key: stored[name] for name, key in RECIPE_KEYS.items()}
    if kind == "dit":
        return shape | {"num_classes": stored["num_embeds_ada_norm"]}
    is_told = stored["use_additional_conditions"]
    return shape | {
        "adaln": adaln_of(stored),
        "size_condition": stored["sample_size"] == CONDITIONED_SIDE if is_told is None else bool(is_told),
    }


def adaln_of(stored: Mapping[str, Any]) -> Literal["single", "per-block"]:
    """Return the adaLN of a PixArt, by what its config says, defaults included."""
    return "single" if stored["norm_type"] in SINGLE_NORM_TYPES.values() else "per-block"
