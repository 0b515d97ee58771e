"""Names of weights on both sides: ours, diffusers', PixArt's original .pth and DiT's official .pt.

A layout maps each key of the other side to ours: several where it holds one matrix for queries, keys and values.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from errors import UserError
from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig

Layout = dict[str, tuple[str, ...]]
NAMED = 4  # of many keys that do not fit

# the null caption [L, D_text] of original files: a random buffer in alpha's code, what T5 gives for "" in Sigma's
NULL_CAPTION = "y_embedder.y_embedding"
# what others store and we compute: positions, and the text encoder's output for the null caption
DERIVED_KEYS = {"pos_embed", "pos_embed.pos_embed", NULL_CAPTION, "caption_projection.y_embedding"}


def original_layout(config: PixArtConfig | DiTConfig) -> Layout:
    """Layout of PixArt's original .pth or DiT's official .pt; UserError for a PixArt that has none."""
    _require_published_adaln(config)
    if config.kind == "pixart" and config.has_guidance_condition:
        raise UserError(
            "PixArt's original .pth has no place for a guidance condition: fold a guidance into the weights"
        )
    layout = {
        **_linear("x_embedder.proj", "patch_embed.projection"),
        **_linear("t_embedder.mlp.0", "timestep_embed.hidden"),
        **_linear("t_embedder.mlp.2", "timestep_embed.out"),
        **_linear("final_layer.linear", "final"),
    }
    for number in range(config.num_layers):
        layout |= _original_block(config, number, ours=f"blocks.{number}", theirs=f"blocks.{number}")
    if config.kind == "dit":
        layout |= {"y_embedder.embedding_table.weight": ("label_embed.weight",)}
        return layout | _linear("final_layer.adaLN_modulation.1", "final_modulation")
    layout |= {"final_layer.scale_shift_table": ("final_modulation.embedding",)}
    layout |= _linear("t_block.1", "global_modulation")
    layout |= _linear("y_embedder.y_proj.fc1", "caption_projection.hidden")
    layout |= _linear("y_embedder.y_proj.fc2", "caption_projection.out")
    if config.has_size_condition:
        for ours, theirs in (("size_embed", "csize_embedder"), ("aspect_ratio_embed", "ar_embedder")):
            layout |= _linear(f"{theirs}.mlp.0", f"{ours}.hidden") | _linear(f"{theirs}.mlp.2", f"{ours}.out")
    return layout


def pixart_diffusers_layout(config: PixArtConfig) -> Layout:
    """Layout of diffusers' `PixArtTransformer2DModel`; per-block adaLN, which it lacks, is named as in its DiT."""
    is_single = config.adaln == "single"
    layout = {
        **_linear("pos_embed.proj", "patch_embed.projection"),
        **_linear("adaln_single.emb.timestep_embedder.linear_1", "timestep_embed.hidden"),
        **_linear("adaln_single.emb.timestep_embedder.linear_2", "timestep_embed.out"),
        **_linear("caption_projection.linear_1", "caption_projection.hidden"),
        **_linear("caption_projection.linear_2", "caption_projection.out"),
        **_linear("proj_out", "final"),
    }
    if is_single:
        layout |= _linear("adaln_single.linear", "global_modulation")
        layout |= {"scale_shift_table": ("final_modulation.embedding",)}
    else:
        layout |= _linear("text_feature", "text_feature") | _linear("proj_out_1", "final_modulation")
    if config.has_guidance_condition:
        layout |= _linear("adaln_single.emb.guidance_embedder.linear_1", "guidance_embed.hidden")
        layout |= _linear("adaln_single.emb.guidance_embedder.linear_2", "guidance_embed.out")
    if config.has_size_condition:
        for ours, theirs in (("size_embed", "resolution_embedder"), ("aspect_ratio_embed", "aspect_ratio_embedder")):
            layout |= _linear(f"adaln_single.emb.{theirs}.linear_1", f"{ours}.hidden")
            layout |= _linear(f"adaln_single.emb.{theirs}.linear_2", f"{ours}.out")
    for number in range(config.num_layers):
        layout |= _diffusers_pixart_block(
            config, number, ours=f"blocks.{number}", theirs=f"transformer_blocks.{number}"
        )
    return layout


