"""Which weights of a network train, as what a checkpoint keeps them, and how they come back.

Everything after `prepare` goes by `requires_grad`: optimizer, average, state, memory and operations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from encoders.weights import hub_repository
from errors import UserError
from pipelines.store.checkpoints import ADAPTER, CONTROL, MODEL, WEIGHTS
from pipelines.store.files import atomic_write_json
from pixart.adapter_files import read_trained, write_adapter
from pixart.adapter_layers import AdapterShape
from pixart.adapters import add_adapters
from pixart.control_files import read_branch, write_branch
from pixart.convert import load_diffusers, save_diffusers
from pixart.dit import DiTConfig
from pixart.evidence import origins_of_trainer
from pixart.model import PixArt, PixArtConfig
from pixart.origins import ORIGINS_FILE
from training.codec.autoencoder import AutoencoderConfig
from training.codec.files import load_weights as load_codec_weights
from training.codec.files import save_codec
from training.codec_keys import CODEC
from training.config import StageTraining
from training.stages.critics import without_critic
from training.stages.kinds import Trainee, TraineeConfig
from training.stages.networks import blank_network


class Trainable(Protocol):
    """The part of a network that a stage trains."""

    @property
    def keeps_frozen(self) -> bool:
        """Whether a checkpoint holds the weights that do not train, too."""
        ...

    def prepare(self, network: Trainee, *, seed: int, dtype: torch.dtype, key: str) -> None:
        """Let the weights of this part train, in place, and no others, of networks fp32 on the CPU.

        Args:
            network: with the weights that the stage starts from.
            seed: of weights that are drawn.
            dtype: that the network will compute in.
            key: of the recipe, for errors.

        Raises:
            UserError: the recipe asks for weights that the network does not have.
        """
        ...

    def save(
        self,
        config: TraineeConfig,
        weights: Mapping[str, Tensor],
        checkpoint: Path,
        *,
        trainer: Mapping[str, Any],
    ) -> None:
        """Write weights by name, the average of what trains, to the folder of a checkpoint.

        Where `keeps_frozen` says so the rest is among them. `trainer` is the content of `trainer.json`.
        """
        ...

    def load(self, checkpoint: Path, config: TraineeConfig) -> dict[str, Tensor]:
        """Return the weights that `save` wrote, by name."""
        ...


@dataclass(frozen=True)
class OwnWeights:
    """Weights of the network itself: all, or those whose names fit shell patterns."""

    trains: Literal["all"] | Sequence[str]
    keeps_frozen: bool = True

    def prepare(self, network: Trainee, *, seed: int, dtype: torch.dtype, key: str) -> None:
        """Freeze the others."""
        if self.trains != "all":
            freeze_others(network, self.trains, key=key)

    def save(
        self,
        config: TraineeConfig,
        weights: Mapping[str, Tensor],
        checkpoint: Path,
        *,
        trainer: Mapping[str, Any],
    ) -> None:
        """Write the whole network as `model/`, which diffusers opens; a copy of it says what it was trained with."""
        assert isinstance(config, DiTConfig | PixArtConfig), "a codec's weights are CodecWeights"
        network = blank_network(config)
        network.load_state_dict(without_critic(weights), assign=True)
        save_diffusers(network, checkpoint / MODEL)
        record = origins_of_trainer(trainer, source=str(checkpoint)).to_json()
        atomic_write_json(checkpoint / MODEL / ORIGINS_FILE, record)

    def load(self, checkpoint: Path, config: TraineeConfig) -> dict[str, Tensor]:
        """Return the whole network's weights."""
        return load_diffusers(checkpoint / MODEL).state_dict()


class CodecWeights(OwnWeights):
    """Weights of a codec: all, or those whose names fit shell patterns, as decoder.* where latents are to stay."""

    def save(
        self,
        config: TraineeConfig,
        weights: Mapping[str, Tensor],
        checkpoint: Path,
        *,
        trainer: Mapping[str, Any],
    ) -> None:
        """Write the whole codec as `model/`, which diffusers and `features.vae_model` open."""
        assert isinstance(config, AutoencoderConfig)
        save_codec(config, without_critic(weights), checkpoint / MODEL)

    def load(self, checkpoint: Path, config: TraineeConfig) -> dict[str, Tensor]:
        """Return the whole codec's weights."""
        return load_codec_weights(checkpoint / MODEL)


