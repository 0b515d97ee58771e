"""From a class-conditional DiT to PixArt, keeping what it has learnt (PixArt-alpha, section 2.3)."""

# D width

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.dit import DiT
from pixart.model import PixArt, PixArtConfig


@torch.no_grad()
def reparameterize(dit: DiT, config: PixArtConfig, *, timestep: int = 500) -> PixArt:
    """PixArt whose output at `timestep` equals the DiT's without class, whatever the text.

    The first block's adaLN layer becomes the global one, and each block's embedding makes up for the difference to the
    block's own at `timestep`: E_i = f_i(t) - f_0(t). Cross-attention starts at zero and the caption projection at
    random, from torch's global generator. Raises ValueError if the two models differ in shape.
    """
    _require_same_shape(dit, config)
    model = PixArt(config).to(dit.final.weight)
    model.timestep_embed.load_state_dict(dit.timestep_embed.state_dict())
    weights = dit.state_dict()
    moment = torch.tensor([timestep], device=dit.final.weight.device)
    # equal unless the DiT's timestep_shift is not PixArt's
    dit_condition, condition = dit.timestep_embed(moment), model.timestep_embed(moment)  # [1, D]

    def adaln(name: str, condition: Tensor) -> Tensor:
        return F.linear(F.silu(condition), weights[f"{name}.weight"], weights[f"{name}.bias"])

    carried = {key: value for key, value in weights.items() if "modulation" not in key and "label_embed" not in key}
    for part in ("weight", "bias"):
        carried[f"global_modulation.{part}"] = weights[f"blocks.0.modulation.{part}"]
    for i in range(config.num_layers):
        difference = adaln(f"blocks.{i}.modulation", dit_condition) - adaln("blocks.0.modulation", condition)  # [1, 6D]
        carried[f"blocks.{i}.modulation"] = difference.view(6, -1)
    carried["final_modulation"] = adaln("final_modulation", dit_condition).view(2, -1) - condition
    model.load_state_dict(model.state_dict() | carried)
    return model


def _require_same_shape(dit: DiT, config: PixArtConfig) -> None:
    for name in ("num_layers", "num_heads", "head_dim", "patch_size", "in_channels", "out_channels"):
        ours, theirs = getattr(config, name), getattr(dit.config, name)
        if ours != theirs:
            raise ValueError(f"model.{name} is {ours}, but {theirs} in the DiT it starts from")
    span = config.sample_size / config.interpolation_scale
    if span != dit.config.sample_size:
        raise ValueError(
            f"model.sample_size / model.interpolation_scale is {span}, but positions span {dit.config.sample_size} in "
            "the DiT it starts from"
        )
