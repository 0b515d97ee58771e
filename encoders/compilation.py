"""What torch.compile is asked to do for frozen models: small functions between products and convolutions."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# Triton builds the part that starts its kernels with one of these.
C_COMPILERS = ("cc", "gcc", "clang")
RECOMPILE_LIMIT = 64


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs for a device: here it pays on CUDA alone."""
    compilers = [*C_COMPILERS, os.environ.get("CC", "cc")]
    has_triton = importlib.util.find_spec("triton") is not None
    return device.type == "cuda" and has_triton and any(map(shutil.which, compilers))


def compile_pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of tensors compiled: for the first shape as it is, then for any number of rows."""
    import torch

    return torch.compile(function, fullgraph=True)


def compile_modules(modules: Sequence[nn.Module]) -> None:
    """Compile modules that share a class, in place: one code for all with weights of one shape, at images of any size.

    They are to run inside `many_shapes`: among them are more shapes of weights than torch would compile one class for
    before it gives up without a word; and a square image must not be taken for a promise that all are square.
    """
    for module in modules:
        module.compile(dynamic=True)


@contextlib.contextmanager
def many_shapes() -> Iterator[None]:
    """Have what `compile_modules` has compiled run inside, where torch compiles for as many shapes as it needs."""
    import torch._dynamo
    import torch.fx.experimental._config as shapes

    # Of torch's whole process: what others compile keeps its own.
    dynamo_config: Any = torch._dynamo.config
    shapes_config: Any = shapes  # both get `patch` when they are imported
    with dynamo_config.patch(recompile_limit=RECOMPILE_LIMIT), shapes_config.patch(use_duck_shape=False):
        yield
