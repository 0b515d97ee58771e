"""Where the models of captioning run, and in which precision."""

import torch


def choose_device(device: str) -> torch.device:
    """Return the device of `captioning.device`.

    Raises:
        ValueError: it is a GPU and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    if device.startswith("cuda") and not has_gpu:
        raise ValueError(f"captioning.device is {device}, but torch {torch.__version__} sees no GPU")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the type of weights and activations of `captioning.dtype`."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)
