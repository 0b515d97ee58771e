"""Whether blocks are compiled with torch.compile."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from errors import UserError
from training.config import StageTraining

if TYPE_CHECKING:
    from torch import nn


def is_compiled(settings: StageTraining) -> bool:
    """Whether this rank compiles its blocks; "auto" does where there are CUDA and a C++ compiler, and not ZeRO 3."""
    if settings.compile != "auto":
        return settings.compile
    import torch

    return settings.zero_stage < 3 and torch.cuda.is_available() and _has_compiler()


def require_compilable(settings: StageTraining) -> None:
    """Refuse to compile what ZeRO 3 takes apart, and where there is no compiler, if the recipe insists on it."""
    if settings.compile is not True:
        return
    if not _has_compiler():
        raise UserError(
            f"training.compile = true needs a C++ compiler, and neither of {_compilers()} is here; "
            "install g++, set CXX, or training.compile = false"
        )
    if settings.zero_stage == 3:
        raise UserError(
            "training.compile = true does not go with training.zero_stage = 3, which gathers weights inside a block; "
            "choose ZeRO 0, 1 or 2, or training.compile = false"
        )


def compile_blocks(network: nn.Module) -> None:
    """Compile the `blocks` of a network where they stand; their names and weights stay as they are."""
    # Block by block: all have one code, which is compiled once for them all, again when lengths first differ.
    for block in network.get_submodule("blocks").children():
        block.compile()


def _compilers() -> list[str]:
    return [os.environ.get("CXX") or "g++", "clang++"]


def _has_compiler() -> bool:
    return any(map(shutil.which, _compilers()))
