"""What a stage will do and need, printed before it starts; and what cannot work, refused before it starts.

The launcher knows the data; weights are counted where torch is loaded anyway, in the ranks or for `--plan`.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.text import Text

from errors import DISTRIBUTION, UserError
from pipelines.engine.progress import console, get_logger
from training.codec_keys import CODEC
from training.config import SCRATCH, StageTraining
from training.data.cache import remote_size
from training.data.choices import DatasetChoice
from training.data.index import FeatureIndex
from training.data.stage_data import stage_plan, survey_stage
from training.data.survey import ChoiceSurvey, Survey
from training.key_owners import keys_of_others
from training.launch.disk_needs import averages_bytes, checkpoint_bytes, num_averages_kept
from training.launch.memory import (
    MAX_SUMMED_IN_BF16,
    Shares,
    describe_bytes,
    describe_parts,
    describe_preview_parts,
    ways_to_leave_open,
)
from training.launch.reckoning import rank_bytes
from training.loop.boards import has_wandb
from training.loop.compilation import is_compiled, require_compilable
from training.loop.host import require_offload
from training.loop.products import require_products
from training.previews.control import require_controls
from training.previews.plan import PreviewPlan, describe_previews, require_previews
from training.stages.resume import changes_since
from training.stages.stage import TrainingJob
from training.stages.weights import WeightCounts

log = get_logger("training")

GIGABYTE = 1e9
NUM_SIZE_THREADS = 8
# What is odd beyond: times that each sample is drawn, rates of AdamW, steps that one would not want to lose.
MANY_EPOCHS = 1000
HIGH_LEARNING_RATE = 1e-2
MANY_STEPS = 1000
LOW_LORA_RATE = 5e-5


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a stage reads, and the ranks that share it."""

    survey: Survey
    num_ranks: int
    previews: PreviewPlan | None

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return sum(self.survey.num_samples)


def inspect_stage(job: TrainingJob, num_ranks: int) -> Preflight:
    """Count the samples of a stage and cut its batches for `num_ranks` on all machines.

    Raises:
        UserError: the batch cannot be cut evenly, settings do not go together, or no sample has all its features.
    """
    settings = job.settings
    require_even_batches(settings, num_ranks)
    require_compilable(settings)
    require_products(settings)
    require_offload(settings, num_ranks=num_ranks)
    job.directory.mkdir(parents=True, exist_ok=True)
    survey = survey_stage(job)
    _require_cache(job, survey)
    previews = require_previews(job, survey)
    require_controls(job, previews)
    return Preflight(survey=survey, num_ranks=num_ranks, previews=previews)


def require_even_batches(settings: StageTraining, num_ranks: int) -> None:
    """Refuse a batch that ranks and micro-batches cannot share evenly."""
    num_parts = num_ranks * settings.num_micro_batches
    if settings.global_batch_size % num_parts:
        is_open = settings.gradient_accumulation_steps == "auto"
        times = "" if is_open else f" times training.gradient_accumulation_steps {settings.num_micro_batches}"
        raise UserError(
            f"training.global_batch_size {settings.global_batch_size} is not a multiple of {num_parts}: "
            f"{num_ranks} ranks{times}"
        )


def _require_cache(job: TrainingJob, survey: Survey) -> None:
    """Refuse a cache that cannot hold the remote shards that are mixed at a time: it would fetch them over and over."""
    index = FeatureIndex(job.features.datasets)
    urls = []
    for shard in stage_plan(job, survey).shards_around(0).tolist():
        dataset = index.dataset(shard)
        for directory in dataset.directories:
            if directory.cache is not None:
                urls += [directory.url(index.name(shard), suffix) for suffix in (".tar", ".parquet")]
    with ThreadPoolExecutor(NUM_SIZE_THREADS) as pool:
        needed_gigabytes = sum(pool.map(remote_size, urls)) / GIGABYTE
    if needed_gigabytes > job.settings.cache_gigabytes:
        raise UserError(
            f"training.cache_gigabytes = {job.settings.cache_gigabytes:g} is less than the {needed_gigabytes:.3g} GB "
            f"of the {len(urls) // 2} remote tars that are mixed at a time; raise it, or lower "
            f"training.shards_per_block = {job.settings.shards_per_block}"
        )


