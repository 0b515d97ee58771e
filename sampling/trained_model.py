"""What is sampled from, and what belongs to it: a run's checkpoint here, others in `foreign_weights.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.kl import PUBLISHED_VAE
from encoders.weights import ModelSource, identity_of, resolve_model
from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command
from pipelines.engine.progress import get_logger
from pipelines.store.bases import adapter_identity, base_of
from pipelines.store.checkpoints import (
    ADAPTER,
    CONTROL,
    TRAINER,
    WEIGHTS,
    Checkpoint,
    find_checkpoint,
    named_checkpoint,
)
from pipelines.store.files import sha256_file, sha256_text
from pipelines.store.state_files import read_state
from pixart.evidence import origins_of_trainer
from pixart.origins import Origins
from pixart.processes.specs import (
    SCHEDULER_FILE,
    SCHEDULER_FOLDER,
    WEIGHT_FOLDERS,
    spec_of_trainer,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pixart.dit import DiT, DiTConfig
    from pixart.model import PixArt, PixArtConfig

log = get_logger("sampling")


@dataclass(frozen=True, kw_only=True)
class WeightedAdapter:
    """An adapter's file and how much of its change is added; `identity` is a hash of all that decides that change.

    `location` is what was typed of it.
    """

    path: Path
    location: str
    weight: float
    identity: str

    @property
    def title(self) -> str:
        """What people call it, with its weight."""
        return f"{adapter_name(self.path)} {self.weight:g}"


@dataclass(frozen=True, kw_only=True)
class LeadingBranch:
    """A control branch's file beside the weights that it leads.

    Attributes:
        path: of the file.
        location: what was typed of it.
        identity: hash of the file.
        num_copies: copies of the network's first blocks.
        maps: `kind` and `settings` of the control maps that it was trained with; None where the file does not say.
        photo_maps: those of the maps that are drawn of photos; None where they are the same.
    """

    path: Path
    location: str
    identity: str
    num_copies: int
    maps: Mapping[str, Any] | None
    photo_maps: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        return adapter_name(self.path)


def adapter_name(path: Path) -> str:
    """Return what people call an adapter or a branch: the name of its file, or of the folder that says what it is."""
    plain = {"adapter_model", "pytorch_lora_weights", "diffusion_pytorch_model"}
    if path.stem not in plain:
        return path.stem
    folder = path.parent
    is_of_training = folder.name == ADAPTER or (folder.name == CONTROL and (folder.parent / TRAINER).is_file())
    return f"{folder.parents[1].name}, {folder.parent.name}" if is_of_training else folder.name


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A transformer and what belongs to it.

    Attributes:
        name: for people, such as "stage 2, step 4000".
        kind: "dit" (classes) or "pixart" (text).
        model_path: the diffusers folder of its weights, or an original file.
        identity: hash of the weights.
        resolution: base resolution in pixels.
        patch_pixels: a side of an image is a multiple of it: the VAE's factor times the patch size.
        buckets: (height, width) in pixels that it was trained at.
        text: model, revision and max_tokens of its text encoder, tokenizer where that has a folder of its own; None for
            a DiT.
        vae: model and revision; scaling_factor and shift_factor where the training recorded them.
        process: spec of the process it was trained with.
        original_config: shape of an original file, which does not hold it.
        own_adapters: folders of adapters that the weights were trained as, merged into those of `model_path` in turn.
        shape: of a network that adapters or a branch were trained on, the fields of its config; its positions are drawn
            with.
        adapters: those that are added to that, each with its weight.
        branch: control branch beside the weights, through which an image leads what is drawn.
        checkpoint: folder of the checkpoint of training that it is; None of weights from elsewhere.
        run: whose checkpoint it is, if it lies in a run.
        origins: what it was trained with, as far as that is known.
        inner_guidance: scale of the guidance that is inside the weights as they are loaded, so that no pass adds any;
            None of those that are guided by passes. See `students.py`.
    """

    name: str
    kind: str
    model_path: Path
    identity: str
    num_classes: int | None
    resolution: int
    patch_pixels: int
    buckets: tuple[tuple[int, int], ...]
    text: dict[str, Any] | None
    vae: dict[str, Any]
    process: dict[str, Any]
    original_config: PixArtConfig | DiTConfig | None = None
    own_adapters: tuple[Path, ...] = ()
    shape: Mapping[str, Any] | None = None
    adapters: tuple[WeightedAdapter, ...] = ()
    branch: LeadingBranch | None = None
    checkpoint: Path | None = None
    run: Path | None = None
    origins: Origins = field(default_factory=Origins)
    inner_guidance: float | None = None

    def pass_guidance(self, scale: float) -> float:
        """Return the guidance that passes are to add where images are to have guidance of this scale."""
        return scale if self.inner_guidance is None else 1.0

    def load(self) -> PixArt | DiT:
        """Read the transformer, in evaluation mode, on the CPU."""
        from pixart.convert import load_diffusers, load_original
        from pixart.processes.make import process_of

        if self.original_config is not None:
            model = load_original(self.model_path, self.original_config)
        else:
            model = load_diffusers(self.model_path)
        model = self._led(self._guided(self._adapted(model)))
        channels, expected = model.config.in_channels, process_of(self.process).out_channels(model.config.in_channels)
        if model.config.out_channels != expected:
            raise UserError(
                f"{self.model_path} gives {model.config.out_channels} channels for latents of {channels}, but process "
                f"{self.process['name']} needs {expected}; a {SCHEDULER_FOLDER}/{SCHEDULER_FILE} beside the weights "
                f"says what they were trained with, if their folder is called {' or '.join(WEIGHT_FOLDERS)}"
            )
        return model.eval().requires_grad_(False)

    def blank(self) -> PixArt | DiT:
        """Return the transformer on the meta device: it has shapes and no values."""
        import torch

        from pixart.branching import new_branch
        from pixart.transformer_config import read_transformer_config

        config = self.original_config or read_transformer_config(self.model_path)
        if config.kind == "pixart" and config.has_guidance_condition:
            config = replace(config, has_guidance_condition=False)  # as it is loaded
        with torch.device("meta"):
            network = config.network()
            if self.branch is not None and network.kind == "pixart":
                network.control = new_branch(network.config, self.branch.num_copies)
            return network.eval().requires_grad_(False)

    def _guided(self, model: PixArt | DiT) -> PixArt | DiT:
        """Fold the guidance that images are to have into weights that are told theirs."""
        if model.kind != "pixart" or not model.config.has_guidance_condition:
            return model
        from pixart.guidance_condition import fold_guidance

        if self.inner_guidance is None:
            raise UserError(
                f"{self.model_path} is told the guidance of its images, and nothing says which it was trained with: "
                f"the {TRAINER} or {SCHEDULER_FOLDER}/ beside it is gone"
            )
        return fold_guidance(model.float(), self.inner_guidance)

    def _adapted(self, model: PixArt | DiT) -> PixArt | DiT:
        """Merge adapters into the weights; in fp32, in which small changes are not lost. Take the trained positions."""
        if model.kind != "pixart" or not (self.own_adapters or self.adapters or self.shape):
            return model
        from pixart.adapter_files import read_adapter
        from pixart.adapters import at_positions, merge, require_fit

        model = model.float()
        paths = [*self.own_adapters, *(adapter.path for adapter in self.adapters)]
        adapters = [read_adapter(path, model.config) for path in paths]
        for adapter in adapters:
            require_fit(adapter, model)
        own, added = adapters[: len(self.own_adapters)], adapters[len(self.own_adapters) :]
        for adapter in own:
            merge(model, [(adapter, 1.0)])
        merge(model, [(adapter, item.weight) for adapter, item in zip(added, self.adapters, strict=True)])
        return model if self.shape is None else at_positions(model, self.shape)

    def _led(self, model: PixArt | DiT) -> PixArt | DiT:
        """Put the control branch beside the weights."""
        if self.branch is not None and model.kind == "pixart":
            from pixart.control_files import read_branch

            read_branch(self.branch.path, model.config).attach(model)
        return model


