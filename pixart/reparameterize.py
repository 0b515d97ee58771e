"""From a class-conditional DiT to PixArt, keeping what it has learnt (PixArt-alpha, section 2.3)."""

# D width

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from pixart.dit import DiT, DiTBlock
from pixart.model import PixArt, PixArtConfig


@torch.no_grad()
def reparameterize(dit: DiT, config: PixArtConfig, *, timestep: int = 500) -> PixArt:
    """PixArt whose output at `timestep` equals the DiT's without class, whatever the text.

    The first block's adaLN layer becomes the global one, and each block's embedding makes up for the difference to the
    block's own at `timestep`: E_i = f_i(t) - f_0(t). With per-block adaLN the layers are carried as they are, and the
    outputs are equal at every timestep, unless the DiT's `timestep_shift` is 1 and PixArt's 0: then biases make up for
    the difference at `timestep` alone. Cross-attention starts at zero and the caption projection at random, from
    torch's global generator. Raises UserError if the two models differ in shape.
    """
    _require_same_shape(dit, config)
    model = PixArt(config).to(dit.final.weight)
    model.timestep_embed.load_state_dict(dit.timestep_embed.state_dict())
    moment = torch.tensor([timestep], device=dit.final.weight.device)
    # equal unless the DiT's timestep_shift is not PixArt's
    dit_condition, condition = dit.timestep_embed(moment), model.timestep_embed(moment)  # [1, D]
    weights = {
        key: value
        for key, value in dit.state_dict().items()
        if "modulation" not in key and not key.startswith("label_embed.")
    }
    if config.adaln == "single":
        weights |= _single_modulation(dit, dit_condition, condition)
    else:
        weights |= _own_modulation(dit, dit_condition, condition)
    model.load_state_dict(model.state_dict() | weights)
    return model


def _single_modulation(dit: DiT, dit_condition: Tensor, condition: Tensor) -> dict[str, Tensor]:
    (first, *_), final = _block_modulations(dit), dit.final_modulation
    weights = {f"global_modulation.{part}": value for part, value in first.state_dict().items()}
    for i, layer in enumerate(_block_modulations(dit)):
        difference = layer(F.silu(dit_condition)) - first(F.silu(condition))
        weights[f"blocks.{i}.modulation.embedding"] = difference.unflatten(-1, (6, -1))[0]  # [6, D]
    final_vectors = final(F.silu(dit_condition)).unflatten(-1, (2, -1))  # [1, 2, D]
    return weights | {"final_modulation.embedding": (final_vectors - condition[:, None])[0]}


def _own_modulation(dit: DiT, dit_condition: Tensor, condition: Tensor) -> dict[str, Tensor]:
    weights = {key: value for key, value in dit.state_dict().items() if "modulation" in key}
    layers = {f"blocks.{i}.modulation": layer for i, layer in enumerate(_block_modulations(dit))}
    for name, layer in {**layers, "final_modulation": dit.final_modulation}.items():
        weights[f"{name}.bias"] = layer.bias + (layer(F.silu(dit_condition)) - layer(F.silu(condition))).flatten()
    return weights


def _block_modulations(dit: DiT) -> list[nn.Linear]:
    return [cast("DiTBlock", block).modulation for block in dit.blocks]


def _require_same_shape(dit: DiT, config: PixArtConfig) -> None:
    for name in ("num_layers", "num_heads", "head_dim", "patch_size", "in_channels", "out_channels"):
        ours, theirs = getattr(config, name), getattr(dit.config, name)
        if ours != theirs:
            raise UserError(f"model.{name} is {ours}, but {theirs} in the DiT it starts from")
    span = config.sample_size / config.interpolation_scale
    if span != dit.config.sample_size:
        raise UserError(
            f"positions span {span:g} (latents a side, divided by training.interpolation_scale = "
            f"{config.interpolation_scale:g}), but positions span {dit.config.sample_size} in the DiT it starts from"
        )
