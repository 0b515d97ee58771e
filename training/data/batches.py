"""Batches of a stage: the order of its samples, and the readers of training and validation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from errors import UserError
from training.config import random_stream
from training.data.assembly import BatchAssembler
from training.data.datasets import Dataset
from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.reader import BatchReader
from training.data.stage_data import stage_plan
from training.data.survey import ShardSurvey, Survey, load_survey, make_survey, save_survey, survey_shards
from training.stages.stage import SURVEY, TrainingJob


def shared_survey(job: TrainingJob) -> Survey:
    """Return the survey of the stage's samples; where the launcher has not made it, each rank counts some shards."""
    path, identity = job.directory / SURVEY, job.fingerprint.digest
    is_there = [load_survey(path, identity=identity) is not None]
    dist.broadcast_object_list(is_there, src=0)
    if not is_there[0]:
        index = FeatureIndex(job.features.datasets)
        mine = survey_shards(index, range(dist.get_rank(), len(index), dist.get_world_size()))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            shards: list[ShardSurvey] = [everyone[i % len(everyone)][i // len(everyone)] for i in range(len(index))]
            save_survey(make_survey(index, shards), path, identity=identity)
    dist.barrier()
    survey = load_survey(path, identity=identity)
    if survey is None:
        raise UserError(f"{path} is not seen by rank {dist.get_rank()}: RUN must be a folder that all machines share")
    return survey


def training_reader(job: TrainingJob, survey: Survey) -> BatchReader:
    """Return the reader of this rank's batches from where the job goes on to the end of the stage."""
    settings, start_step = job.settings, job.resume.step if job.resume is not None else 0
    return open_reader(
        job,
        job.features.datasets,
        buckets=survey.buckets,
        plan=stage_plan(job, survey),
        steps=range(start_step, settings.num_steps),
        seed=settings.seed,
        stream=random_stream(job.command.stage_name),
        caption_dropout=settings.caption_dropout,
        is_stratified=settings.timestep_sampling == "stratified",
    )


def open_reader(
    job: TrainingJob,
    datasets: Sequence[Dataset],
    *,
    buckets: list[str],
    plan: Plan,
    steps: range,
    seed: int,
    stream: int,
    caption_dropout: float,
    is_stratified: bool = False,
) -> BatchReader:
    """Return a reader of this rank's part of `steps`; (seed, stream) decide noise, timesteps and choice of captions."""
    settings = job.settings
    assembler = BatchAssembler(
        datasets[0],
        buckets=buckets,
        seed=seed,
        stream=stream,
        caption_dropout=caption_dropout,
        is_stratified=is_stratified,
        checks_payloads=settings.check_payloads,
    )
    return BatchReader(
        plan,
        FeatureIndex(datasets),
        assembler,
        steps=steps,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        num_micro_batches=settings.num_micro_batches,
        prefetch_batches=settings.prefetch_batches,
        is_pinned=torch.cuda.is_available(),
    )
