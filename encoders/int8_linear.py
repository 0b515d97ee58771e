"""Linear layers with 8-bit weights: a text encoder in half of bfloat16's memory, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept in 8 bits, with one scale per output, and multiplied in the input's dtype.

    Rounding to 255 even steps between an output's largest weight and its negative: no weight is off by more than half
    a step (the weight-only part of LLM.int8, Dettmers et al. 2022).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127  # [outputs]
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Give [..., outputs] for x [..., inputs]."""
        output = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return output if self.bias is None else output + self.bias


def quantize_linears(model: nn.Module) -> None:
    """Replace every linear layer of `model` by its 8-bit version, one after another."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