def resolve_part(trained: TrainedModel, part: str, model: Mapping[str, Any]) -> ModelSource:
    """Return where the files of a model's text encoder or VAE are; MissingFileError names `part` and who says it."""
    try:
        return resolve_model(model["model"], model["revision"])
    except MissingFileError as error:
        says = "" if trained.checkpoint is None else f", which {trained.checkpoint / TRAINER} names: put it back"
        raise MissingFileError(f"{part} of {trained.name}: {error}{says}") from None


def open_run_model(run: Path, stage_name: str) -> TrainedModel:
    """Open the checkpoint of `RUN/training/<stage name>` that training would go on from; the weights are read later.

    Raises:
        MissingFileError: the stage has no checkpoint yet.
        UserError: the checkpoint is damaged, or has no EMA weights.
    """
    stage_folder = run / "training" / stage_name
    checkpoint = find_checkpoint(stage_folder)
    if checkpoint is None:
        command = typed_command("train", {"run": run, "stage": stage_name})
        raise MissingFileError(f"{stage_folder} has no checkpoint: run `{command}` first")
    return _of_checkpoint(checkpoint, stage_name, run=run)


def open_checkpoint_model(folder: Path) -> TrainedModel:
    """Open a checkpoint of training by its folder, `RUN/training/<stage>/step-<k>`; the weights are read later.

    A stage's folder is that in force in it.

    Raises:
        UserError: the checkpoint is damaged, or has no EMA weights.
    """
    checkpoint = named_checkpoint(folder)
    assert checkpoint is not None, f"{folder} is neither a checkpoint nor a stage's folder"
    stage = checkpoint.path.absolute().parent
    run = stage.parent.parent if stage.parent.name == "training" else None
    return _of_checkpoint(checkpoint, stage.name, run=run)


