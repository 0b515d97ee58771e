"""The loss of weights that move on to another VAE: the process', and what they thought of the same pictures before.

The teacher, the weights of before, sees the former VAE's latents of a batch's pictures under the part of its noise that
the bridge of `training.stages.other_vae` turns into theirs. What its tokens are behind two blocks the trained
network's are to become there (as hints, Romero et al. 2015): a target without the noise of noise. It counts less from
step to step and nothing at the end, as each VAE has details of its own.
"""

# B batch, C channels of the former latents, K of the new ones, P patch size, h x w latent size, N tokens, D width

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixart.reuse import BlockRecord
from training.data.batch import Batch
from training.data.former import FORMER_LATENTS
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Frozen, Losses, Role
from training.objectives.prior_preservation import TEACHER


@dataclass(frozen=True, kw_only=True)
class Realignment:
    """The process' loss plus, falling to nothing, the distance of tokens from a teacher's.

    Attributes:
        denoise: the loss of a sample.
        former_inputs: what the teacher sees, with the scale of the former VAE.
        bridge: from patches of new noise to former ones, [C*P*P, K*P*P], of orthonormal rows.
        num_blocks: of either network.
        num_steps: of the stage.
    """

    denoise: Denoise
    former_inputs: NetworkInputs
    bridge: Tensor
    patch_size: int
    num_blocks: int
    num_steps: int

    @property
    def networks(self) -> Mapping[str, Role]:
        """The one that is trained, and the teacher."""
        return {**self.denoise.networks, TEACHER: Frozen()}

    @property
    def families(self) -> tuple[str, ...]:
        """Those of the loss of a sample, and the former latents."""
        return (*self.denoise.families, FORMER_LATENTS)

    @property
    def compared_blocks(self) -> tuple[int, int]:
        """Numbers of the blocks behind which tokens are compared: a third of the way in, and the last but one."""
        return self.num_blocks // 3, max(0, self.num_blocks - 2)

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Return the loss of each sample [B]; its part `teacher` is the distance, before it is weighted."""
        record, told = BlockRecord(self.compared_blocks), BlockRecord(self.compared_blocks)
        losses = self.denoise.loss_of(self.denoise.output(networks["network"], batch, record=record), batch)
        process = self.denoise.process
        times = process.times(batch.timestep_draws)
        with torch.no_grad():
            noisy = process.noisy(self._former_latents(batch), self._bridged(batch.noise), times)
            self.former_inputs.output(networks[TEACHER], noisy, times, batch=batch, record=told)
        distances = [_distance(record.tokens[number], tokens) for number, tokens in told.tokens.items()]
        distance = torch.stack(distances).mean(0)
        weight = max(0.0, 1 - batch.step / self.num_steps)
        return Losses(
            total=losses.total + weight * distance, parts={**losses.parts, "teacher": distance}, times=losses.times
        )

    def _former_latents(self, batch: Batch) -> Tensor:
        """Return a sample of the former VAE's posterior as the teacher knows latents, fp32 [B, C, h, w]."""
        latents, std = batch.tensors[f"{FORMER_LATENTS}.mean"].float(), batch.tensors.get(f"{FORMER_LATENTS}.std")
        if std is not None and batch.posterior_noise is not None:
            latents = latents + std.float() * self._bridged(batch.posterior_noise)
        return (latents - self.former_inputs.shift_factor) * self.former_inputs.scaling_factor

    def _bridged(self, noise: Tensor) -> Tensor:
        """Return the part of noise [B, K, h, w] that the former latents have, [B, C, h, w]."""
        patches = F.unfold(noise, self.patch_size, stride=self.patch_size)  # [B, K*P*P, N]
        return F.fold(self.bridge @ patches, noise.shape[-2:], self.patch_size, stride=self.patch_size)


def _distance(tokens: Tensor, told: Tensor) -> Tensor:
    """Return the mean square of tokens' [B, N, D] difference from a teacher's, of these' variance, [B]."""
    return (tokens.float() - told.float()).square().mean((1, 2)) / told.float().var((1, 2))
