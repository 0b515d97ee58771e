"""The guidance that a distilled network is told, so that one network draws with any of a range (LCM, section 4.2).

Luo et al. 2023 embed the guidance beside the timestep. Diffusers' PixArt and the original code have no place for that:
for one guidance the embedding is a constant, which the bias behind the timestep's takes up.
"""

# D width

import dataclasses

import torch

from pixart.model import PixArt, told_guidance


def with_guidance_condition(network: PixArt) -> PixArt:
    """Return the network with a guidance condition that says nothing yet, drawn from torch's global generator."""
    if network.config.has_guidance_condition:
        return network
    config = dataclasses.replace(network.config, has_guidance_condition=True)
    with torch.device("meta"):
        told = PixArt(config)
    fresh = type(network.timestep_embed)(config.width)
    torch.nn.init.normal_(fresh.hidden.weight, std=0.02)
    torch.nn.init.zeros_(fresh.hidden.bias)
    torch.nn.init.zeros_(fresh.out.weight)
    torch.nn.init.zeros_(fresh.out.bias)
    weights = {f"guidance_embed.{name}": weight.to(network.final.weight) for name, weight in fresh.state_dict().items()}
    told.load_state_dict(network.state_dict() | weights, assign=True)
    return told


@torch.no_grad()
def fold_guidance(network: PixArt, scale: float) -> PixArt:
    """Return a network that is told no guidance and gives what `network` gives for this one; weights are shared."""
    if not network.config.has_guidance_condition:
        raise ValueError("the network is told no guidance")
    told = told_guidance(torch.tensor([scale], device=network.final.weight.device))
    constant = network.guidance_embed(told)[0]  # [D]
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith("guidance_embed.")}
    weights["timestep_embed.out.bias"] = weights["timestep_embed.out.bias"] + constant
    with torch.device("meta"):
        folded = PixArt(dataclasses.replace(network.config, has_guidance_condition=False))
    folded.load_state_dict(weights, assign=True)
    return folded.train(network.training).requires_grad_(False)