def print_plan(job: TrainingJob, preflight: Preflight) -> None:
    """Print what the stage reads and does."""
    settings, survey, num_ranks = job.settings, preflight.survey, preflight.num_ranks
    buckets = survey.buckets[0] if len(survey.buckets) == 1 else f"{len(survey.buckets)} buckets"
    share = settings.global_batch_size // num_ranks
    split = f"{num_ranks} ranks x {share}, in micro-batches that fit"
    if settings.gradient_accumulation_steps != "auto":
        num_micro_batches = settings.num_micro_batches
        split = f"{num_ranks} ranks x {num_micro_batches} micro-batches x {share // num_micro_batches}"
    console.print(Text.assemble((f"training {job.command.stage_name}", "bold"), f" · {job.directory}"), soft_wrap=True)
    _print_datasets(job, survey)
    _print("steps", f"{settings.num_steps:,} of {settings.global_batch_size:,} = {split}; {buckets}")
    if job.resume is None and job.start.path is not None:
        known = f": {job.origins.describe(reads_text=settings.network == 'pixart')}" * (settings.network != CODEC)
        _print("start", f"from {job.start.path}{known}")
        for departure in job.departures:
            log.warning(departure)
    if preflight.previews is not None:
        _print("previews", describe_previews(job, preflight.previews))
    say_oddities(job, preflight)
    threads = settings.threads_per_process or "a share of the"
    compiled = ", compiled blocks" if is_compiled(settings) else ""
    _print("compute", f"{settings.dtype}, ZeRO {settings.zero_stage}{compiled}, {threads} CPU threads a rank")
    _print("identity", f"{job.fingerprint.digest[:12]}, of settings and features that decide the result")
    if job.resume is not None:
        is_gone = job.start.path is None and job.start.identity != SCRATCH
        gone = "; what the stage started from is gone, and not needed any more" if is_gone else ""
        _print("resume", f"after step {job.resume.step:,}, from {job.resume.path}{gone}")


