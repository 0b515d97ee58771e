"""Consistency distillation of a teacher to few steps (LCM, Luo et al. 2023; as PixArt-delta trains it).

What the student estimates of the clean latents at one of the teacher's times is to be what its average estimates at the
time before, where a guided DDIM step of the teacher leads. At timestep 0 an estimate is what is seen, by its scalings.
The half of the output that is a variance is not trained: no step of a student draws from it.

What guidance does reaches a time only through all times before it, one at an update or less, as the average is slow. So
a student that is told a guidance learns what the teacher says with it directly, too, at first above all (the first of
the two stages of Meng et al. 2023): the teacher's step has computed that anyway.
"""

# B batch, C latent channels, h x w latent size, L rows of the null caption, D text width

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixart.model import PackedText
from pixart.processes.ddpm import DDPM
from pixart.processes.flow import Flow
from pixart.processes.specs import LCM_SIGMA_DATA
from training.data.batch import Batch
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Average, Frozen, Losses, Role, Trained
from training.objectives.prior_preservation import TEACHER

TARGET = "target"


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """The distance of a student's estimate from that of its average, a step of the teacher nearer to the latents.

    That of process ddpm; `FlowConsistency` says what is otherwise of flow.

    Attributes:
        process: of the teacher, with what it says of the student.
        inputs: what a network sees of a batch.
        null_text: the null caption [L, D], from which the teacher's guidance leads away.
        guidance_range: ends of the guidance scales; a sample's is drawn between them, and told where they differ.
        huber_c: of the pseudo-Huber distance.
        guided_weight: of the squared error of what the student says beside what the guided teacher says of the same
            latents; it falls to 0 over `num_steps`, those of the stage.
    """

    process: DDPM | Flow
    inputs: NetworkInputs
    null_text: Tensor
    guidance_range: tuple[float, float]
    huber_c: float
    guided_weight: float = 0.0
    num_steps: int = 1

    @property
    def networks(self) -> Mapping[str, Role]:
        """The student, its average, and the teacher."""
        return {"network": Trained(), TARGET: Average(), TEACHER: Frozen()}

    @property
    def families(self) -> tuple[str, ...]:
        """Latents and captions."""
        return self.inputs.families

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Return the pseudo-Huber distance of each sample's estimates [B], and the weighted error of guidance.

        The part `mse` is the squared distance of estimates, `guided` the error before `guided_weight`.
        """
        process = self.process
        times, earlier, guidance = self.draws(batch)
        noisy = process.noisy(self.inputs.latents(batch), batch.noise, times)  # [B, C, h, w]
        with torch.no_grad():
            guided = self.guided(networks[TEACHER], noisy, times, guidance=guidance, batch=batch)
            # A step of DDIM, of flow one of Euler: along what is said of the latents and of the noise.
            before = process.noisy(process.clean(guided, noisy, times), process.noise(guided, noisy, times), earlier)
            target = self.estimate(networks[TARGET], before, earlier, guidance=guidance, batch=batch)
        output = self._output(networks["network"], noisy, times, guidance=guidance, batch=batch)
        squared = (self._estimate(output, noisy, times) - target).square()
        distance = (squared + self.huber_c**2).sqrt() - self.huber_c
        total, parts = distance.flatten(1).mean(1), {"mse": squared.flatten(1).mean(1)}
        if self.guided_weight:
            parts["guided"] = (output[:, : noisy.shape[1]].float() - guided).square().flatten(1).mean(1)
            total = total + self.guided_weight * max(0.0, 1 - batch.step / self.num_steps) * parts["guided"]
        return Losses(total=total, parts=parts, times=times.double() / process.num_times)

    def draws(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the teacher's times int64 [B], those a step before them, and the guidance scales fp32 [B].

        A sample's uniform number chooses one of N times by the whole part of N times it, and the guidance by the rest,
        which is uniform again.
        """
        num_steps: int = self.student["num_teacher_steps"]
        stride = self.process.num_times // num_steps
        places = batch.timestep_draws * num_steps
        numbers = places.long().clamp(max=num_steps - 1)
        times = (numbers + 1) * stride - 1
        return times, (times - stride).clamp(min=0), self.guidance_at(places - numbers)

    def guidance_at(self, draws: Tensor) -> Tensor:
        """Return guidance scales fp32 [B], between the ends of their range as `draws` [B] are between 0 and 1."""
        low, high = self.guidance_range
        return (low + (high - low) * draws).float()

    def scalings(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much of an estimate is what is seen, and how much is what the network says, [B] each (LCM eq. 9).

        At timestep 0 it is what is seen.
        """
        scaled = times.float() * self.student["timestep_scaling"]
        spread = scaled.square() + LCM_SIGMA_DATA**2
        return LCM_SIGMA_DATA**2 / spread, scaled / spread.sqrt()

    @property
    def student(self) -> Mapping[str, Any]:
        """What the process says of the student."""
        assert self.process.student is not None, "the stage's process says what it distils"
        return self.process.student

    def guided(self, teacher: nn.Module, noisy: Tensor, times: Tensor, *, guidance: Tensor, batch: Batch) -> Tensor:
        """Return what a teacher says [B, C, h, w], led away from the null caption by `guidance` [B]; fp32."""
        led, null = (
            self.inputs.output(teacher, noisy, times, batch=each)[:, : noisy.shape[1]].float()
            for each in (batch, self.without_text(batch))
        )
        return null + _per_sample(guidance) * (led - null)

    def estimate(
        self, network: nn.Module, noisy: Tensor, times: Tensor, *, guidance: Tensor | None, batch: Batch
    ) -> Tensor:
        """Return what a student estimates of the clean latents, fp32 [B, C, h, w]."""
        return self._estimate(self._output(network, noisy, times, guidance=guidance, batch=batch), noisy, times)

    def _output(
        self, network: nn.Module, noisy: Tensor, times: Tensor, *, guidance: Tensor | None, batch: Batch
    ) -> Tensor:
        is_told = self.guidance_range[0] < self.guidance_range[1]
        return self.inputs.output(network, noisy, times, batch=batch, guidance=guidance if is_told else None)

    def _estimate(self, output: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        skip, out = self.scalings(times)
        return _per_sample(skip) * noisy + _per_sample(out) * self.process.clean(output, noisy, times)

    def without_text(self, batch: Batch) -> Batch:
        """Return the batch with the null caption for all samples."""
        num_samples, (length, _) = len(batch.noise), self.null_text.shape
        offsets = torch.arange(num_samples + 1, dtype=torch.int32, device=self.null_text.device) * length
        text = PackedText(self.null_text.repeat(num_samples, 1), offsets, length, has_equal_lengths=True)
        return dataclasses.replace(batch, text=text)


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]  # [B, 1, 1, 1]
