"""The networks that a codec stage works with, as they begin."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from encoders.perceptual import PerceptualModel, open_perceptual
from encoders.weights import resolve_model
from errors import UserError
from training.codec.autoencoder import Autoencoder, AutoencoderConfig, config_of_shape
from training.codec.discriminator import SMALLEST_SIDE, PatchDiscriminator
from training.codec.files import OF_LATENTS, load_codec, read_codec_config, scaling_of
from training.codec_keys import PERCEPTUAL
from training.data.index import bucket_size
from training.data.survey import Survey
from training.objectives.objective import Frozen, Role
from training.stages.critics import CRITIC
from training.stages.stage import TrainingJob
from training.stages.trainable import trainable_of

# Of weights that latents are made by.
ENCODER = ("encoder.", "quant_conv.")


def codec_config(job: TrainingJob, survey: Survey) -> AutoencoderConfig:
    """Return the shape of the stage's codec: that of the weights it starts from, else the recipe's.

    Raises:
        UserError: crops are no whole number of latents; names the key.
    """
    key, path = _key(job, "starts_from"), job.start.path if job.resume is None else job.resume.weights
    config = config_of_shape(job.settings.codec, sample_size=job.features.resolution)
    if path is not None:
        config = read_codec_config(resolve_model(str(path)), key=key)
        of_latents = scaling_of(config)
        shape = {name: value for name, value in config.diffusers.items() if name not in OF_LATENTS}
        # Measured anew of the weights that are saved, unless latents stay what they are.
        config = AutoencoderConfig(shape if _changes_latents(job.settings.trains, config) else shape | of_latents)
    for bucket in survey.buckets:
        if any(side % config.factor for side in bucket_size(bucket)):
            raise UserError(
                f"features.{job.features.table_name} has crops of {bucket} pixels, no multiples of the codec's factor "
                f"{config.factor}: set families.pixels.multiple to one"
            )
        if job.settings.reconstruction.has_discriminator and min(bucket_size(bucket)) < SMALLEST_SIDE:
            raise UserError(
                f"features.{job.features.table_name} has crops of {bucket} pixels, and a discriminator "
                f"({_key(job, 'reconstruction.discriminator_weight')}) wants {SMALLEST_SIDE} a side or more"
            )
    return config


def _changes_latents(trains: str | Sequence[str], config: AutoencoderConfig) -> bool:
    """Whether a weight trains that latents are made by."""
    if isinstance(trains, str):
        return True
    with torch.device("meta"):
        names = [name for name, _ in config.network().named_parameters() if name.startswith(ENCODER)]
    return any(fnmatchcase(name, pattern) for name in names for pattern in trains)


def codec_networks(
    job: TrainingJob, roles: Mapping[str, Role], config: AutoencoderConfig
) -> dict[str, Autoencoder | PerceptualModel]:
    """Return the networks of an objective by name, with the weights they start with, fp32 on the CPU.

    Raises:
        UserError: weights do not fit; names the recipe key.
    """
    settings = job.settings
    torch.manual_seed(settings.seed)
    path = job.start.path if job.resume is None else job.resume.weights
    trained = config.network() if path is None else load_codec(resolve_model(str(path)), key=_key(job, "starts_from"))
    trained.config = config
    trainable_of(settings).prepare(trained, seed=settings.seed, dtype=torch.float32, key=_key(job, "trains"))
    if settings.reconstruction.has_discriminator:
        trained.add_module(CRITIC, PatchDiscriminator(settings.reconstruction.discriminator_channels))
    return {name: _perceptual(job) if isinstance(role, Frozen) else trained for name, role in roles.items()}


def _perceptual(job: TrainingJob) -> PerceptualModel:
    path = job.networks[PERCEPTUAL].path
    assert path is not None, "only a stage starts from nothing"
    source, layers = resolve_model(str(path)), job.settings.reconstruction.perceptual_layers
    return open_perceptual(source, layers=layers, key=_key(job, f"networks.{PERCEPTUAL}"))


def _key(job: TrainingJob, name: str) -> str:
    return f"{job.command.recipe.path}: training.{job.command.stage_name}.{name}"