def say_oddities(job: TrainingJob, preflight: Preflight) -> None:
    """Warn of numbers that hardly anybody means: recipes are for data of some size, and are tried on other data."""
    settings, stage = job.settings, job.command.stage_name
    if settings.wandb_project is not None and not has_wandb():
        log.warning(
            f"training.{stage}.wandb_project {settings.wandb_project!r}: the package wandb is not installed ("
            f"pip install '{DISTRIBUTION}[wandb]'), and the stage is trained without it"
        )
    num_drawn = settings.num_steps * settings.global_batch_size
    num_epochs = num_drawn / preflight.num_samples
    if num_epochs > MANY_EPOCHS:
        enough = MANY_EPOCHS * preflight.num_samples // settings.global_batch_size
        # Where a single step is more than that, fewer of them are no way out.
        way = f"; {enough:,} steps would be {enough * num_epochs / settings.num_steps:,.0f}" if enough else ""
        log.warning(
            f"{num_epochs:,.0f} epochs over {preflight.num_samples:,} samples: training.{stage}.num_steps "
            f"{settings.num_steps:,} x global_batch_size {settings.global_batch_size:,} is for more data{way}"
        )
    if settings.global_batch_size > preflight.num_samples:
        log.warning(
            f"training.{stage}.global_batch_size {settings.global_batch_size:,} is more than the "
            f"{preflight.num_samples:,} samples there are: each comes several times in a step"
        )
    if settings.warmup_steps >= settings.num_steps:
        log.warning(
            f"training.{stage}.warmup_steps {settings.warmup_steps:,} of num_steps {settings.num_steps:,}: the "
            f"learning rate never reaches {settings.learning_rate:g}"
        )
    if settings.decay_shape != "linear" and settings.decay_fraction == 0:
        no_decay = f"shapes no decay: training.{stage}.decay_fraction is 0"
        log.warning(f"training.{stage}.decay_shape {settings.decay_shape!r} {no_decay}")
    rates = {"learning_rate": settings.learning_rate, "muon_learning_rate": settings.muon_learning_rate or 0.0}
    for name, rate in rates.items():
        if rate > HIGH_LEARNING_RATE and name not in keys_of_others(settings.owners):
            log.warning(
                f"training.{stage}.{name} {rate:g} is high for AdamW and Muon, whose steps are of that size in every "
                "weight; the paper's is 2e-05"
            )
    reconstruction = settings.reconstruction
    if (
        settings.network == CODEC
        and settings.num_steps <= reconstruction.discriminator_from_step
        and (reconstruction.has_discriminator)
    ):
        log.warning(
            f"training.{stage}.reconstruction.discriminator_from_step {reconstruction.discriminator_from_step:,} of "
            f"num_steps {settings.num_steps:,}: the discriminator never begins"
        )
    if settings.has_adapters and settings.learning_rate < LOW_LORA_RATE:
        log.warning(
            f"training.{stage}.learning_rate {settings.learning_rate:g} is typical of whole networks: adapters, which "
            "begin at no change at all, take about 1e-4"
        )
    if settings.checkpoint_every >= settings.num_steps > MANY_STEPS:
        log.warning(
            f"training.{stage}.checkpoint_every {settings.checkpoint_every:,} of num_steps {settings.num_steps:,}: the "
            "only checkpoint is the last, and what is killed before begins anew"
        )


def say_changes(job: TrainingJob, *, num_ranks: int) -> None:
    """Say what a resume does otherwise than what it goes on from, as far as that steers what comes."""
    if job.resume is None:
        return
    table_name = job.features.table_name
    for change in changes_since(job.resume, job.settings, num_ranks=num_ranks, table_name=table_name):
        log.warning(change)


def _print_datasets(job: TrainingJob, survey: Survey) -> None:
    """Print a line for each dataset: its share of the samples drawn, and how often each of its samples is drawn."""
    settings, features = job.settings, job.features
    total_weight = sum(dataset.weight for dataset in features.datasets)
    choices = survey.choices or [None] * len(features.datasets)
    figures = zip(features.datasets, survey.num_samples, survey.epoch_lengths, choices, strict=True)
    for dataset, num_samples, epoch_length, choice in figures:
        share = dataset.weight / total_weight
        num_epochs = settings.num_steps * settings.global_batch_size * share / epoch_length
        mixed = "" if len(features.datasets) == 1 else f"{share:.2%} of every batch, "
        where = " and ".join(map(str, dataset.directories))
        shards = f"{num_samples:,} samples in {len(dataset.shards):,} shards"
        _print("data", f"{mixed}{shards}, {num_epochs:,.2f} epochs; {where}")
        if dataset.choice is not None and choice is not None:
            _print("choice", describe_choice(dataset.choice, choice))
            if dataset.choice.is_outdated([*dataset.shards, *dataset.validation_shards]):
                log.warning(
                    f"{dataset.choice.directory} was chosen by other columns than {dataset.run} has now; it is trained "
                    f"on as it is, and `{dataset.choice.command}` chooses anew"
                )
            if choice.weights is not None:
                _print("weights", describe_weights(choice, num_samples=num_samples, epoch_length=epoch_length))
    if features.unused_shards:
        first = ", ".join(features.unused_shards[:3])
        _print("not read", f"{len(features.unused_shards):,} shards of features.{features.table_name}: {first} …")
    for dataset in features.held_out:
        count = f"{len(dataset.shards):,} shards, every {settings.validate_every:,} steps"
        _print("validate", f"{count}; {', '.join(dataset.shards[:3])}{' …' if len(dataset.shards) > 3 else ''}")
    caches = [dataset.leading.cache for dataset in features.datasets if dataset.leading.cache is not None]
    if caches:
        _print("cache", f"{settings.cache_gigabytes:g} GB in {caches[0].directory} for remote shards")


