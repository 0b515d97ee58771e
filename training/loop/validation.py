"""The loss on shards that are kept out of training: the same samples, noise, timesteps and captions every time."""

from dataclasses import dataclass
from typing import Any

import torch

from errors import UserError
from training.codec_keys import CODEC
from training.data.batches import open_reader
from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.survey import make_survey, survey_shards
from training.data.transfer import Transfers
from training.loop.health import stop_on_non_finite
from training.loop.losses import LossWindow, StepLosses
from training.loop.networks import Networks
from training.objectives.objective import Objective
from training.stages.networks import require_labels, require_sizes
from training.stages.stage import TrainingJob

# The same for every run, whatever its seed, so that runs can be compared; no stage of training has this stream.
VALIDATION_SEED = 0
VALIDATION_STREAM = 1000


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is validated on: the first `num_steps` batches of a fixed order of the held-out samples."""

    job: TrainingJob
    buckets: list[str]
    plan: Plan
    num_steps: int

    @torch.no_grad()
    def run(self, networks: Networks, objective: Objective, *, step: int) -> dict[str, Any]:
        """Return the mean losses of the current weights by name; all ranks must call it.

        Raises:
            UnhealthyTrainingError: the loss of a sample is not finite.
        """
        losses, model = StepLosses(), networks.model
        reader = open_reader(
            self.job,
            self.job.features.held_out,
            buckets=self.buckets,
            plan=self.plan,
            steps=range(self.num_steps),
            seed=VALIDATION_SEED,
            stream=VALIDATION_STREAM,
            caption_dropout=0.0,
        )
        model.engine.eval()
        transfers = Transfers(model.device)
        with reader:
            for packed in reader:
                batch = transfers.bring(packed)
                losses.add(batch, objective.loss(networks, batch))
                transfers.finish()
        model.engine.train()
        losses.share(is_stopping=False)
        if losses.num_non_finite:
            stop_on_non_finite(losses, model, self.job, step=step)
        window = LossWindow(device=model.device)
        window.add(losses)
        found, _ = window.flush(has_times=self.job.settings.network != CODEC)
        means = {f"validation_{name}": value for name, value in found.items()}
        return means | {"num_validation_samples": self.num_steps * self.job.settings.global_batch_size}


def open_validation(job: TrainingJob) -> Validation | None:
    """Return the validation of a stage, None if no shards are held out for it.

    Raises:
        UserError: the held-out shards do not fill one batch, or have more classes than `model.num_classes`.
    """
    datasets, settings = job.features.held_out, job.settings
    if not datasets:
        return None
    index = FeatureIndex(datasets)
    survey = make_survey(index, survey_shards(index, range(len(index))))
    require_labels(job, survey)
    require_sizes(job, survey)
    num_samples = min(sum(survey.num_samples), settings.num_validation_samples)
    num_steps = num_samples // settings.global_batch_size
    if num_steps == 0:
        raise UserError(
            f"training.validation_shards {settings.validation_shards} and training.num_validation_samples "
            f"{settings.num_validation_samples} give {num_samples} samples, fewer than one batch of "
            f"training.global_batch_size {settings.global_batch_size}"
        )
    plan = Plan(
        survey.counts,
        weights=[dataset.weight for dataset in datasets],
        batch_size=settings.global_batch_size,
        seed=VALIDATION_SEED,
        shards_per_block=settings.shards_per_block,
    )
    return Validation(job=job, buckets=survey.buckets, plan=plan, num_steps=num_steps)
