"""From noise to latents: classifier-free guidance around a transformer, and the loop over a solver's steps."""

# B images, L text tokens, C latent channels, h x w latent size

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errors import UserError
from pixart.dit import DiT
from pixart.model import PixArt


class NonFiniteLatentsError(UserError):
    """The model gave latents that are not finite.

    Attributes:
        image: number of the first such image in its batch.
    """

    def __init__(self, image: int, *, num_done: int, num_passes: int) -> None:
        super().__init__(f"the model gave latents that are not finite, at pass {num_done} of {num_passes}")
        self.image = image


# noisy latents [B, C, h, w] and a time [] to what the network says of them [B, C or 2C, h, w], both fp32
Predict = Callable[[Tensor, Tensor], Tensor]


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, on the CPU, so that noise depends on neither batch nor device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Return the latents [B, C, h, w] that each image starts from, fp32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def predict_from_text(
    model: PixArt, texts: Sequence[Tensor], null_text: Tensor, *, guidance_scale: float, size_pixels: tuple[int, int]
) -> Predict:
    """Return the prediction for text embeddings [num_tokens, d_text], guided away from `null_text`.

    With a guidance scale of 1 the null text is left out. `size_pixels` (height, width) goes to models that are
    conditioned on it.
    """
    weight = model.final.weight
    is_guided = guidance_scale != 1
    rows = [null_text] * len(texts) + list(texts) if is_guided else list(texts)
    text = pad_sequence([row.to(weight) for row in rows], batch_first=True)  # [B or 2B, L, d_text]
    lengths = torch.tensor([len(row) for row in rows], device=weight.device)
    mask = torch.arange(text.shape[1], device=weight.device) < lengths[:, None]  # [B or 2B, L]
    read = model.read_text(text, mask)
    size = None
    if model.config.has_size_condition:
        height, width = size_pixels
        size = torch.tensor([[height, width, height / width]], device=weight.device).expand(len(rows), 3)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return model(latents.to(weight.dtype), timestep.expand(len(latents)), read, mask, size).float()

    return _guided(predict, guidance_scale) if is_guided else predict


def predict_from_labels(model: DiT, labels: Sequence[int], *, guidance_scale: float) -> Predict:
    """Return the prediction for class labels, guided away from the null class."""
    weight = model.final.weight
    is_guided = guidance_scale != 1
    rows = [model.null_label] * len(labels) + list(labels) if is_guided else list(labels)
    rows = torch.tensor(rows, device=weight.device)  # [B or 2B]

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return model(latents.to(weight.dtype), timestep.expand(len(latents)), rows).float()

    return _guided(predict, guidance_scale) if is_guided else predict


def _guided(predict: Predict, scale: float) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022): the first half of the conditions is null, the second is not.

    It leads noise or velocity, of which there are as many channels as of latents; a variance beside them is the
    conditional one.
    """

    def guided(latents: Tensor, timestep: Tensor) -> Tensor:
        output = predict(torch.cat([latents, latents]), timestep)
        null, conditional = output.chunk(2)
        channels = latents.shape[1]
        null, led, variance = null[:, :channels], conditional[:, :channels], conditional[:, channels:]
        return torch.cat([null + scale * (led - null), variance], dim=1)

    return guided


@torch.inference_mode()
def denoise(
    predict: Predict,
    noise: Tensor,
    scheduler: Any,
    *,
    generators: list[torch.Generator],
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Run a process' `scheduler` from `noise` [B, C, h, w] to clean latents [B, C, h, w], fp32.

    `generators` feed the solvers that add noise on the way; `on_step` is told how many passes of the network are done.

    Raises:
        NonFiniteLatentsError: the latents are not finite; says since which pass of the network.
    """
    latents = noise.float()
    reads_variance = scheduler.config.get("variance_type") == "learned_range"
    finite: list[Tensor] = []  # of each pass [B]; read at the end alone, so that no step waits for the device
    for num_done, timestep in enumerate(scheduler.timesteps, 1):
        output = predict(latents, timestep.to(latents.device))  # [B, C or 2C, h, w]
        if not reads_variance:
            output = output[:, : latents.shape[1]]
        latents = scheduler.step(output, timestep, latents, generator=generators, return_dict=False)[0]
        finite.append(latents.isfinite().flatten(1).all(1))
        if on_step is not None:
            on_step(num_done)
    is_finite = torch.stack(finite).cpu()  # [passes, B]
    if not is_finite[-1].all():
        image = int(is_finite[-1].int().argmin())
        num_done = int(is_finite[:, image].int().argmin()) + 1
        raise NonFiniteLatentsError(image, num_done=num_done, num_passes=len(finite))
    return latents
