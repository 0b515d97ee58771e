"""Names of weights on both sides: ours, diffusers', PixArt's original .pth and DiT's official .pt.

A layout maps each of our keys to the keys of the other side, several where we hold one fused projection.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig

Layout = dict[str, tuple[str, ...]]

# what others store and we compute: positions, and the text encoder's output for the null caption
DERIVED_KEYS = {"pos_embed", "pos_embed.pos_embed", "y_embedder.y_embedding", "caption_projection.y_embedding"}


def original_layout(config: PixArtConfig | DiTConfig) -> Layout:
    """Layout of PixArt's original .pth or DiT's official .pt; ValueError for the ablation, which has none."""
    if isinstance(config, PixArtConfig) and config.adaln != "single":
        raise ValueError(f"adaln is {config.adaln}, but PixArt's original .pth knows only adaLN-single")
    layout = {
        **_linear("patch_embed.projection", "x_embedder.proj"),
        **_linear("timestep_embed.hidden", "t_embedder.mlp.0"),
        **_linear("timestep_embed.out", "t_embedder.mlp.2"),
        **_linear("final", "final_layer.linear"),
    }
    for i in range(config.num_layers):
        ours = theirs = f"blocks.{i}"
        layout |= _linear(f"{ours}.attention.qkv", f"{theirs}.attn.qkv")
        layout |= _linear(f"{ours}.attention.out", f"{theirs}.attn.proj")
        layout |= _linear(f"{ours}.mlp.hidden", f"{theirs}.mlp.fc1")
        layout |= _linear(f"{ours}.mlp.out", f"{theirs}.mlp.fc2")
        if isinstance(config, PixArtConfig):
            layout |= {f"{ours}.modulation.embedding": (f"{theirs}.scale_shift_table",)}
            layout |= _linear(f"{ours}.cross_attention.query", f"{theirs}.cross_attn.q_linear")
            layout |= _linear(f"{ours}.cross_attention.key_value", f"{theirs}.cross_attn.kv_linear")
            layout |= _linear(f"{ours}.cross_attention.out", f"{theirs}.cross_attn.proj")
        else:
            layout |= _linear(f"{ours}.modulation", f"{theirs}.adaLN_modulation.1")
    if isinstance(config, DiTConfig):
        layout |= {"label_embed.weight": ("y_embedder.embedding_table.weight",)}
        return layout | _linear("final_modulation", "final_layer.adaLN_modulation.1")
    layout |= {"final_modulation.embedding": ("final_layer.scale_shift_table",)}
    layout |= _linear("global_modulation", "t_block.1")
    layout |= _linear("caption_projection.hidden", "y_embedder.y_proj.fc1")
    layout |= _linear("caption_projection.out", "y_embedder.y_proj.fc2")
    if config.has_size_condition:
        for ours, theirs in (("size_embed", "csize_embedder"), ("aspect_ratio_embed", "ar_embedder")):
            layout |= _linear(f"{ours}.hidden", f"{theirs}.mlp.0") | _linear(f"{ours}.out", f"{theirs}.mlp.2")
    return layout


def pixart_diffusers_layout(config: PixArtConfig) -> Layout:
    """Layout of diffusers' `PixArtTransformer2DModel`; per-block adaLN, which it lacks, is named as in its DiT."""
    is_single = config.adaln == "single"
    layout = {
        **_linear("patch_embed.projection", "pos_embed.proj"),
        **_linear("timestep_embed.hidden", "adaln_single.emb.timestep_embedder.linear_1"),
        **_linear("timestep_embed.out", "adaln_single.emb.timestep_embedder.linear_2"),
        **_linear("caption_projection.hidden", "caption_projection.linear_1"),
        **_linear("caption_projection.out", "caption_projection.linear_2"),
        **_linear("final", "proj_out"),
    }
    if is_single:
        layout |= _linear("global_modulation", "adaln_single.linear")
        layout |= {"final_modulation.embedding": ("scale_shift_table",)}
    else:
        layout |= _linear("text_feature", "text_feature") | _linear("final_modulation", "proj_out_1")
    if config.has_size_condition:
        for ours, theirs in (("size_embed", "resolution_embedder"), ("aspect_ratio_embed", "aspect_ratio_embedder")):
            layout |= _linear(f"{ours}.hidden", f"adaln_single.emb.{theirs}.linear_1")
            layout |= _linear(f"{ours}.out", f"adaln_single.emb.{theirs}.linear_2")
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        layout |= _diffusers_block_layout(ours, theirs)
        layout |= _linear(f"{ours}.cross_attention.query", f"{theirs}.attn2.to_q")
        layout |= _linear(f"{ours}.cross_attention.key_value", f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v")
        layout |= _linear(f"{ours}.cross_attention.out", f"{theirs}.attn2.to_out.0")
        if is_single:
            layout |= {f"{ours}.modulation.embedding": (f"{theirs}.scale_shift_table",)}
        else:
            layout |= _linear(f"{ours}.modulation", f"{theirs}.norm1.linear")
    return layout


def dit_diffusers_layout(config: DiTConfig) -> Layout:
    """Layout of diffusers' `DiTTransformer2DModel`, less the copies of the embeddings in blocks after the first."""
    embedding = "transformer_blocks.0.norm1.emb"
    layout = {
        **_linear("patch_embed.projection", "pos_embed.proj"),
        **_linear("timestep_embed.hidden", f"{embedding}.timestep_embedder.linear_1"),
        **_linear("timestep_embed.out", f"{embedding}.timestep_embedder.linear_2"),
        "label_embed.weight": (f"{embedding}.class_embedder.embedding_table.weight",),
        **_linear("final_modulation", "proj_out_1"),
        **_linear("final", "proj_out_2"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        layout |= _diffusers_block_layout(ours, theirs)
        layout |= _linear(f"{ours}.modulation", f"{theirs}.norm1.linear")
    return layout


def dit_diffusers_copies(config: DiTConfig) -> dict[str, str]:
    """Key of each block's copy of the embeddings -> key of the first block's."""
    first = "transformer_blocks.0.norm1.emb"
    shared = [name for names in dit_diffusers_layout(config).values() for name in names if name.startswith(first)]
    return {
        name.replace(first, f"transformer_blocks.{i}.norm1.emb"): name
        for i in range(1, config.num_layers)
        for name in shared
    }


def export_weights(model: PixArt | DiT, layout: Layout) -> dict[str, Tensor]:
    """Weights of `model` under the other side's keys, contiguous copies on the CPU."""
    exported: dict[str, Tensor] = {}
    for ours, value in model.state_dict().items():
        parts = value.chunk(len(layout[ours]))
        exported |= {theirs: part.detach().cpu().clone() for theirs, part in zip(layout[ours], parts, strict=True)}
    return exported


def load_weights(config: PixArtConfig | DiTConfig, weights: Mapping[str, Tensor], layout: Layout) -> PixArt | DiT:
    """Build the model of `config` from the other side's `weights`; ValueError lists what is missing or unexpected."""
    expected = {theirs for names in layout.values() for theirs in names}
    missing, unexpected = sorted(expected - weights.keys()), sorted(weights.keys() - expected - DERIVED_KEYS)
    if missing or unexpected:
        raise ValueError(f"weights do not fit {config}: missing {missing}, unexpected {unexpected}")
    with torch.device("meta"):  # no time and memory for an initialisation that is thrown away
        model = PixArt(config) if isinstance(config, PixArtConfig) else DiT(config)
    ours = {key: torch.cat([weights[name] for name in names]) for key, names in layout.items()}
    for key, parameter in model.state_dict().items():
        if ours[key].shape != parameter.shape:
            raise ValueError(f"{layout[key]} give {tuple(ours[key].shape)}, {config} needs {tuple(parameter.shape)}")
    model.load_state_dict(ours, assign=True)
    return model


def _linear(ours: str, *theirs: str) -> Layout:
    return {f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias")}


def _diffusers_block_layout(ours: str, theirs: str) -> Layout:
    qkv = (f"{theirs}.attn1.to_q", f"{theirs}.attn1.to_k", f"{theirs}.attn1.to_v")
    return {
        **_linear(f"{ours}.attention.qkv", *qkv),
        **_linear(f"{ours}.attention.out", f"{theirs}.attn1.to_out.0"),
        **_linear(f"{ours}.mlp.hidden", f"{theirs}.ff.net.0.proj"),
        **_linear(f"{ours}.mlp.out", f"{theirs}.ff.net.2"),
    }
