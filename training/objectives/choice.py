"""The objective that a recipe names; here alone objectives are known by name."""

import torch

from pixart.processes.make import process_of
from training.loop.zero import compute_dtype
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Objective
from training.objectives.prior_preservation import TEACHER, PriorPreservation, prior_share
from training.stages.stage import TrainingJob


def choose_objective(job: TrainingJob, device: torch.device) -> Objective:
    """Return the objective of a stage; `device` is where it gets its batches."""
    settings = job.settings
    inputs = NetworkInputs(
        scaling_factor=job.features.vae["scaling_factor"],
        shift_factor=job.features.vae["shift_factor"],
        # A DiT's label after its classes.
        null_label=job.model.num_classes if job.features.text_encoder is None else None,
        dtype=compute_dtype(settings),
    )
    process = process_of(settings.process_spec, device=device)
    match settings.objective:
        case "denoise":
            return Denoise(process=process, inputs=inputs)
        case "prior_preservation":
            return PriorPreservation(
                denoise=Denoise(process=process, inputs=inputs),
                prior_weight=settings.prior_weight,
                prior_share=prior_share(job.features.datasets),
                has_teacher=TEACHER in settings.networks,
            )
