"""Part `fp8_256`: the compiled step of XL/2 at 256px with FP8 products against the same step in bf16."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.gpu.parts import Figures, Size
from benchmarks.gpu.steps import measure_step, our_step
from benchmarks.gpu.training import TINY, XL_256
from pixart.compilation import compile_blocks
from training.loop.products import IMAGE_LAYERS, use_fp8

# The larger the matrices, the more of a product's time is saved for what scaling them costs.
MLP_LAYERS = r"blocks\.\d+\.mlp\.(hidden|out)"


def fp8_256(size: Size) -> Figures:
    """All layers that read image tokens, as `training.products` has it; and those of the MLP alone."""
    case, device = (TINY if size.is_tiny else XL_256), size.device
    measure = partial(measure_step, device=device)
    bf16 = measure(partial(our_step, case, device=device))
    size.keep({"fp8_256_bf16_step_seconds": round(bf16.seconds, 4)})
    ratios: Figures = {}
    for name, layers in (("", IMAGE_LAYERS), ("_mlp_alone", MLP_LAYERS)):
        fp8 = measure(partial(our_step, case, device=device, prepare=partial(_prepare, device=device, layers=layers)))
        ratios[f"fp8_256_ratio{name}"] = round(bf16.seconds / fp8.seconds, 3)
        ratios[f"fp8_256_step_seconds{name}"] = round(fp8.seconds, 4)
        ratios[f"fp8_256_loss_difference{name}"] = round(abs(fp8.loss / bf16.loss - 1), 5)
        ratios[f"fp8_256_peak_gigabytes{name}"] = round(fp8.peak_gigabytes, 1)
        size.keep(ratios)
    return ratios


def _prepare(network: nn.Module, *, device: str, layers: str) -> None:
    use_fp8(network, device=torch.device(device), layers=layers)
    compile_blocks(network)
