"""Distribution matching of a student of few steps (DMD, Yin et al. 2023; DMD2, 2024): what it draws becomes as likely.

The student draws as it will be drawn: from noise at the first of its times, or from its own image with new noise at a
later one. Its image with noise is shown to the teacher and to a critic, which learns to take the noise from the
student's images alone. Where the critic sees more of an image than the teacher does, images like it are drawn too
often: the student moves along the difference of both.
"""

# B batch, C latent channels, h x w latent size

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from training.data.batch import Batch
from training.objectives.consistency import TARGET, Consistency
from training.objectives.noises import more_noise
from training.objectives.objective import Average, Frozen, Losses, Role, Trained
from training.objectives.prior_preservation import TEACHER


@dataclass(frozen=True, kw_only=True)
class DistributionMatching:
    """The difference of critic and teacher about a student's images, and the critic's own loss of them.

    Attributes:
        student: what the student and its guided teacher say of noisy latents.
        schedules: times of the student's steps, for each number of steps.
        compared: first timestep at which images are compared, and the one behind the last.
        consistency_weight: of the student's loss as one of consistency, which is added; 0 for none.
        seed: decides the noise that batches do not bring, and what is drawn in which step.
    """

    student: Consistency
    schedules: Sequence[Sequence[int]]
    compared: tuple[int, int]
    consistency_weight: float = 0.0
    seed: int = 0

    @property
    def networks(self) -> Mapping[str, Role]:
        """The student with its critic, the teacher, as which the critic begins, and the average that is a target."""
        target = {TARGET: Average()} if self.consistency_weight else {}
        return {"network": Trained(critic=TEACHER), TEACHER: Frozen(), **target}

    @property
    def families(self) -> tuple[str, ...]:
        """Latents, of which without consistency only the shape counts, and captions."""
        return self.student.families

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Return half the squared length of the student's move [B] with its loss of consistency, and the critic's loss.

        The part `mse` is the squared error of the noise that the critic finds.
        """
        network, process = networks["network"], self.student.process
        critic = cast("nn.Module", network.critic)  # of whatever wraps it, too
        first, last = self.compared
        draws = batch.timestep_draws * (last - first)
        times = (first + draws.long()).clamp(max=last - 1)
        image = self._drawn(network, batch)  # [B, C, h, w]
        with torch.no_grad():
            noisy = process.noisy(image, more_noise(batch, "compared", seed=self.seed), times)
            real = process.clean(self._guided(networks[TEACHER], noisy, times, batch=batch), noisy, times)
            said = self.student.inputs.output(critic, noisy, times, batch=batch)
            difference = process.clean(said, noisy, times) - real
            move = difference / (image - real).abs().mean((1, 2, 3), keepdim=True)
            aim = image - move.nan_to_num()
        error = self._critic_error(critic, image.detach(), batch, draws - draws.floor())
        total = distance = 0.5 * (image - aim).square().flatten(1).mean(1)
        parts = {"matching": distance, "mse": error}
        if self.consistency_weight:
            parts["consistency"] = self.student.loss(networks, batch).total
            total = distance + self.consistency_weight * parts["consistency"]
        return Losses(
            total=total,
            parts=parts,
            times=times.double() / process.num_times,
            critic=error,
        )

    def _drawn(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the student's images of a batch, with a gradient through the last of its steps (backward simulation).

        Which schedule and which step is drawn for all samples of a training step.
        """
        chosen = random.Random(f"{self.seed} {batch.step}")
        times = chosen.choice(self.schedules)
        number = chosen.randrange(len(times))
        noisy = batch.noise
        for place in range(number):
            with torch.no_grad():
                image = self._image(network, noisy, times[place], batch=batch)
                noise = more_noise(batch, f"step {place}", seed=self.seed)
                noisy = self.student.process.noisy(image, noise, self._at(times[place + 1], batch))
        return self._image(network, noisy, times[number], batch=batch)

    def _image(self, network: nn.Module, noisy: Tensor, time: int, *, batch: Batch) -> Tensor:
        return self.student.estimate(network, noisy, self._at(time, batch), guidance=None, batch=batch)

    def _at(self, time: int, batch: Batch) -> Tensor:
        return torch.full((len(batch.noise),), time, device=batch.noise.device)

    def _guided(self, teacher: nn.Module, noisy: Tensor, times: Tensor, *, batch: Batch) -> Tensor:
        scale = torch.full((len(noisy),), self.student.guidance_range[0], device=noisy.device)
        return self.student.guided(teacher, noisy, times, guidance=scale, batch=batch)

    def _critic_error(self, critic: nn.Module, image: Tensor, batch: Batch, draws: Tensor) -> Tensor:
        """Return the squared error [B] of the noise that the critic finds in images, at times of uniform `draws`."""
        process, noise = self.student.process, more_noise(batch, "critic", seed=self.seed)
        times = process.times(draws)
        noisy = process.noisy(image, noise, times)
        output = self.student.inputs.output(critic, noisy, times, batch=batch)
        return (process.noise(output, noisy, times) - noise).square().flatten(1).mean(1)
