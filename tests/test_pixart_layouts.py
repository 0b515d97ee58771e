"""Original files against diffusers' own models, under the renaming of diffusers' scripts.

Those are `scripts/convert_pixart_alpha_to_diffusers.py` and `scripts/convert_dit_to_diffusers.py`.
"""

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from pixart.convert import load_original
from pixart.dit import DiTConfig
from pixart.model import PixArtConfig

Weights = dict[str, Tensor]
WIDTH, TEXT_WIDTH, NUM_LAYERS, NUM_CLASSES, SIDE = 24, 20, 2, 10, 8
SHAPE = {"num_layers": NUM_LAYERS, "sample_size": SIDE, "in_channels": 4, "out_channels": 8, "patch_size": 2}
OUR_SHAPE: dict[str, Any] = SHAPE | {"num_heads": 2, "head_dim": 12}
THEIR_SHAPE: dict[str, Any] = SHAPE | {"num_attention_heads": 2, "attention_head_dim": 12}

# layers of an original block -> of diffusers' block; a fused projection holds the rows of several, one after the other
BLOCK_LAYERS = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
PIXART_BLOCK_LAYERS = BLOCK_LAYERS | {
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
}
DIT_BLOCK_LAYERS = BLOCK_LAYERS | {"adaLN_modulation.1": ("norm1.linear",)}
PIXART_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
SIZE_LAYERS = {
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
}
DIT_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
DIT_TIME_LAYERS = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}


def layer(name: str, *shape: int) -> Weights:
    fan_in = torch.Size(shape[1:]).numel()
    return {f"{name}.weight": torch.randn(shape) / (2 * fan_in**0.5), f"{name}.bias": torch.randn(shape[0]) / 2}


