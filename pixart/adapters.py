"""Adapters on a network (LoRA): put beside its layers to be trained, by peft, or merged into its weights to draw.

Layers have our names here, as `pixart/adapter_files.py` gives them: files have diffusers' ones.
"""

# O outputs, I inputs, R rank

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from pixart.adapter_layers import AdapterShape, find_targets, layer_names
from pixart.model import PixArt

# How peft calls the weights of an adapter behind the layer's name.
DOWN, UP, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
NAME = "default"
TRAINED_NAME = re.compile(rf"(?P<layer>.+)\.(?P<part>{DOWN}|{UP}|{MAGNITUDE})\.{NAME}\.weight")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The change of one layer's weight.

    Attributes:
        down: [R, I], of a convolution [R, I, P, P].
        up: [O, R], of a convolution [O, R, 1, 1].
        scale: of their product.
        magnitude: DoRA's length of each row of the changed weight, O numbers; None without DoRA.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def change(self, weight: Tensor) -> Tensor:
        """Return what is added to a weight [O, I] or [O, I, P, P], fp32: s B A, with DoRA m (W + s B A) / |.| - W."""
        whole = weight.float()
        product = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).view_as(whole)
        if self.magnitude is None:
            return product
        changed = whole + product
        lengths = torch.linalg.vector_norm(changed.flatten(1), dim=1)  # [O]
        factors = torch.where(lengths > 0, self.magnitude.float().flatten() / lengths, 1.0)
        return factors.view(-1, *[1] * (whole.dim() - 1)) * changed - whole


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Changes of a network's layers by our names for them.

    Attributes:
        path: of the file.
        belongs_to: what the file says of the weights that it was trained on; nothing of others' files.
        notes: what was assumed, for people to know.
    """

    path: Path
    layers: Mapping[str, LowRank]
    belongs_to: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def add_adapters(network: PixArt, shape: AdapterShape, *, key: str) -> None:
    """Put trainable adapters beside a network's layers, in place, and freeze all else; at first they change nothing.

    Raises:
        UserError: a target means no layer; names the recipe `key`.
    """
    targets = find_targets(network, layer_names(network.config), shape.targets, key=key)
    if shape.dora:
        _require_lengths(network, targets, key=key)
    config = lora_config(shape, targets)
    from peft import inject_adapter_in_model

    network.requires_grad_(False)
    inject_adapter_in_model(config, network, adapter_name=NAME)


def add_adapters_of(network: PixArt, blank: PixArt) -> None:
    """Put adapters such as `add_adapters` has put beside a network's layers beside those of one on the meta device."""
    config = getattr(network, "peft_config", {}).get(NAME)
    if config is None:
        return
    from peft import inject_adapter_in_model

    with torch.device("meta"):
        inject_adapter_in_model(config, blank, adapter_name=NAME)


def _require_lengths(network: PixArt, layers: Sequence[str], *, key: str) -> None:
    """Refuse rows of zeros, which have no direction that DoRA could keep: all it gives is not finite."""
    for layer in layers:
        if not network.get_parameter(f"{layer}.weight").flatten(1).any(dim=1).all():
            raise UserError(
                f"{key.rpartition('.')[0]}.dora trains directions of rows, but {layer} has rows of zeros: leave it out "
                f"of {key}, or dora"
            )


def lora_config(shape: AdapterShape, layers: Sequence[str], *, base: str | None = None) -> Any:
    """Return peft's own settings for adapters on `layers`, initialised as peft does; `base` are the weights' name."""
    # peft imports it to look for its layers; it then speaks of extensions that we do not use.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from peft import LoraConfig

    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType] (peft divides whatever number it is)
        target_modules=list(layers),
        use_dora=shape.dora,
        use_rslora=shape.rslora,
        base_model_name_or_path=base,
    )


def trained_parts(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights that `add_adapters` has made, given by their names in the network: by layer, then by part."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        match = TRAINED_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no weight of an adapter")
        layers.setdefault(match["layer"], {})[match["part"]] = weight
    return layers


def trained_names(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the opposite of `trained_parts`."""
    return {f"{layer}.{part}.{NAME}.weight": value for layer, parts in layers.items() for part, value in parts.items()}


@torch.no_grad()
def merge(network: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Add the changes of adapters, each times its weight, to a network's own weights; returns what those were, by name.

    Each adapter's change is that of the weights as they are now, so that their order does not matter. All must be such
    as `require_fit` lets through.
    """
    former: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for adapter, factor in adapters:
        for layer, low_rank in adapter.layers.items():
            name = f"{layer}.weight"
            weight = network.get_parameter(name)
            former.setdefault(name, weight.detach().clone())
            change = factor * low_rank.change(former[name])
            changes[name] = changes[name] + change if name in changes else change
    for name, change in changes.items():
        network.get_parameter(name).copy_(former[name].float() + change)
    return former


@torch.no_grad()
def unmerge(network: nn.Module, former: Mapping[str, Tensor]) -> None:
    """Put back the weights that `merge` has returned."""
    for name, weight in former.items():
        network.get_parameter(name).copy_(weight)


def at_positions(network: PixArt, shape: Mapping[str, Any]) -> PixArt:
    """Return a network of the same weights with the positions of another config, of which `shape` are the fields."""
    positions = {name: shape[name] for name in network.config.position_fields}
    config = dataclasses.replace(network.config, **positions)
    with torch.device("meta"):
        moved = config.network()
    moved.load_state_dict(network.state_dict(), assign=True)
    return moved


def require_fit(adapter: Adapter, network: PixArt) -> None:
    """Refuse an adapter whose changes are of other shapes than the network's weights.

    Raises:
        UserError: names the adapter, the layer and both shapes.
    """
    for layer, low_rank in adapter.layers.items():
        weight = network.get_parameter(f"{layer}.weight")
        outputs, inputs = len(low_rank.up), low_rank.down.flatten(1).shape[1]
        wanted = weight.flatten(1).shape
        num_lengths = outputs if low_rank.magnitude is None else low_rank.magnitude.numel()
        if (outputs, inputs, num_lengths) != (*wanted, wanted[0]):
            raise UserError(
                f"{adapter.path} is an adapter of another model: its change of {layer} is of {inputs} to {outputs} "
                f"channels, but the model's layer is of {wanted[1]} to {wanted[0]}"
            )