@dataclass(frozen=True)
class Adapters:
    """Low-rank changes beside the network's own weights, which stay as they are (LoRA)."""

    shape: AdapterShape
    keeps_frozen: bool = False

    def prepare(self, network: Trainee, *, seed: int, dtype: torch.dtype, key: str) -> None:
        """Put adapters beside the layers; what stays is kept in the precision it is computed in alone."""
        assert isinstance(network, PixArt), "adapters of a DiT are refused where the stage is opened"
        torch.manual_seed(seed)
        add_adapters(network, self.shape, key=f"{key.rpartition('.')[0]}.lora.targets")
        _round_frozen(network, dtype)

    def save(
        self,
        config: TraineeConfig,
        weights: Mapping[str, Tensor],
        checkpoint: Path,
        *,
        trainer: Mapping[str, Any],
    ) -> None:
        """Write the adapters alone as `adapter/`, a folder that peft opens on diffusers' transformer."""
        assert isinstance(config, PixArtConfig)
        own = without_critic(weights)
        write_adapter(checkpoint / ADAPTER, own, config, shape=self.shape, belongs_to=_belonging(trainer))

    def load(self, checkpoint: Path, config: TraineeConfig) -> dict[str, Tensor]:
        """Return the adapters' weights, by their names beside the layers."""
        assert isinstance(config, PixArtConfig)
        return read_trained(checkpoint / ADAPTER, config)


@dataclass(frozen=True)
class Branch:
    """The control branch that stands beside a network, whose own weights stay as they are."""

    keeps_frozen: bool = False

    def prepare(self, network: Trainee, *, seed: int, dtype: torch.dtype, key: str) -> None:
        """Freeze all else, which is kept in the precision it is computed in alone."""
        assert isinstance(network, PixArt) and network.control is not None, "a stage that trains one starts with one"
        network.requires_grad_(False)
        network.control.requires_grad_(True)
        _round_frozen(network, dtype)

    def save(
        self,
        config: TraineeConfig,
        weights: Mapping[str, Tensor],
        checkpoint: Path,
        *,
        trainer: Mapping[str, Any],
    ) -> None:
        """Write the branch alone as `control/`, a folder of diffusers' research class."""
        assert isinstance(config, PixArtConfig)
        belongs_to = _belonging(trainer) | {CONTROL: trainer[CONTROL]}
        write_branch(checkpoint / CONTROL, weights, config, belongs_to=belongs_to)

    def load(self, checkpoint: Path, config: TraineeConfig) -> dict[str, Tensor]:
        """Return the branch's weights, by their names beside the network."""
        assert isinstance(config, PixArtConfig)
        return dict(read_branch(checkpoint / WEIGHTS[CONTROL], config).weights)


def trainable_of(settings: StageTraining) -> Trainable:
    """Return what a stage trains of its network."""
    if settings.network == CODEC and settings.trains not in ("lora", "control"):
        return CodecWeights(settings.trains)
    match settings.trains:
        case "lora":
            return Adapters(settings.lora.shape)
        case "control":
            return Branch()
        case trains:
            return OwnWeights(trains)


def _belonging(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file that is nothing by itself says of the weights it belongs to."""
    belongs_to = {"base": trainer["base"], **{name: trainer[name] for name in ("text", "vae", "process")}}
    # peft opens adapters by a name that holds elsewhere, too, where there is one
    return belongs_to | {"name": hub_repository(trainer["starts_from"] or "") or trainer["base"]["location"]}


def _round_frozen(network: Trainee, dtype: torch.dtype) -> None:
    for weight in network.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def freeze_others(network: Trainee, trains: Sequence[str], *, key: str) -> None:
    """Let only those weights train whose names fit one of the shell patterns `trains`.

    Raises:
        UserError: a pattern fits none; names the recipe `key` and a weight there is.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in trains:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{key}: pattern {pattern!r} fits none of the {len(names)} weights, such as {names[-1]!r}")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trains))