def _of_checkpoint(checkpoint: Checkpoint, stage_name: str, *, run: Path | None) -> TrainedModel:
    if checkpoint.note is not None:
        log.warning(checkpoint.note)
    folder, trainer = checkpoint.path, checkpoint.trainer
    if trainer["kind"] == "vae":
        raise UserError(
            f"{folder} is a codec, which draws nothing from texts or classes: name {checkpoint.weights} as "
            "features.vae_model, and what is trained on its latents draws with it"
        )
    if trainer["weights"] != "ema":
        raise UserError(f"{folder} holds {trainer['weights']} weights, samples are drawn from ema weights")
    shape, own_adapters, original_config, branch = None, (), None, None
    path, identity = checkpoint.weights, ""
    if checkpoint.has_adapters or checkpoint.has_control:
        base = base_of(checkpoint, identify=identity_of)
        path, shape, own_adapters, identity = base.path, base.shape, base.adapters, base.identity
        if checkpoint.has_adapters:
            own_adapters = (*own_adapters, checkpoint.weights)
        if own_adapters:
            identity += f"+sha256:{sha256_text(' '.join(map(adapter_identity, own_adapters)))}"
        if checkpoint.has_control:
            branch = _own_branch(checkpoint)
            identity += f"+{branch.identity}"
        if path.is_file():
            from pixart.model import PixArtConfig

            original_config = PixArtConfig(**shape)
    config = shape or _read_config(path)
    return TrainedModel(
        name=f"{re.sub(r'^stage(?=[0-9])', 'stage ', stage_name)}, step {trainer['step']}",
        kind=trainer["kind"],
        model_path=path,
        identity=identity or resolve_model(str(path)).identity,
        num_classes=config.get("num_embeds_ada_norm") if trainer["kind"] == "dit" else None,
        resolution=trainer["resolution"],
        # Runs made before the factor was recorded have the paper's.
        patch_pixels=trainer["vae"].get("factor", PUBLISHED_VAE.factor) * config["patch_size"],
        buckets=_trained_sizes(trainer["resolution"], trainer["buckets"]),
        text=trainer["text"],
        vae=trainer["vae"],
        process=spec_of_trainer(trainer),
        original_config=original_config,
        own_adapters=own_adapters,
        shape=shape,
        branch=branch,
        checkpoint=folder,
        run=run,
        origins=origins_of_trainer(trainer, source=str(folder / TRAINER)),
    )


def _own_branch(checkpoint: Checkpoint) -> LeadingBranch:
    """Return the control branch of a checkpoint that has trained one."""
    control = checkpoint.trainer[CONTROL]
    file = checkpoint.path / WEIGHTS[CONTROL]
    return LeadingBranch(
        path=file,
        location=str(checkpoint.path),
        identity=f"sha256:{sha256_file(file)}",
        num_copies=control["num_copies"],
        maps=control,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    mend = "remove the folder of this checkpoint, and the one before it counts; without one, train on"
    return read_state(folder / "config.json", mend=mend, keys=("patch_size",))


def _trained_sizes(resolution: int, buckets: list[str]) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of the trainer's bucket names "HxW"; none at all means square."""
    if not buckets:
        return ((resolution, resolution),)
    sizes = [bucket.split("x") for bucket in buckets]
    return tuple((int(height), int(width)) for height, width in sizes)
