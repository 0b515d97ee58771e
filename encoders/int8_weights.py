"""Linear layers that keep their weights in 8 bits, by torchao: half of bfloat16's memory, on any device."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def round_weights(model: nn.Module, *, device: torch.device) -> None:
    """Move a model to a device with the weights of its linear layers in 8 bits, layer by layer.

    The device holds no more than one layer as it was. Weights are rounded to even steps, 127.5 of which are an output's
    largest weight, and multiplied in the dtype of what the layer reads (the weight-only part of LLM.int8, Dettmers et
    al. 2022).

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    from torch import nn

    quantize, config = _torchao()
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear):
            quantize(layer, config, device=device)
            # torchao's words for `print`, which hold on to their layer: its memory would not come back when it goes.
            vars(layer).pop("extra_repr", None)
    model.to(device)


def _torchao() -> tuple[Any, Any]:
    """Import torchao, without its words on the extensions it was not built with and we do not use."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # Its advice to the compiler would be for all of the process.
    return quantize_, Int8WeightOnlyConfig(set_inductor_config=False)