def control_diffusers_layout(config: PixArtConfig, num_copies: int) -> Layout:
    """Layout of a control branch in diffusers' research folder, `PixArtControlNetAdapterModel`."""
    layout = _linear("controlnet_blocks.0.before_proj", "control.before")
    for number in range(num_copies):
        theirs = f"controlnet_blocks.{number}"
        layout |= _diffusers_pixart_block(
            config, number, ours=f"control.copies.{number}", theirs=f"{theirs}.transformer_block"
        )
        layout |= _linear(f"{theirs}.after_proj", f"control.after.{number}")
    return layout


def control_original_layout(config: PixArtConfig, num_copies: int) -> Layout:
    """Layout of a control branch in PixArt-delta's .pth, where its base is beside it (`base_model.`).

    Raises:
        UserError: the blocks are of the ablation, which has no such file.
    """
    _require_published_adaln(config)
    layout = _linear("controlnet.0.before_proj", "control.before")
    for number in range(num_copies):
        theirs = f"controlnet.{number}"
        layout |= _original_block(config, number, ours=f"control.copies.{number}", theirs=f"{theirs}.copied_block")
        layout |= _linear(f"{theirs}.after_proj", f"control.after.{number}")
    return layout


def dit_diffusers_layout(config: DiTConfig) -> Layout:
    """Layout of diffusers' `DiTTransformer2DModel`, less the copies of the embeddings in blocks after the first."""
    embedding = "transformer_blocks.0.norm1.emb"
    layout = {
        **_linear("pos_embed.proj", "patch_embed.projection"),
        **_linear(f"{embedding}.timestep_embedder.linear_1", "timestep_embed.hidden"),
        **_linear(f"{embedding}.timestep_embedder.linear_2", "timestep_embed.out"),
        f"{embedding}.class_embedder.embedding_table.weight": ("label_embed.weight",),
        **_linear("proj_out_1", "final_modulation"),
        **_linear("proj_out_2", "final"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        layout |= _diffusers_block_layout(ours, theirs)
        layout |= _linear(f"{theirs}.norm1.linear", f"{ours}.modulation")
    return layout


def dit_diffusers_copies(config: DiTConfig) -> dict[str, str]:
    """Key of each block's copy of the embeddings -> key of the first block's."""
    first = "transformer_blocks.0.norm1.emb"
    shared = [name for name in dit_diffusers_layout(config) if name.startswith(first)]
    return {
        name.replace(first, f"transformer_blocks.{i}.norm1.emb"): name
        for i in range(1, config.num_layers)
        for name in shared
    }


def export_weights(model: PixArt | DiT, layout: Layout) -> dict[str, Tensor]:
    """Weights of `model` under the other side's keys, contiguous copies on the CPU."""
    return renamed(model.state_dict(), layout)


def renamed(weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Weights by our names under the other side's keys, contiguous copies on the CPU."""
    ours = {name: value.detach().cpu() for name, value in weights.items()}
    return {theirs: torch.cat([ours[name] for name in names]) for theirs, names in layout.items()}


def load_weights(
    config: PixArtConfig | DiTConfig, weights: Mapping[str, Tensor], layout: Layout, *, where: str
) -> PixArt | DiT:
    """Build the model of `config` from the other side's `weights`, which are from the file or folder `where`.

    Raises:
        UserError: see `fitted`.
    """
    with torch.device("meta"):  # no time and memory for an initialisation that is thrown away
        model = config.network()
    model.load_state_dict(fitted(model, weights, layout, words=_words(config), where=where), assign=True)
    return model


def fitted(
    module: nn.Module, weights: Mapping[str, Tensor], layout: Layout, *, words: str, where: str
) -> dict[str, Tensor]:
    """Return the other side's `weights` by our names, as `module` has them; they are from the file or folder `where`.

    Raises:
        UserError: some are missing, unexpected, of other shapes, or no finite floating-point numbers; names `where`,
            them, and by `words` what they were to fit.
    """
    missing, unexpected = sorted(layout.keys() - weights.keys()), sorted(weights.keys() - layout.keys() - DERIVED_KEYS)
    if missing or unexpected:
        by_fault = {"missing": missing, "unexpected": unexpected}
        listed = "; ".join(f"{fault} {_some(names)}" for fault, names in by_fault.items() if names)
        raise UserError(f"{where}: the weights do not fit {words}: {listed}")
    if whole := [name for name in layout if not weights[name].is_floating_point()]:
        dtype = str(weights[whole[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: {whole[0]} is {dtype}: weights that were quantised are not read; name those they were made of"
        )
    require_finite({name: weights[name] for name in layout}, where=where)
    shapes = {name: parameter.shape for name, parameter in module.state_dict().items()}
    ours: dict[str, Tensor] = {}
    for theirs, names in layout.items():
        num_rows = [shapes[name][0] for name in names]
        whole = (sum(num_rows), *shapes[names[0]][1:])
        if weights[theirs].shape != whole:
            raise UserError(f"{where}: {theirs} is {tuple(weights[theirs].shape)}, {words} needs {whole}")
        parts = weights[theirs].split(num_rows)
        ours |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return ours


def require_finite(weights: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse NaN and infinity: UserError names `where` and the first weight that has some."""
    for name, value in weights.items():
        comparable = value.float() if value.itemsize == 1 else value  # float8 has no order
        if value.numel() and not all(bound.isfinite() for bound in comparable.aminmax()):
            number = int(comparable.isfinite().logical_not().sum())
            raise UserError(
                f"{where}: {number:,} of the {value.numel():,} numbers of {name} are not finite: the training that "
                "wrote them has failed, or the file is damaged"
            )


def _require_published_adaln(config: PixArtConfig | DiTConfig) -> None:
    if config.kind == "pixart" and config.adaln != "single":
        raise UserError(f"adaln is {config.adaln}, but PixArt's original .pth knows only adaLN-single")


def _words(config: PixArtConfig | DiTConfig) -> str:
    return f"a {config.title} of {config.num_layers} blocks of width {config.width}"


def _some(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _linear(theirs: str, *ours: str) -> Layout:
    return {f"{theirs}.{part}": tuple(f"{name}.{part}" for name in ours) for part in ("weight", "bias")}


def _original_block(config: PixArtConfig | DiTConfig, number: int, *, ours: str, theirs: str) -> Layout:
    query_key_value = (f"{ours}.attention.query", f"{ours}.attention.key", f"{ours}.attention.value")
    layout = {
        **_linear(f"{theirs}.attn.qkv", *query_key_value),
        **_linear(f"{theirs}.attn.proj", f"{ours}.attention.out"),
        **_linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.hidden"),
        **_linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.out"),
    }
    if config.kind == "dit":
        return layout | _linear(f"{theirs}.adaLN_modulation.1", f"{ours}.modulation")
    layout |= {f"{theirs}.scale_shift_table": (f"{ours}.modulation.embedding",)}
    layout |= _linear(f"{theirs}.cross_attn.q_linear", f"{ours}.cross_attention.query")
    layout |= _linear(f"{theirs}.cross_attn.kv_linear", f"{ours}.cross_attention.key", f"{ours}.cross_attention.value")
    layout |= _linear(f"{theirs}.cross_attn.proj", f"{ours}.cross_attention.out")
    if number in config.kv_compressed_blocks:
        layout |= _linear(f"{theirs}.attn.sr", f"{ours}.attention.compression.convolution")
        layout |= _linear(f"{theirs}.attn.norm", f"{ours}.attention.compression.norm")
    return layout


def _diffusers_pixart_block(config: PixArtConfig, number: int, *, ours: str, theirs: str) -> Layout:
    layout = {
        **_diffusers_block_layout(ours, theirs),
        **_linear(f"{theirs}.attn2.to_q", f"{ours}.cross_attention.query"),
        **_linear(f"{theirs}.attn2.to_k", f"{ours}.cross_attention.key"),
        **_linear(f"{theirs}.attn2.to_v", f"{ours}.cross_attention.value"),
        **_linear(f"{theirs}.attn2.to_out.0", f"{ours}.cross_attention.out"),
    }
    if number in config.kv_compressed_blocks:
        for part in ("convolution", "norm"):
            layout |= _linear(f"{theirs}.attn1.compression.{part}", f"{ours}.attention.compression.{part}")
    if config.adaln == "single":
        return layout | {f"{theirs}.scale_shift_table": (f"{ours}.modulation.embedding",)}
    return layout | _linear(f"{theirs}.norm1.linear", f"{ours}.modulation")


def _diffusers_block_layout(ours: str, theirs: str) -> Layout:
    return {
        **_linear(f"{theirs}.attn1.to_q", f"{ours}.attention.query"),
        **_linear(f"{theirs}.attn1.to_k", f"{ours}.attention.key"),
        **_linear(f"{theirs}.attn1.to_v", f"{ours}.attention.value"),
        **_linear(f"{theirs}.attn1.to_out.0", f"{ours}.attention.out"),
        **_linear(f"{theirs}.ff.net.0.proj", f"{ours}.mlp.hidden"),
        **_linear(f"{theirs}.ff.net.2", f"{ours}.mlp.out"),
    }
