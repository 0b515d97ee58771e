"""The objective that a recipe names; here alone objectives are known by name."""

import dataclasses

import torch
from torch import Tensor

from errors import UserError
from pipelines.store.families import NULL_CAPTION_FILE
from pixart.processes.ddpm import DDPM
from pixart.processes.flow import Flow
from pixart.processes.make import process_of
from pixart.processes.process import Process
from training.codec_keys import RECONSTRUCT
from training.data.former import channels_of
from training.data.reading import read_null
from training.loop.zero import compute_dtype
from training.objectives.consistency import Consistency
from training.objectives.denoise import Denoise
from training.objectives.flow_consistency import FlowConsistency
from training.objectives.inputs import NetworkInputs
from training.objectives.matching import DistributionMatching
from training.objectives.objective import Objective
from training.objectives.prior_preservation import TEACHER, PriorPreservation, prior_share
from training.objectives.realignment import Realignment
from training.objectives.reconstruction import Reconstruct
from training.stages.other_vae import stage_bridge
from training.stages.stage import TrainingJob


def choose_objective(job: TrainingJob, device: torch.device) -> Objective:
    """Return the objective of a stage; `device` is where it gets its batches."""
    settings = job.settings
    if settings.objective == RECONSTRUCT:
        return Reconstruct(settings=settings.reconstruction, dtype=compute_dtype(settings), seed=settings.seed)
    inputs = NetworkInputs(
        scaling_factor=job.features.vae["scaling_factor"],
        shift_factor=job.features.vae["shift_factor"],
        # A DiT's label after its classes.
        null_label=job.model.num_classes if job.features.text_encoder is None else None,
        dtype=compute_dtype(settings),
        control=None if job.features.control is None else job.features.control.family.name,
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
        case "realign":
            return _realignment(job, Denoise(process=process, inputs=inputs), device=device)
        case "consistency":
            return _consistency(job, process, inputs, device=device)
        case "distribution_matching":
            return _matching(job, process, inputs, device=device)


def _consistency(job: TrainingJob, process: Process, inputs: NetworkInputs, *, device: torch.device) -> Consistency:
    settings, null_text = job.settings.consistency, _null_caption(job).to(device)
    said = {
        "guidance_range": settings.guidance_range,
        "huber_c": settings.huber_c,
        "guided_weight": settings.guided_weight if settings.has_range else 0.0,
        "num_steps": job.settings.num_steps,
    }
    if isinstance(process, Flow):
        return FlowConsistency(process=process, inputs=inputs, null_text=null_text, **said)
    assert isinstance(process, DDPM), "there are two processes"
    return Consistency(process=process, inputs=inputs, null_text=null_text, **said)


def _matching(
    job: TrainingJob, process: Process, inputs: NetworkInputs, *, device: torch.device
) -> DistributionMatching:
    assert isinstance(process, DDPM), "the settings refuse others"
    settings = job.settings.matching
    student = Consistency(
        process=process,
        inputs=inputs,
        null_text=_null_caption(job).to(device),
        guidance_range=(settings.guidance_scale, settings.guidance_scale),
        huber_c=job.settings.consistency.huber_c,
    )
    return DistributionMatching(
        student=student,
        schedules=settings.times,
        compared=(settings.compared_from, settings.compared_to),
        consistency_weight=settings.consistency_weight,
        seed=job.settings.seed,
    )


def _null_caption(job: TrainingJob) -> Tensor:
    """Return the null caption of the stage's texts [L, D], which is the same in all its datasets."""
    directories = job.features.datasets[0].directories
    text = next((one for one in directories if one.family.null_file == NULL_CAPTION_FILE), None)
    if text is None:
        raise UserError(
            f"{job.command.recipe.path}: training.{job.command.stage_name}.objective = {job.settings.objective!r} "
            f"guides a teacher by captions, and features.{job.features.table_name} has none"
        )
    return read_null(text, NULL_CAPTION_FILE)


def _realignment(job: TrainingJob, denoise: Denoise, *, device: torch.device) -> Realignment:
    directory = job.features.former
    assert directory is not None, "features of such a stage have it"
    former, new = channels_of(directory), channels_of(job.features.datasets[0].leading)
    if former > new:
        raise UserError(
            f"{job.command.recipe.path}: training.{job.command.stage_name}.objective = 'realign' gives a teacher the "
            f"noise of the new latents, and they have {new} channels where its have {former}: choose 'denoise'"
        )
    vae, taps = directory.fact("vae"), job.model.patch_size**2
    # By shapes alone it is told what steps take.
    is_blank = device.type == "meta"
    bridge = torch.empty(taps * former, taps * new, device=device) if is_blank else stage_bridge(job).weight.to(device)
    return Realignment(
        denoise=denoise,
        former_inputs=dataclasses.replace(
            denoise.inputs,
            scaling_factor=vae["scaling_factor"],
            shift_factor=vae["shift_factor"],
        ),
        bridge=bridge,
        patch_size=job.model.patch_size,
        num_blocks=job.model.num_layers,
        num_steps=job.settings.num_steps,
    )
