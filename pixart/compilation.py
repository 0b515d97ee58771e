"""Networks compiled by torch.compile, block by block: whether it pays, what it needs, and how."""

import os
import shutil
from typing import TYPE_CHECKING

from errors import UserError

if TYPE_CHECKING:
    from torch import nn


def pays_to_compile() -> bool:
    """Whether this machine gains by compiled blocks: it has CUDA, and the C++ compiler that they need."""
    import torch

    return torch.cuda.is_available() and _has_compiler()


def require_compiler(*, key: str) -> None:
    """Refuse to compile, as the recipe's `key` insists on, where no C++ compiler is.

    Raises:
        UserError: there is none; names the key and the compilers that were looked for.
    """
    if not _has_compiler():
        raise UserError(
            f"{key} = true needs a C++ compiler, and neither of {_compilers()} is here; "
            f"install g++, set CXX, or {key} = false"
        )


def compile_blocks(network: "nn.Module") -> None:
    """Compile the blocks of a network where they stand; their names and weights stay as they are."""
    from pixart.block import blocks_of  # with torch

    # Block by block: all have one code, which is compiled once for them all, again when lengths first differ.
    for block in blocks_of(network):
        block.compile()


def _compilers() -> list[str]:
    return [os.environ.get("CXX") or "g++", "clang++"]


def _has_compiler() -> bool:
    return any(map(shutil.which, _compilers()))
