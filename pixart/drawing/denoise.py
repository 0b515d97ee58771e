"""From noise to latents: the loop over a solver's passes of a network."""

# B images, C latent channels, h x w latent size

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from errors import UserError


class NonFiniteLatentsError(UserError):
    """The model gave latents that are not finite.

    Attributes:
        image: number of the first such image in its batch.
    """

    def __init__(self, image: int, *, num_done: int, num_passes: int) -> None:
        super().__init__(f"the model gave latents that are not finite, at pass {num_done} of {num_passes}")
        self.image = image


# noisy latents [B, C, h, w], a time [] and the number of the pass to what the network says of them [B, C or 2C, h, w],
# all in fp32
Predict = Callable[[Tensor, Tensor, int], Tensor]


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, on the CPU, so that noise depends on neither batch nor device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Return the latents [B, C, h, w] that each image starts from, fp32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.inference_mode()
def denoise(
    predict: Predict,
    noise: Tensor,
    scheduler: Any,
    *,
    generators: list[torch.Generator],
    on_step: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a process' `scheduler` from `noise` [B, C, h, w] to clean latents [B, C, h, w], fp32.

    Nothing here waits for a GPU, unless `on_step` wants to be told how many passes of the network are done. So whether
    the latents are finite comes beside them, as booleans [passes, B] on their device: see `require_finite`.
    `generators` feed the solvers that add noise on the way.
    """
    latents = noise.float()
    reads_variance = scheduler.config.get("variance_type") == "learned_range"
    is_finite: list[Tensor] = []  # of each pass [B]
    # The scheduler looks its times up on the CPU, where it keeps them; the network has them on its device at once.
    times = scheduler.timesteps.to(latents.device)
    for number, timestep in enumerate(scheduler.timesteps):
        output = predict(latents, times[number], number)  # [B, C or 2C, h, w]
        if not reads_variance:
            output = output[:, : latents.shape[1]]
        latents = scheduler.step(output, timestep, latents, generator=generators, return_dict=False)[0]
        is_finite.append(latents.isfinite().flatten(1).all(1))
        if on_step is not None:
            if latents.is_cuda:
                torch.cuda.synchronize(latents.device)
            on_step(number + 1)
    return latents, torch.stack(is_finite)


def require_finite(is_finite: Tensor) -> None:
    """Check what `denoise` says of its passes [passes, B].

    Raises:
        NonFiniteLatentsError: the latents are not finite; says since which pass of the network.
    """
    is_finite = is_finite.cpu()
    if not is_finite[-1].all():
        image = int(is_finite[-1].int().argmin())
        num_done = int(is_finite[:, image].int().argmin()) + 1
        raise NonFiniteLatentsError(image, num_done=num_done, num_passes=len(is_finite))
