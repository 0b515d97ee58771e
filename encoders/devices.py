"""On which device a model runs, and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errors import UserError
from pipelines.engine.cluster import is_cluster

if TYPE_CHECKING:
    import torch


def choose_device(device: str, *, key: str) -> torch.device:
    """Return the device that the recipe's `key` names; `auto` is the GPU where torch sees one.

    Raises:
        UserError: it is a GPU and there is none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    if device.startswith("cuda") and not has_gpu:
        raise UserError(f"{key} is {device}, but torch {torch.__version__} sees no GPU: set {key}=cpu, or auto")
    return torch.device(device)


def require_device(device: str, *, key: str) -> None:
    """Refuse a GPU where there is none, before anything is loaded; what the nodes of a cluster have is not known here.

    Raises:
        UserError: as `choose_device`.
    """
    if device.startswith("cuda") and not is_cluster():
        choose_device(device, key=key)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the type of weights and activations; `auto` is float32 on a CPU and bfloat16 elsewhere."""
    import torch

    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)
