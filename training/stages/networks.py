"""The network a stage trains, from its shape."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from encoders.perceptual import PerceptualModel
from errors import UserError
from pixart.adapters import add_adapters_of
from pixart.branching import new_branch
from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from training.data.survey import Survey
from training.objectives.objective import Frozen, Role, Trained
from training.stages.critics import CRITIC, critic_of
from training.stages.kinds import Network, Trainee, TraineeConfig, Transformer, TransformerConfig
from training.stages.stage import TrainingJob
from training.stages.weights import WeightCounts

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


def network_config(job: TrainingJob, survey: Survey) -> TransformerConfig:
    """Return the shape of the stage's network: the recipe's `[model]`, and what the features decide.

    Raises:
        UserError: the data have more classes than `model.num_classes`, or not the sizes that the network is told.
    """
    shared: dict[str, Any] = {
        "num_layers": job.model.num_layers,
        "num_heads": job.model.num_heads,
        "head_dim": job.model.head_dim,
        "patch_size": job.model.patch_size,
        "in_channels": survey.channels,
        "out_channels": process_of(job.settings.process_spec).out_channels(survey.channels),
        "sample_size": job.features.resolution // survey.downsample,
    }
    text = job.features.text_encoder
    if job.settings.network == "pixart":
        assert text is not None, "the features of a PixArt have text"
        require_sizes(job, survey)
        try:
            return PixArtConfig(
                **shared,
                caption_channels=text["d_text"],
                interpolation_scale=job.settings.position_scale,
                adaln=job.model.adaln,
                kv_compressed_blocks=tuple(job.settings.kv_compressed_blocks or ()),
                has_size_condition=job.model.size_condition,
                has_guidance_condition=job.settings.is_told_guidance,
            )
        except UserError as error:
            raise UserError(f"{job.command.recipe.path}: training.{job.command.stage_name}: {error}") from None
    require_labels(job, survey)
    return DiTConfig(**shared, num_classes=job.model.num_classes)


def require_labels(job: TrainingJob, survey: Survey) -> None:
    """Refuse class labels that the network has no embedding for."""
    if survey.max_label >= job.model.num_classes:
        raise UserError(
            f"model.num_classes is {job.model.num_classes}, "
            f"but {job.features.datasets[0].leading} has class label {survey.max_label}"
        )


def require_sizes(job: TrainingJob, survey: Survey) -> None:
    """Refuse samples without the size of their image where the network is told it."""
    if job.settings.network == "pixart" and job.model.size_condition and survey.num_without_size:
        raise UserError(
            f"training.{job.command.stage_name}: the network is told each image's size (model.size_condition), but "
            f"{survey.num_without_size:,} of {sum(survey.num_samples):,} samples of "
            f"{job.features.datasets[0].leading} have no original_height and original_width in their index: make these "
            "features of the images, or start from weights that are told no size"
        )


def blank_network(config: TransformerConfig) -> Transformer:
    """Return a network on the meta device, whose weights have neither memory nor values."""
    with torch.device("meta"):
        return config.network()


def parameter_counts(config: TraineeConfig) -> dict[str, int]:
    """Return the parameters of the network, by what it is called, and after it those of Figure 6's alternative."""
    with torch.device("meta"):
        return {shape.title: count_parameters(shape.network()) for shape in (config, *config.alternatives())}


def blank_copy(network: AnyNetwork) -> AnyNetwork:
    """Return a network of the same layers on the meta device, with all that is beside it; the same weights train."""
    if not isinstance(network, DiT | PixArt):
        return copy.deepcopy(network).to("meta")
    blank = blank_network(network.config)
    if network.kind == "pixart" and blank.kind == "pixart":
        if network.control is not None:
            with torch.device("meta"):
                blank.control = new_branch(network.config, len(network.control.copies))
        add_adapters_of(network, blank)
    if (critic := critic_of(network)) is not None:
        assert isinstance(critic, DiT | PixArt), "it began as another such network"
        blank.add_module(CRITIC, blank_copy(critic))
    for name, weight in network.named_parameters():
        blank.get_parameter(name).requires_grad_(weight.requires_grad)
    return cast("AnyNetwork", blank)


def blank_copies(networks: Mapping[str, AnyNetwork]) -> dict[str, AnyNetwork]:
    """Return such copies of several networks, by name; weights that are one in several are one in theirs, too."""
    copies = {name: blank_copy(network) for name, network in networks.items()}
    held: dict[int, nn.Parameter] = {}
    for name, network in networks.items():
        blank = copies[name]
        own = {place: held.setdefault(id(w), blank.get_parameter(place)) for place, w in network.named_parameters()}
        blank.load_state_dict(own, strict=False, assign=True)
    return copies


def count_weights(roles: Mapping[str, Role], networks: Mapping[str, Network]) -> WeightCounts:
    """Return how many weights the networks of an objective have, those that are one in several counted once."""
    counts = {"trained": 0, "frozen": 0, "beside": 0, "shared": 0}
    held: set[int] = set()
    for name in sorted(networks, key=lambda name: not isinstance(roles[name], Trained)):
        for weight in networks[name].parameters():
            kind = "beside"
            if isinstance(roles[name], Trained):
                kind = "trained" if weight.requires_grad else "frozen"
            elif id(weight) in held:
                kind = "shared"
            if kind != "shared" or isinstance(roles[name], Frozen):
                counts[kind] += weight.numel()
            held.add(id(weight))
    critics = (critic_of(network) for network in networks.values())
    return WeightCounts(**counts, critic=sum(count_parameters(critic) for critic in critics if critic is not None))


def trained_of(networks: Mapping[str, Network], roles: Mapping[str, Role]) -> Trainee:
    """Return the network that is trained, of those of an objective."""
    (trained,) = (network for name, network in networks.items() if isinstance(roles[name], Trained))
    assert not isinstance(trained, PerceptualModel), "it runs forward alone"
    return trained


def count_parameters(network: nn.Module) -> int:
    """Return the number of a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
