"""What torch.compile is asked to do for frozen models: small functions between products and convolutions."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Triton builds the part that starts its kernels with one of these.
C_COMPILERS = ("cc", "gcc", "clang")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs for a device: here it pays on CUDA alone."""
    compilers = [*C_COMPILERS, os.environ.get("CC", "cc")]
    has_triton = importlib.util.find_spec("triton") is not None
    return device.type == "cuda" and has_triton and any(map(shutil.which, compilers))


def compile_pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of tensors compiled: for the first shape as it is, then for any number of rows."""
    import torch

    return torch.compile(function, fullgraph=True)
