"""In what the matrix products of blocks are computed: as `training.dtype` says, or in FP8 by torchao."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from errors import UserError
from training.config import StageTraining

if TYPE_CHECKING:
    import torch
    from torch import nn

# Layers that read every image token. Those that read texts or a condition have too few rows for FP8 to pay.
IMAGE_LAYERS = r"blocks\.\d+\.(attention\.(query|key|value|out)|cross_attention\.(query|out)|mlp\.(hidden|out))"
FP8_MULTIPLE = 16  # of a matrix' sides, which the products of a GPU in FP8 ask for
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def require_products(settings: StageTraining) -> None:
    """Refuse FP8 products of what is not bf16, and where ZeRO 3 takes weights apart between the two passes."""
    if settings.products != "fp8":
        return
    if settings.dtype != "bf16":
        raise UserError(
            f"training.products = 'fp8' needs training.dtype = 'bf16', and it is {settings.dtype!r}; change one of them"
        )
    if settings.keeps_base:
        raise UserError(
            f"training.products = 'fp8' does not go with trains = {settings.trains!r}: its products would compute the "
            "gradients of weights that stay, which takes longer than it saves; leave training.products out"
        )
    if settings.zero_stage == 3:
        raise UserError(
            "training.products = 'fp8' does not go with training.zero_stage = 3; choose ZeRO 0, 1 or 2, or leave "
            "training.products out"
        )


def choose_products(network: nn.Module, settings: StageTraining, *, device: torch.device) -> None:
    """Let a network's blocks multiply as the stage says; weights and their names stay as they are.

    Raises:
        UserError: the device, or the width of the network, cannot do FP8.
    """
    if settings.products == "fp8":
        require_products(settings)
        use_fp8(network, device=device)


def use_fp8(network: nn.Module, *, device: torch.device, layers: str = IMAGE_LAYERS) -> None:
    """Replace the linear layers whose names fit `layers` by torchao's, which multiply in FP8 in both passes.

    Operands are scaled to FP8 anew in each product, a scale to a tensor; products come out in the layers' own dtype.
    Without CUDA the same numbers are computed by emulation, slowly.

    Raises:
        UserError: the device, or the width of the network, cannot do FP8.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        _require_capability(device)
    chosen = [name for name, _ in network.named_modules() if re.fullmatch(layers, name)]
    if not chosen:
        raise ValueError(f"no layer of the network fits {layers}")
    for name in chosen:
        for side in network.get_submodule(name).get_parameter("weight").shape:
            if side % FP8_MULTIPLE:
                raise UserError(
                    f"training.products = 'fp8' needs widths that are multiples of {FP8_MULTIPLE}, and {name} has "
                    f"{side}: change model.num_heads or model.head_dim, or leave training.products out"
                )
    convert, linear_config = _torchao()
    # Padding is for batches of odd shapes alone: what is a multiple already is left alone.
    config = linear_config(emulate=not is_cuda, pad_inner_dim=True)
    convert(network, module_filter_fn=lambda module, name: name in chosen, config=config)


def _torchao() -> tuple:
    """Import torchao's FP8 training, without its words on the extensions it was not built with and we do not use."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training, Float8LinearConfig


def _require_capability(device: torch.device) -> None:
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"training.products = 'fp8' needs a GPU of compute capability {_dotted(FP8_CAPABILITY)} or more, "
            f"and {name} has {_dotted(capability)}; leave training.products out"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
