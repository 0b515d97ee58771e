"""DreamBooth's loss: of the images of a subject, and of images that the model drew itself before it learnt it.

Ruiz et al. 2022, section 3.3. PixArt-alpha's own DreamBooth (A.9) does without the second part: that is `denoise`.
"""

# B batch

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from training.data.batch import Batch
from training.data.datasets import Dataset
from training.objectives.denoise import Denoise
from training.objectives.objective import Losses, Role


@dataclass(frozen=True, kw_only=True)
class PriorPreservation:
    """The mean loss of instance samples plus `prior_weight` times the mean loss of prior ones.

    A sample counts by what its role has of all samples drawn, not of its own batch: batches of any number of ranks and
    micro-batches have the same gradient.

    Attributes:
        denoise: the loss of a sample.
        prior_weight: of the prior samples' mean loss.
        prior_share: part of all samples drawn that are prior ones, between 0 and 1.
    """

    denoise: Denoise
    prior_weight: float
    prior_share: float

    @property
    def networks(self) -> Mapping[str, Role]:
        """Those of the loss of a sample."""
        return self.denoise.networks

    @property
    def families(self) -> tuple[str, ...]:
        """Those of the loss of a sample."""
        return self.denoise.families

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Return the weighted loss of each sample [B].

        The mean of the total is that of part `instance` plus `prior_weight` times that of part `prior`; each part is
        the mean loss of the samples of its role.
        """
        losses = self.denoise.loss(networks, batch)
        instance = torch.where(batch.is_prior, 0.0, losses.total / (1 - self.prior_share))
        prior = torch.where(batch.is_prior, losses.total / self.prior_share, 0.0)
        return Losses(
            total=instance + self.prior_weight * prior,
            parts={**losses.parts, "instance": instance, "prior": prior},
            times=losses.times,
        )


def prior_share(datasets: Sequence[Dataset]) -> float:
    """Return which part of all samples drawn is of datasets with role prior."""
    prior = sum(dataset.weight for dataset in datasets if dataset.role == "prior")
    return prior / sum(dataset.weight for dataset in datasets)
