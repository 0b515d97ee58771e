"""Inputs of single images, of any vision-language model, put together as those of a batch."""

# L prompt tokens

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def put_together(inputs: Sequence[dict[str, Any]], *, pad_token_id: int) -> dict[str, Any]:
    """Return the inputs of single images as those of a batch: one row per prompt, padded on the left.

    What has a value per token [1, L] is padded to the longest prompt. The rest belongs to the images: laid one behind
    the other, with zeros where another image has more tiles or pixels.

    Raises:
        ValueError: some input is no tensor, or not every image has it.
    """
    if len(inputs) == 1:
        return inputs[0]
    shapes = [single["input_ids"].shape for single in inputs]
    longest = max(length for _, length in shapes)
    batch = {}
    for name in dict.fromkeys(name for single in inputs for name in single):
        values = [single.get(name) for single in inputs]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) != len(values):
            raise ValueError(f"{name} is not a tensor for each image")
        if [tensor.shape for tensor in tensors] == shapes:
            fill = pad_token_id if name == "input_ids" else 0
            padded = [_pad_left(tensor, longest, fill=fill) for tensor in tensors]
        else:
            padded = _pad_alike(tensors)
        batch[name] = torch.cat(padded)
    assert bool(batch["attention_mask"][:, -1].all()), "prompts are padded on the left"
    return batch


def _pad_left(tensor: Tensor, length: int, *, fill: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (length - tensor.shape[1], 0), value=fill)


def _pad_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pad every dimension but the first to the largest, with zeros at the end."""
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise ValueError("images have inputs of different kinds")
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        pairs = [number for lack in reversed(missing) for number in (0, lack)]
        padded.append(torch.nn.functional.pad(tensor, pairs))
    return padded
