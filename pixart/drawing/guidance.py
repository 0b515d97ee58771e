"""What a network says of noisy latents, led by classifier-free guidance (Ho & Salimans 2022)."""

# B images, L text tokens, C latent channels, h x w latent size

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pixart.control import Control
from pixart.dit import DiT
from pixart.drawing.passes import Pass
from pixart.model import PackedText, PixArt
from pixart.reuse import BlockReuse

# What a network takes beside latents and times, by its names for it: nested tuples and lists of tensors, their rows
# first, and numbers.
Conditions = dict[str, Any]


class GuidedNetwork:
    """A network with what its images are conditioned on, ready to be asked at every step.

    Attributes:
        passes: what each pass computes, in their order.
        scale: of guidance.
        conditions: by whether a pass is guided, what the network is told: null rows and then those of the images, or
            those of the images alone. What no pass needs is not there.
        reuse: what stands for blocks that a pass leaves out; None where every pass computes all.
    """

    def __init__(
        self,
        model: PixArt | DiT,
        make_conditions: Callable[[bool], Conditions],
        *,
        passes: Sequence[Pass],
        guidance_scale: float,
        num_images: int,
    ) -> None:
        self.model = model
        self.passes = passes
        self.conditions = {is_guided: make_conditions(is_guided) for is_guided in {item.is_guided for item in passes}}
        self.reuse: BlockReuse | None = None
        if not all(item.is_fresh for item in passes):
            num_rows = (2 if True in self.conditions else 1) * num_images
            self.reuse = BlockReuse(num_blocks=len(model.blocks), num_rows=num_rows)
        self.scale = guidance_scale

    def __call__(self, latents: Tensor, timestep: Tensor, number: int) -> Tensor:
        """Give noise or velocity, and a variance if the network has one, [B, C or 2C, h, w] in fp32.

        For noisy latents [B, C, h, w] at a time [] that all have, in the pass of this number. Guidance leads noise or
        velocity, of which there are as many channels as of latents; the variance is the conditional one.
        """
        item = self.passes[number]
        if self.reuse is not None:
            self.reuse.is_fresh = item.is_fresh
        rows = torch.cat([latents, latents]) if item.is_guided else latents
        rows = rows.to(self.model.final.weight.dtype)
        conditions = self.conditions[item.is_guided]
        output = self.model(rows, timestep.expand(len(rows)), **conditions, reuse=self.reuse).float()
        if not item.is_guided:
            return output
        null, conditional = output.chunk(2)
        channels = latents.shape[1]
        null, led, variance = null[:, :channels], conditional[:, :channels], conditional[:, channels:]
        return torch.cat([null + self.scale * (led - null), variance], dim=1)


def network_of_texts(
    model: PixArt,
    texts: Sequence[Tensor],
    null_text: Tensor,
    *,
    passes: Sequence[Pass],
    guidance_scale: float,
    size_pixels: tuple[int, int],
    min_tokens: int = 0,
    control: Control | None = None,
) -> GuidedNetwork:
    """Condition on text embeddings [num_tokens, d_text], guided away from `null_text`.

    `size_pixels` (height, width) goes to models that are conditioned on it. With `min_tokens` all shapes are those of
    texts that have as many, so that what is compiled or captured for some texts serves others. `control`, latents
    [B, C, h, w] of an image for each text, leads both halves of guidance (as PixArt-delta's code does).
    """
    weight = model.final.weight

    def conditions(is_guided: bool) -> Conditions:
        rows = [null_text] * len(texts) + list(texts) if is_guided else list(texts)
        read = model.read_text(_packed([row.to(weight.dtype) for row in rows], min_tokens, device=weight.device))
        told: Conditions = {"text": read}
        if model.config.has_size_condition:
            height, width = size_pixels
            told["size"] = torch.tensor([[height, width, height / width]], device=weight.device).repeat(len(rows), 1)
        if control is not None:
            latents = control.latents.to(weight.device, weight.dtype)
            told["control"] = control._replace(latents=torch.cat([latents, latents]) if is_guided else latents)
        return told

    return GuidedNetwork(model, conditions, passes=passes, guidance_scale=guidance_scale, num_images=len(texts))


def _packed(texts: Sequence[Tensor], min_tokens: int, *, device: torch.device) -> PackedText:
    """Pack texts [num_tokens, d_text]; the indices are made where the host knows the lengths."""
    lengths = torch.tensor([len(text) for text in texts])
    max_length, values = max(min_tokens, int(lengths.max())), torch.cat(list(texts))
    if min_tokens:
        values = pad(values, (0, 0, 0, len(texts) * max_length - len(values)))
    offsets = pad(lengths.cumsum(0), (1, 0)).int()
    return PackedText(values.to(device), offsets.to(device), max_length)


def network_of_labels(
    model: DiT, labels: Sequence[int], *, passes: Sequence[Pass], guidance_scale: float
) -> GuidedNetwork:
    """Condition on class labels, guided away from the null class."""

    def conditions(is_guided: bool) -> Conditions:
        rows = [model.null_label] * len(labels) + list(labels) if is_guided else list(labels)
        return {"labels": torch.tensor(rows, device=model.final.weight.device)}  # [B or 2B]

    return GuidedNetwork(model, conditions, passes=passes, guidance_scale=guidance_scale, num_images=len(labels))