def original_shared() -> Weights:
    """Random weights under the names that both originals have."""
    weights = {
        **layer("x_embedder.proj", WIDTH, 4, 2, 2),
        **layer("t_embedder.mlp.0", WIDTH, 256),
        **layer("t_embedder.mlp.2", WIDTH, WIDTH),
        **layer("final_layer.linear", 2 * 2 * 8, WIDTH),
    }
    for i in range(NUM_LAYERS):
        weights |= layer(f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH)
        weights |= layer(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        weights |= layer(f"blocks.{i}.mlp.fc1", 4 * WIDTH, WIDTH)
        weights |= layer(f"blocks.{i}.mlp.fc2", WIDTH, 4 * WIDTH)
    return weights


def original_pixart(*, has_size_condition: bool) -> Weights:
    weights = original_shared()
    weights |= layer("t_block.1", 6 * WIDTH, WIDTH)
    weights |= layer("y_embedder.y_proj.fc1", WIDTH, TEXT_WIDTH) | layer("y_embedder.y_proj.fc2", WIDTH, WIDTH)
    weights["final_layer.scale_shift_table"] = torch.randn(2, WIDTH)
    for name in ("csize_embedder", "ar_embedder") if has_size_condition else ():
        weights |= layer(f"{name}.mlp.0", WIDTH // 3, 256) | layer(f"{name}.mlp.2", WIDTH // 3, WIDTH // 3)
    for i in range(NUM_LAYERS):
        weights |= layer(f"blocks.{i}.cross_attn.q_linear", WIDTH, WIDTH)
        weights |= layer(f"blocks.{i}.cross_attn.kv_linear", 2 * WIDTH, WIDTH)
        weights |= layer(f"blocks.{i}.cross_attn.proj", WIDTH, WIDTH)
        weights[f"blocks.{i}.scale_shift_table"] = torch.randn(6, WIDTH)
    return weights


def original_dit() -> Weights:
    weights = original_shared() | layer("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    weights["y_embedder.embedding_table.weight"] = torch.randn(NUM_CLASSES + 1, WIDTH)
    for i in range(NUM_LAYERS):
        weights |= layer(f"blocks.{i}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    return weights


def renamed(weights: Weights, theirs: str, *ours: str) -> Weights:
    """The layer `theirs` of the original, split into the layers `ours` of diffusers."""
    parts = {part: weights[f"{theirs}.{part}"].chunk(len(ours)) for part in ("weight", "bias")}
    return {f"{name}.{part}": rows[i] for part, rows in parts.items() for i, name in enumerate(ours)}


def renamed_blocks(weights: Weights, layers: dict[str, tuple[str, ...]]) -> Weights:
    converted: Weights = {}
    for i in range(NUM_LAYERS):
        for original, names in layers.items():
            converted |= renamed(
                weights, f"blocks.{i}.{original}", *[f"transformer_blocks.{i}.{name}" for name in names]
            )
    return converted


def pixart_of_diffusers(weights: Weights, *, has_size_condition: bool) -> PixArtTransformer2DModel:
    converted = renamed_blocks(weights, PIXART_BLOCK_LAYERS)
    for original, name in (PIXART_LAYERS | SIZE_LAYERS if has_size_condition else PIXART_LAYERS).items():
        converted |= renamed(weights, original, name)
    converted["scale_shift_table"] = weights["final_layer.scale_shift_table"]
    for i in range(NUM_LAYERS):
        converted[f"transformer_blocks.{i}.scale_shift_table"] = weights[f"blocks.{i}.scale_shift_table"]
    model = PixArtTransformer2DModel(
        **THEIR_SHAPE,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        interpolation_scale=1,
        use_additional_conditions=has_size_condition,
    )
    model.load_state_dict(converted)
    return model.eval()


def dit_of_diffusers(weights: Weights, *, timestep_shift: int) -> DiTTransformer2DModel:
    converted = renamed_blocks(weights, DIT_BLOCK_LAYERS)
    for original, name in DIT_LAYERS.items():
        converted |= renamed(weights, original, name)
    for i in range(NUM_LAYERS):
        embedding = f"transformer_blocks.{i}.norm1.emb"
        for original, name in DIT_TIME_LAYERS.items():
            converted |= renamed(weights, original, f"{embedding}.{name}")
        table = weights["y_embedder.embedding_table.weight"]
        converted[f"{embedding}.class_embedder.embedding_table.weight"] = table
    model = DiTTransformer2DModel(**THEIR_SHAPE, num_embeds_ada_norm=NUM_CLASSES, norm_eps=1e-6)
    model.load_state_dict(converted)
    for module in model.modules():
        if isinstance(module, Timesteps):  # diffusers has 1, the official code, which trained the weights, 0
            module.downscale_freq_shift = timestep_shift
    return model.eval()


@pytest.mark.parametrize("has_size_condition", [False, True], ids=["plain", "sized"])
@torch.no_grad()
def test_an_original_pixart_computes_what_diffusers_does_after_conversion(tmp_path, has_size_condition):
    torch.manual_seed(0)
    weights = original_pixart(has_size_condition=has_size_condition)
    stored = weights | {"pos_embed": torch.randn(1, 16, WIDTH), "y_embedder.y_embedding": torch.randn(120, TEXT_WIDTH)}
    torch.save({"state_dict": stored}, tmp_path / "model.pth")
    config = PixArtConfig(**OUR_SHAPE, caption_channels=TEXT_WIDTH, has_size_condition=has_size_condition)
    model = load_original(tmp_path / "model.pth", config).eval()

    reference = pixart_of_diffusers(weights, has_size_condition=has_size_condition)
    latents, text, timesteps = torch.randn(2, 4, 8, 12), torch.randn(2, 5, TEXT_WIDTH), torch.tensor([9, 900])
    size = torch.tensor([[64.0, 96.0, 64 / 96], [96.0, 64.0, 96 / 64]]) if has_size_condition else None
    added = {} if size is None else {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}
    expected = reference(latents, text, timestep=timesteps, added_cond_kwargs=added).sample
    torch.testing.assert_close(model(latents, timesteps, text, size=size), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep_shift", [0, 1], ids=["official", "diffusers"])
@torch.no_grad()
def test_an_original_dit_computes_what_diffusers_does_after_conversion(tmp_path, timestep_shift):
    torch.manual_seed(0)
    weights = original_dit()
    torch.save(weights | {"pos_embed": torch.randn(1, 16, WIDTH)}, tmp_path / "model.pt")
    config = DiTConfig(**OUR_SHAPE, num_classes=NUM_CLASSES, timestep_shift=timestep_shift)
    model = load_original(tmp_path / "model.pt", config).eval()

    reference = dit_of_diffusers(weights, timestep_shift=timestep_shift)
    latents, labels, timesteps = torch.randn(2, 4, SIDE, SIDE), torch.tensor([3, NUM_CLASSES]), torch.tensor([9, 900])
    expected = reference(latents, timestep=timesteps, class_labels=labels).sample
    torch.testing.assert_close(model(latents, timesteps, labels), expected, rtol=1e-5, atol=1e-5)
