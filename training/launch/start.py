"""What a stage begins with, opened and checked the same way by its ranks and by a plan of it."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from encoders.living_bytes import storage_bytes
from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_json, remove_temporary_files
from pipelines.store.state_files import read_state
from pixart.dit import DiT
from pixart.model import PixArt
from training.codec.autoencoder import AutoencoderConfig
from training.codec.networks import codec_config, codec_networks
from training.codec_keys import CODEC
from training.config import KeepActivations, StageTraining
from training.data.blank import SampleShape
from training.data.index import bucket_size
from training.data.survey import Survey
from training.launch.memory import (
    GPU_RESERVE,
    MACHINE_RESERVE,
    Shares,
    choose_shares,
    machine_bytes,
)
from training.launch.reckoning import Demand, GradientsIn
from training.loop.compilation import is_compiled
from training.loop.footprint import CudaBytes, Step
from training.loop.products import choose_products
from training.loop.zero import compute_dtype
from training.objectives.objective import Objective
from training.previews.footprint import preview_parts
from training.previews.plan import plan_previews
from training.stages.kinds import Network, TraineeConfig
from training.stages.networks import blank_copies, blank_copy, count_weights, network_config, trained_of
from training.stages.stage import TrainingJob
from training.stages.starts import objective_networks, starting_network
from training.stages.weights import WeightCounts

log = get_logger("training")

MEMORY = "memory.json"
GIGABYTE = 1e9
# Image tokens of the smaller of two micro-batches that a GPU measures.
MEASURED_TOKENS = 2048
# Of a micro-batch that a GPU has no room for, though it is small.
TOO_MANY_BYTES = 1 << 60

ObjectiveChoice = Callable[[TrainingJob, torch.device], Objective]


@dataclass(frozen=True, kw_only=True)
class Start:
    """The networks of an objective with the weights they start with, fp32 on the CPU."""

    config: TraineeConfig
    objective: Objective
    networks: Mapping[str, Network]
    weights: WeightCounts


def open_start(job: TrainingJob, survey: Survey, *, choose: ObjectiveChoice, device: torch.device) -> Start:
    """Open the networks of a stage and refuse what cannot be trained.

    Raises:
        UserError: weights are not there or do not fit, features lack what the objective reads, or the device or the
            width of the network cannot do FP8.
    """
    is_codec = job.settings.network == CODEC
    config = codec_config(job, survey) if is_codec else network_config(job, survey)
    objective = choose(job, device)
    _require_families(job, objective)
    if isinstance(config, AutoencoderConfig):
        networks = codec_networks(job, objective.networks, config)
    else:
        networks = objective_networks(job, objective.networks, starting_network(job, config))
    trained = trained_of(networks, objective.networks)
    choose_products(blank_copy(trained), job.settings, device=device)
    return Start(
        config=trained.config,
        objective=objective,
        networks=networks,
        weights=count_weights(objective.networks, networks),
    )


def _require_families(job: TrainingJob, objective: Objective) -> None:
    """Refuse features that lack what an objective reads."""
    dataset = job.features.datasets[0]
    found = {directory.family.name for directory in dataset.directories}
    if dataset.has_labels:
        found.add("labels")
    for name in sorted(set(objective.families) - found):
        raise UserError(f"the objective reads {name}, but features.{job.features.table_name} has {sorted(found)}")


def available_bytes(
    start: Start, settings: StageTraining, *, device: torch.device, num_sharing: int, num_loaded: int
) -> int:
    """Return the memory that a rank may take on its GPU or, on a CPU, of what its machine has left.

    Args:
        settings: may say that it is less.
        num_sharing: ranks that share the machine's memory.
        num_loaded: of them, those that have the networks of `start` in memory already, which is theirs.
    """
    most = math.inf if settings.device_gigabytes is None else card_bytes(settings.device_gigabytes)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(min(most, free * (1 - GPU_RESERVE)))
    own = storage_bytes(weight for network in start.networks.values() for weight in network.parameters())
    return int(min(most, (machine_bytes() + num_loaded * own) / num_sharing * (1 - MACHINE_RESERVE)))


def card_bytes(gigabytes: float) -> int:
    """Return the bytes that may be taken of a GPU that has so many GB."""
    return int(gigabytes * GIGABYTE * (1 - GPU_RESERVE))


def settle(
    job: TrainingJob,
    start: Start,
    survey: Survey,
    *,
    choose: ObjectiveChoice,
    num_ranks: int,
    room_bytes: int,
    device: torch.device,
    is_host: bool,
) -> Shares:
    """Choose the micro-batches and activations that the recipe leaves open; what a stage was begun with stays.

    `is_host` says that what `device` reckons is for the machine's own memory, and not for a card that is not here.

    Raises:
        UserError: see `choose_shares`.
    """
    sample = _largest_sample(job, survey)
    step = Step(
        settings=job.settings,
        objective=lambda device: choose(job, device),
        networks=blank_copies(start.networks),
        sample=sample,
        dtype=compute_dtype(job.settings),
    )
    sample_tokens = sample.height * sample.width // start.config.patch_size**2
    share = job.settings.global_batch_size // num_ranks
    measured = StepBytes(step, path=job.directory / MEMORY, device=device, share=share, sample_tokens=sample_tokens)
    # Beside the one that is computed: on a GPU the next, on a CPU those that are read ahead and the one being filled.
    num_batches = job.settings.prefetch_batches + 2 if is_host else 2
    demand = Demand(
        settings=job.settings,
        weights=start.weights,
        num_ranks=num_ranks,
        sample_tokens=sample_tokens,
        step_bytes=measured,
        batch_bytes=lambda size: num_batches * step.batch_bytes(size),
        is_host=is_host,
    )
    shares = choose_shares(demand, available_bytes=room_bytes, basis=measured.basis, former=_former(job))
    measured.save()
    plan = plan_previews(job, survey)
    if plan is None:
        return shares
    network = trained_of(step.networks, start.objective.networks)
    assert isinstance(network, DiT | PixArt), "a codec has no previews"
    previews = preview_parts(job, plan, network, dtype=step.dtype, is_host=is_host)
    return dataclasses.replace(shares, previews=demand.between_steps() | previews)


def settled(job: TrainingJob, num_micro_batches: int, kept: KeepActivations) -> TrainingJob:
    """Return the job with what has been chosen in its settings."""
    chosen = {"gradient_accumulation_steps": num_micro_batches, "keep_activations": kept}
    return dataclasses.replace(job, settings=job.settings.model_copy(update=chosen))


def _former(job: TrainingJob) -> tuple[int, KeepActivations] | None:
    """Return what the checkpoint to resume was trained with, as far as it says so."""
    steering = {} if job.resume is None else job.resume.trainer.get("steering", {})
    if "gradient_accumulation_steps" not in steering or job.resume is None:
        return None
    settings = job.settings
    kept = job.resume.trainer.get("keep_activations", "all")
    number = settings.gradient_accumulation_steps
    return (
        steering["gradient_accumulation_steps"] if number == "auto" else number,
        kept if settings.keep_activations == "auto" else settings.keep_activations,
    )


def _largest_sample(job: TrainingJob, survey: Survey) -> SampleShape:
    sides = [bucket_size(name) for name in survey.buckets]
    height, width = max(sides, key=lambda side: side[0] * side[1])
    text = job.features.text_encoder
    return SampleShape(
        channels=survey.channels,
        height=height // survey.downsample,
        width=width // survey.downsample,
        num_text_tokens=0 if text is None else text["max_tokens"],
        text_width=None if text is None else text["d_text"],
        channels_beside=job.features.channels_beside,
        is_pixels=job.settings.network == CODEC,
    )


class StepBytes:
    """Bytes that micro-batches take: of two sizes as they are measured or reckoned, of others on the line through both.

    They are kept in a file of the stage, and known again there as long as nothing that decides them has changed.
    """

    def __init__(self, step: Step, *, path: Path, device: torch.device, share: int, sample_tokens: int) -> None:
        """Take the `share` of a rank in samples, of which the largest has `sample_tokens` image tokens."""
        self._step, self._path, self._device = step, path, device
        is_measured = device.type == "cuda"
        self.basis = f"measured on {torch.cuda.get_device_name(device)}" if is_measured else "reckoned by shapes"
        small = max(1, MEASURED_TOKENS // sample_tokens) if is_measured else 1
        self._sizes = sorted({min(share, small), min(share, 2 * small) if is_measured else share})
        self._identity = self._identify()
        self._known = self._read()
        self._is_new = False

    def __call__(self, size: int, kept: KeepActivations, gradients: GradientsIn) -> int:
        """Return the bytes of a micro-batch of `size` samples, with those of gradients that are coming."""
        if self._device.type == "cuda" and gradients == "coming":
            # Small micro-batches, whose gradients outweigh all else, do not say how large ones grow.
            return self(size, kept, "there") + self._step.gradient_bytes
        if size in self._sizes:
            return self._at(size, kept, gradients)
        low, high = self._sizes[0], self._sizes[-1]
        first, last = self._at(low, kept, gradients), self._at(high, kept, gradients)
        # What takes more than two sizes show grows no faster than a line: no memory is taken for pairs of samples.
        return first + (last - first) * (size - low) // (high - low)

    def save(self) -> None:
        """Keep what is new."""
        if self._is_new:
            remove_temporary_files(self._path.parent, self._path.name)
            atomic_write_json(self._path, {"identity": self._identity, "step_bytes": self._known})

    def _at(self, size: int, kept: KeepActivations, gradients: GradientsIn) -> int:
        key = f"{kept} {size}" if gradients == "there" else f"{kept} {size} {gradients}"
        if key not in self._known:
            self._known[key] = self._take(size, kept, gradients)
            self._is_new = True
        return self._known[key]

    def _take(self, size: int, kept: KeepActivations, gradients: GradientsIn) -> int:
        if self._device.type != "cuda":
            return self._step.reckon(size, kept, gradients=gradients)
        log.info(f"measuring once what micro-batches of {size} take that keep {kept!r}")
        try:
            meter = CudaBytes(self._device)
            return self._step.measure(size, kept, device=self._device, meter=meter, gradients=gradients)
        except torch.OutOfMemoryError:
            return TOO_MANY_BYTES
        finally:
            torch.cuda.empty_cache()

    def _identify(self) -> str:
        settings = self._step.settings
        described: dict[str, Any] = {
            "basis": self.basis,
            "torch": torch.__version__,
            "sample": dataclasses.asdict(self._step.sample),
            "networks": {
                name: [dataclasses.asdict(network.config), _trained_names(network)]
                for name, network in self._step.networks.items()
            },
            "settings": [settings.objective, settings.process, settings.dtype, settings.products],
            **({"reconstruction": settings.reconstruction.model_dump()} if settings.network == CODEC else {}),
            "is_compiled": is_compiled(settings),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()

    def _read(self) -> dict[str, int]:
        if not self._path.is_file():
            return {}
        try:
            content = read_state(self._path, mend="it is made again", keys=("identity", "step_bytes"))
        except UserError as error:
            log.warning(str(error))
            return {}
        known = content["step_bytes"]
        is_sound = isinstance(known, dict) and all(isinstance(size, int) for size in known.values())
        return dict(known) if is_sound and content["identity"] == self._identity else {}


def _trained_names(network: Network) -> list[str]:
    return [name for name, weight in network.named_parameters() if weight.requires_grad]
