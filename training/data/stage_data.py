"""The samples of a stage: counted once, and put in order."""

from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.survey import Survey, load_survey, make_survey, save_survey, survey_shards
from training.stages.stage import SURVEY, TrainingJob


def survey_stage(job: TrainingJob) -> Survey:
    """Return the survey of the stage's samples, made once and kept beside its checkpoints."""
    path, identity = job.directory / SURVEY, job.fingerprint.digest
    survey = load_survey(path, identity=identity)
    if survey is None:
        index = FeatureIndex(job.features.datasets)
        survey = make_survey(index, survey_shards(index, range(len(index))))
        save_survey(survey, path, identity=identity)
    return survey


def stage_plan(job: TrainingJob, survey: Survey) -> Plan:
    """Return the order of the stage's samples."""
    settings = job.settings
    return Plan(
        survey.counts,
        weights=[dataset.weight for dataset in job.features.datasets],
        sample_weights=survey.sample_weights,
        batch_size=settings.global_batch_size,
        seed=settings.seed,
        shards_per_block=settings.shards_per_block,
    )