def describe_choice(choice: DatasetChoice, survey: ChoiceSurvey) -> str:
    """Say what a dataset's choice makes of its samples."""
    share = survey.num_chosen / survey.num_samples
    said = f"{survey.num_chosen:,} of {survey.num_samples:,} samples ({share:.1%}), by {choice.directory}"
    said += "" if choice.settings.where is None else f": {choice.settings.where}"
    if survey.num_without_caption_weight:
        said += f"; of {survey.num_without_caption_weight:,} no caption has a weight above 0: theirs are drawn alike"
    return said


def describe_weights(survey: ChoiceSurvey, *, num_samples: int, epoch_length: int) -> str:
    """Say how unevenly the samples of a dataset are drawn, and how many draws an epoch has."""
    effective = survey.effective_number
    said = f"as uneven as {effective:,.0f} samples drawn alike ({effective / num_samples:.1%}); "
    said += f"{epoch_length:,} draws an epoch"
    said += "" if epoch_length == num_samples else ", fewer than samples, as some shards have most of the weight"
    if survey.num_never_drawn:
        said += f"; {survey.num_never_drawn:,} chosen samples have weight 0 and are never drawn"
    return said


def print_weights(
    job: TrainingJob, weights: WeightCounts, shares: Shares, *, parameter_counts: Mapping[str, int], num_ranks: int
) -> None:
    """Print what the stage's weights need; the first of `parameter_counts` is the network, the others are compared."""
    settings = job.settings
    (kind, num_parameters), *others = parameter_counts.items()
    is_part = weights.frozen and not settings.keeps_base
    trained = f", of which {weights.trained / 1e6:,.2f}M train" if is_part else ""
    _print("model", f"{kind}, {num_parameters / 1e6:,.2f}M parameters{trained}, from {_origin(job)}")
    if settings.has_adapters:
        _print("adapters", _describe_adapters(settings, weights))
    if settings.has_control:
        _print("control", _describe_branch(job, weights))
    if weights.critic:
        origin = "" if settings.network == CODEC else ", from the teacher's"
        _print("critic", f"{weights.critic / 1e6:,.2f}M parameters that train beside it{origin}")
    if settings.network != CODEC:
        _print("process", _describe_process(job))
    if weights.beside or weights.shared:
        held = f"; {weights.shared / 1e6:,.2f}M more are held already" if weights.shared else ""
        _print("beside", f"{weights.beside / 1e6:,.2f}M parameters of networks that run forward alone{held}")
    _print("split", _describe_split(job.settings, shares, num_ranks=num_ranks))
    _print("memory", describe_parts(shares))
    if shares.previews:
        _print("", describe_preview_parts(shares))
    _say_doubts(settings, shares)
    for name, num_others in others:
        other_gigabytes = rank_bytes(settings, WeightCounts(trained=num_others), num_ranks=num_ranks) / GIGABYTE
        _print("", f"{name} would have {num_others / 1e6:,.2f}M parameters and need {other_gigabytes:,.2f} GB")
    needed_gigabytes = checkpoint_bytes(settings, weights) / GIGABYTE
    free_gigabytes = shutil.disk_usage(job.directory).free / GIGABYTE
    kept = f"{settings.keep_checkpoints} kept, {free_gigabytes:,.0f} GB free"
    _print("disk", f"{needed_gigabytes:,.2f} GB a checkpoint, {kept}")
    if settings.ema == "power":
        num_kept = num_averages_kept(settings)
        kept_gigabytes = averages_bytes(settings, weights) / GIGABYTE
        _print("", f"{kept_gigabytes:,.2f} GB of averages {num_kept:,} times, {num_kept * kept_gigabytes:,.2f} GB")


