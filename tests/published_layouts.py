"""Files and folders in exactly the layouts of published models, with the shapes of XL/2 and weights of no memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.layers import position_embedding
from pixart.layouts import NULL_CAPTION, original_layout
from pixart.model import PixArt, PixArtConfig

XL = PixArtConfig()
# As diffusers wrote them when they were published: before Sigma no config had a scale of positions.
ALPHA_CONFIG: dict[str, Any] = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.22.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "upcast_attention": False,
    "use_linear_projection": False,
}
PARTS = {
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_transformer(folder: Path, **settings: Any) -> Path:
    """Write the `config.json` of a published transformer; `settings` are laid over alpha's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ALPHA_CONFIG | settings))
    return folder


def sigma_settings(sample_size: int) -> dict[str, Any]:
    return {
        "sample_size": sample_size,
        "interpolation_scale": sample_size / 64,
        "use_additional_conditions": False,
        "_diffusers_version": "0.28.0.dev0",
    }


def write_pipeline(folder: Path, class_name: str, *, vae: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write a pipeline's index and its transformer's config; `vae` is that of a `vae/`."""
    write_transformer(folder / "transformer", **settings)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name, **PARTS}))
    if vae is not None:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | vae))
    return folder


def original_weights_of(config: PixArtConfig, *, scale: float | None = None, null: Tensor | None = None) -> Any:
    """Return the tensors of an original file: of the published shapes, each with the memory of one number."""
    with torch.device("meta"):
        blank = PixArt(config).state_dict()
    weights = {}
    for theirs, ours in original_layout(config).items():
        first, *others = (blank[name].shape for name in ours)
        rows = first[0] + sum(shape[0] for shape in others)
        weights[theirs] = torch.zeros(1).expand(rows, *first[1:])
    if scale is not None:
        side = config.sample_size // config.patch_size
        weights["pos_embed"] = position_embedding(side, side, channels=config.width, base_size=side, scale=scale)[None]
    if null is not None:
        weights[NULL_CAPTION] = null
    return weights


def write_original(
    path: Path, config: PixArtConfig = XL, *, scale: float | None = None, null: Tensor | None = None, **shape: Any
) -> Path:
    """Write a `.pth` as the authors' code leaves it; `shape` is laid over `config`."""
    torch.save({"state_dict": original_weights_of(replace(config, **shape), scale=scale, null=null)}, path)
    return path
