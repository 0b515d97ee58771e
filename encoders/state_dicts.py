"""Files of weights by name: safetensors, and what `torch.save` wrote of plain tensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError, describe_unfetched, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor


def read_tensors(path: Path, *, origin: str, wanted: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a plain state dict that `torch.save` wrote; runs no code of it.

    Raises:
        UserError: it is neither, or is damaged; begins with `origin`, and says what is `wanted`.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb") as file:
        head = file.read(1024)
    if (fault := describe_unfetched(head)) is not None:
        raise UserError(f"{origin} {fault}")
    try:
        if head[8:9] == b"{":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{origin} is no file of weights alone, or has been cut short ({type(error).__name__}): fetch it again"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{origin} is no file of weights by name: it should be {wanted}")
    return dict(content)
