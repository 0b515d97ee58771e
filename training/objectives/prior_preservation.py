"""DreamBooth's loss: of the images of a subject, and of images that the model drew itself before it learnt it.

Ruiz et al. 2022, section 3.3. PixArt-alpha's own DreamBooth (A.9) does without the second part: that is `denoise`.
The second part may ask for what a teacher, the weights of before, says of the same noisy latents, in place of their
noise (learning without forgetting, Li and Hoiem 2016): it has neither the noise's variance nor the images' faults.
"""

# B batch, C latent channels, h x w latent size

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from training.data.batch import Batch
from training.data.datasets import Dataset
from training.objectives.denoise import Denoise
from training.objectives.objective import Frozen, Losses, Role

# What `training.<stage>.networks` calls the weights of before.
TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class PriorPreservation:
    """The mean loss of instance samples plus `prior_weight` times the mean loss of prior ones.

    A sample counts by what its role has of all samples drawn, not of its own batch: batches of any number of ranks and
    micro-batches have the same gradient.

    Attributes:
        denoise: the loss of a sample.
        prior_weight: of the prior samples' mean loss.
        prior_share: part of all samples drawn that are prior ones, between 0 and 1.
        has_teacher: whether the loss of a prior sample is the mean square of the outputs' difference from a teacher's.
    """

    denoise: Denoise
    prior_weight: float
    prior_share: float
    has_teacher: bool = False

    @property
    def networks(self) -> Mapping[str, Role]:
        """Those of the loss of a sample, and the teacher."""
        return {**self.denoise.networks, TEACHER: Frozen()} if self.has_teacher else self.denoise.networks

    @property
    def families(self) -> tuple[str, ...]:
        """Those of the loss of a sample."""
        return self.denoise.families

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Return the weighted loss of each sample [B].

        The mean of the total is that of part `instance` plus `prior_weight` times that of part `prior`; each part is
        the mean loss of the samples of its role.
        """
        output = self.denoise.output(networks["network"], batch)
        losses = self.denoise.loss_of(output, batch)
        kept = losses.total
        if self.has_teacher:
            with torch.no_grad():
                told = self.denoise.output(networks[TEACHER], batch)
            kept = (output.float() - told.float()).square().mean(dim=(1, 2, 3))
        instance = torch.where(batch.is_prior, 0.0, losses.total / (1 - self.prior_share))
        prior = torch.where(batch.is_prior, kept / self.prior_share, 0.0)
        return Losses(
            total=instance + self.prior_weight * prior,
            parts={**losses.parts, "instance": instance, "prior": prior},
            times=losses.times,
        )


def prior_share(datasets: Sequence[Dataset]) -> float:
    """Return which part of all samples drawn is of datasets with role prior."""
    prior = sum(dataset.weight for dataset in datasets if dataset.role == "prior")
    return prior / sum(dataset.weight for dataset in datasets)