def _describe_adapters(settings: StageTraining, weights: WeightCounts) -> str:
    shape = settings.lora.shape
    kinds = [name for name, is_on in (("DoRA", shape.dora), ("rsLoRA", shape.rslora)) if is_on]
    kind = " and ".join(kinds) or "LoRA"
    adapters = weights.trained - weights.critic
    fraction = adapters / weights.frozen
    return (
        f"{kind} of rank {shape.rank}, scale {shape.scale:.3g}, on {', '.join(shape.targets)}: "
        f"{adapters / 1e6:,.2f}M weights train, {weights.frozen / 1e6:,.2f}M stay as they are ({fraction:.2%}); "
        f"a file of {describe_bytes(adapters * 4)}"
    )


def _describe_branch(job: TrainingJob, weights: WeightCounts) -> str:
    origin = "which begin as they are there" if job.control is None else f"from {job.control}"
    return (
        f"copies of the first {job.settings.control_copies} blocks, {origin}, led by {job.features.control_family}: "
        f"{weights.trained / 1e6:,.2f}M weights train, {weights.frozen / 1e6:,.2f}M stay as they are; "
        f"a file of {describe_bytes(weights.trained * 4)}"
    )


def _describe_split(settings: StageTraining, shares: Shares, *, num_ranks: int) -> str:
    number = shares.num_micro_batches
    of = f"{num_ranks} ranks x {number} micro-batches x {shares.micro_batch_size}, keeping {shares.kept!r} activations"
    is_open = "auto" in (settings.gradient_accumulation_steps, settings.keep_activations)
    why = "as it was begun" if shares.is_kept else "chosen to fit" if is_open else "as the recipe says"
    return f"{of}; {why}"


def _say_doubts(settings: StageTraining, shares: Shares) -> None:
    """Warn of micro-batches that may not fit, and of many whose sum is not exact."""
    if not shares.fits:
        log.warning(
            f"the micro-batches of the recipe may not fit: they need {describe_bytes(shares.total_bytes)} of "
            f"{describe_bytes(shares.available_bytes)} a rank ({shares.basis}); "
            f"{', or '.join(ways_to_leave_open(settings))}, to have it chosen"
        )
    if (previews := sum(shares.previews.values())) > shares.available_bytes:
        log.warning(
            f"previews may not fit, and then there are none: they need {describe_bytes(previews)} of "
            f"{describe_bytes(shares.available_bytes)}; set a smaller training.preview_size"
        )
    if shares.num_micro_batches > MAX_SUMMED_IN_BF16 and settings.dtype == "bf16" and settings.zero_stage < 2:
        log.warning(
            f"{shares.num_micro_batches} micro-batches are summed in bf16 under training.zero_stage = "
            f"{settings.zero_stage}, which makes the gradient of 64 about 1% short; 2 sums them in fp32"
        )


def _describe_process(job: TrainingJob) -> str:
    settings = job.settings
    if settings.process == "ddpm":
        what = "ddpm, noise and learned variance"
        if settings.ddpm_logit_std is not None:
            what += f", logit-normal times ({settings.ddpm_logit_mean:g}, {settings.ddpm_logit_std:g})"
    else:
        times = f"logit-normal times ({settings.flow_logit_mean:g}, {settings.flow_logit_std:g})"
        said = "velocity" if settings.flow_prediction == "velocity" else "noise, of which the velocity is reckoned"
        what = f"flow, {said}, {times}, shift {settings.flow_shift:g}"
    if job.begins_output_anew:
        what += f"; the output layer begins anew, for the weights it starts from are of {job.start.process['name']}"
        if settings.process == "flow" and settings.flow_prediction == "velocity":
            what += " (flow_prediction = 'noise' goes on with it)"
    return what


def _origin(job: TrainingJob) -> str:
    return str(job.start.path or "scratch") if job.resume is None else str(job.resume.path)


def _print(name: str, line: str) -> None:
    console.print(f"  {name:<9}{line}", soft_wrap=True)
