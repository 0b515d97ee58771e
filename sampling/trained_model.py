"""What can be sampled from, and what belongs to it: a run's checkpoint, a diffusers folder or hub id, a .pth."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.kl import PUBLISHED_VAE
from encoders.latents import LatentSpec, require_whole_patches
from encoders.opening import latent_spec
from encoders.weights import REPOSITORY, require_model, resolve_model
from errors import MissingFileError, UserError
from pipelines.command import Command
from pipelines.engine.progress import get_logger
from pipelines.raw.images import aspect_buckets
from pipelines.store.checkpoints import MODEL, find_checkpoint
from pipelines.store.files import sha256_file
from pixart.processes.specs import (
    SCHEDULER_FILE,
    SCHEDULER_FOLDER,
    WEIGHT_FOLDERS,
    ddpm_spec,
    spec_beside,
    spec_of_trainer,
)
from sampling.config import EncoderConfig, SamplingConfig, encoder_config

if TYPE_CHECKING:
    from pixart.dit import DiT, DiTConfig
    from pixart.model import PixArt, PixArtConfig

log = get_logger("sampling")
# by norm_type, and whether captions are read; the last is Figure 6's PixArt with per-block adaLN
KINDS = {("ada_norm_zero", False): "dit", ("ada_norm_single", True): "pixart", ("ada_norm_zero", True): "pixart"}
ORIGINAL_SUFFIXES = (".pth", ".pt")
# what diffusers' pipelines read of a prompt; their folders do not say
PIPELINE_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
PARTS = ("transformer", "vae", "text_encoder")
# of a hub repository, at any depth; of a part that has no .safetensors, the pickles as well
DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.model"]


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

    def load(self) -> PixArt | DiT:
        """Read the transformer, in evaluation mode, on the CPU."""
        from pixart.convert import load_diffusers, load_original
        from pixart.processes.make import process_of

        if self.original_config is not None:
            model = load_original(self.model_path, self.original_config)
        else:
            model = load_diffusers(self.model_path)
        channels, expected = model.config.in_channels, process_of(self.process).out_channels(model.config.in_channels)
        if model.config.out_channels != expected:
            raise UserError(
                f"{self.model_path} gives {model.config.out_channels} channels for latents of {channels}, but process "
                f"{self.process['name']} needs {expected}; a {SCHEDULER_FOLDER}/{SCHEDULER_FILE} beside the weights "
                f"says what they were trained with, if their folder is called {' or '.join(WEIGHT_FOLDERS)}"
            )
        return model.eval().requires_grad_(False)


def find_trained_model(config: SamplingConfig, command: Command) -> TrainedModel:
    """Open `sampling.checkpoint`, or the checkpoint of the command's run and stage; raises as those two do."""
    if config.checkpoint is None:
        _require_stage(command)
        trained = open_run_model(command.run, command.stage_name)
        _require_same_process(trained, command)
        return trained
    return open_trained_model(
        config.checkpoint,
        encoder_config(command.recipe),
        revision=config.checkpoint_revision,
        resolution=config.checkpoint_resolution,
    )


def _require_stage(command: Command) -> None:
    """Refuse a stage that neither the recipe nor the run knows."""
    names = command.recipe.names("training")
    if command.stage not in names and not (command.run / "training" / command.stage_name).is_dir():
        known = ", ".join(names) or "none"
        raise UserError(f"{command.recipe.path}: there is no [training.{command.stage}]; its stages are: {known}")


def _require_same_process(trained: TrainedModel, command: Command) -> None:
    """Refuse a recipe that names another process for the stage: what it would draw is not what it asks for."""
    stage, actual = command.stage_name, trained.process["name"]
    settings = command.recipe.laid_over("training", stage) if stage in command.recipe.names("training") else {}
    if settings.get("process", actual) != actual:
        raise UserError(
            f"training.{stage}.process is {settings['process']!r} in the recipe, but {trained.model_path.parent} was "
            f"trained with {actual!r}; train the stage anew, or draw with the recipe it was trained by"
        )


def open_run_model(run: Path, stage_name: str) -> TrainedModel:
    """Open the checkpoint of `RUN/training/<stage name>` that training would go on from; the weights are read later.

    Raises:
        MissingFileError: the stage has no checkpoint yet.
        UserError: the checkpoint is damaged, or has no EMA weights.
    """
    stage_folder = run / "training" / stage_name
    checkpoint = find_checkpoint(stage_folder)
    if checkpoint is None:
        raise MissingFileError(f"{stage_folder} has no checkpoint: run `make train RUN={run} STAGE={stage_name}` first")
    if checkpoint.note is not None:
        log.warning(checkpoint.note)
    folder, trainer = checkpoint.path, checkpoint.trainer
    if trainer["weights"] != "ema":
        raise UserError(f"{folder} holds {trainer['weights']} weights, samples are drawn from ema weights")
    config = _read_config(folder / MODEL)
    return TrainedModel(
        name=f"{re.sub(r'^stage(?=[0-9])', 'stage ', stage_name)}, step {trainer['step']}",
        kind=trainer["kind"],
        model_path=folder / MODEL,
        identity=resolve_model(str(folder / MODEL)).identity,
        num_classes=config.get("num_embeds_ada_norm") if trainer["kind"] == "dit" else None,
        resolution=trainer["resolution"],
        # Runs made before the factor was recorded have the paper's.
        patch_pixels=trainer["vae"].get("factor", PUBLISHED_VAE.factor) * config["patch_size"],
        buckets=_trained_sizes(trainer["resolution"], trainer["buckets"]),
        text=trainer["text"],
        vae=trainer["vae"],
        process=spec_of_trainer(trainer),
    )


def open_trained_model(
    location: str, encoders: EncoderConfig | None, *, revision: str | None = None, resolution: int | None = None
) -> TrainedModel:
    """Open what `sampling.checkpoint` names: a folder or hub id of diffusers, or an original .pth or .pt.

    A pipeline's folder brings its text encoder, tokenizer, VAE and process; what is missing is `encoders`.
    `resolution` in pixels is for an original file that holds no positions.

    Raises:
        MissingFileError: there is no such file, or a folder without a transformer's config.json.
        UserError: it is another kind of model, cannot be downloaded, or lacks encoders that nobody names.
    """
    if location.endswith(ORIGINAL_SUFFIXES):
        return _open_original(Path(location), encoders, resolution=resolution)
    folder = _find_folder(location, revision)
    if (folder / "model_index.json").is_file():
        return _open_pipeline(folder, encoders)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    return _open_transformer(folder, **_encoders(location, encoders))


def _find_folder(location: str, revision: str | None) -> Path:
    """Return the local folder of a checkpoint; a hub id's is in the hub's cache, filled if the hub can be reached."""
    try:
        source = resolve_model(location, revision)
    except FileNotFoundError as error:
        raise MissingFileError(f"sampling.checkpoint: {error}") from None
    if Path(source.location).is_dir():
        return Path(source.location)
    require_model(source, key="sampling.checkpoint")
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source.location, revision=revision, allow_patterns=DOWNLOADED_FILES))
    pickled = [part for part in PARTS if (folder / part).is_dir() and not any((folder / part).glob("*.safetensors"))]
    if pickled:
        snapshot_download(source.location, revision=revision, allow_patterns=[f"{part}/*.bin" for part in pickled])
    return folder


def _encoders(location: str, encoders: EncoderConfig | None) -> dict[str, dict[str, Any]]:
    if encoders is None:
        raise UserError(
            f"sampling.checkpoint {location} comes without text encoder and VAE: the recipe must name them as "
            "features.text_model and features.vae_model"
        )
    return {
        "text": {
            "model": encoders.text_model,
            "revision": encoders.text_revision,
            "max_tokens": encoders.max_tokens,
            "cleaning": encoders.text_cleaning,
        },
        "vae": {"model": encoders.vae_model, "revision": encoders.vae_revision},
    }


def _open_pipeline(folder: Path, encoders: EncoderConfig | None) -> TrainedModel:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    has_text = (folder / "text_encoder").is_dir() or "text_encoder" not in index
    has_vae = (folder / "vae").is_dir()
    parts = {} if has_text and has_vae else _encoders(str(folder), encoders)
    if has_text:
        parts["text"] = {
            "model": str(folder / "text_encoder"),
            "tokenizer": str(folder / "tokenizer"),
            "revision": None,
            "max_tokens": 120,
        }
    if index["_class_name"] in PIPELINE_TOKENS:
        parts["text"]["max_tokens"] = PIPELINE_TOKENS[index["_class_name"]]
    if has_vae:
        parts["vae"] = {"model": str(folder / "vae"), "revision": None}
    return _open_transformer(folder / "transformer", **parts)


def _open_transformer(folder: Path, *, text: dict[str, Any], vae: dict[str, Any]) -> TrainedModel:
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"sampling.checkpoint {folder} has no config.json of a transformer")
    config = _read_config(folder)
    kind = KINDS.get((config.get("norm_type", ""), bool(config.get("caption_channels"))))
    if kind is None:
        raise UserError(f"sampling.checkpoint {folder} is a {config.get('_class_name')}, not a PixArt or DiT")
    factor = _codec_spec(vae).factor
    resolution, patch_pixels = config["sample_size"] * factor, config["patch_size"] * factor
    return TrainedModel(
        name=folder.parent.name if folder.name in WEIGHT_FOLDERS else folder.name,
        kind=kind,
        model_path=folder,
        identity=resolve_model(str(folder)).identity,
        num_classes=config.get("num_embeds_ada_norm") if kind == "dit" else None,
        resolution=resolution,
        patch_pixels=patch_pixels,
        buckets=_folder_sizes(resolution, kind, multiple=patch_pixels),
        text=text if kind == "pixart" else None,
        vae=vae,
        process=spec_beside(folder) or ddpm_spec(),
    )


def _open_original(path: Path, encoders: EncoderConfig | None, *, resolution: int | None) -> TrainedModel:
    from pixart.convert import infer_config, read_original

    path = next((root / path for root in (Path(), REPOSITORY) if (root / path).is_file()), path)
    if not path.is_file():
        raise MissingFileError(f"sampling.checkpoint {path} does not exist")
    parts = _encoders(str(path), encoders)
    codec = _codec_spec(parts["vae"])
    weights = read_original(path)
    try:
        config = infer_config(weights, sample_size=None if resolution is None else resolution // codec.factor)
    except UserError as error:
        raise UserError(f"sampling.checkpoint {path}: {error} (see sampling.checkpoint_resolution)") from None
    if resolution is not None:
        key = "sampling.checkpoint_resolution"
        require_whole_patches(resolution, codec, patch_size=config.patch_size, key=key)
    resolution, patch_pixels = config.sample_size * codec.factor, config.patch_size * codec.factor
    if (null_caption := weights.get("y_embedder.y_embedding")) is not None:
        parts["text"]["max_tokens"] = len(null_caption)
    return TrainedModel(
        name=path.stem,
        kind=config.kind,
        model_path=path,
        identity=f"sha256:{sha256_file(path)}",
        num_classes=config.num_classes if config.kind == "dit" else None,
        resolution=resolution,
        patch_pixels=patch_pixels,
        buckets=_folder_sizes(resolution, config.kind, multiple=patch_pixels),
        text=parts["text"] if config.kind == "pixart" else None,
        vae=parts["vae"],
        process=ddpm_spec(),
        original_config=config,
    )


def _codec_spec(vae: Mapping[str, Any]) -> LatentSpec:
    """Return the spec of a VAE; one of the hub that is not in the cache yet is taken for the paper's."""
    return latent_spec(resolve_model(vae["model"], vae["revision"]), key="VAE") or PUBLISHED_VAE


def _folder_sizes(resolution: int, kind: str, *, multiple: int) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) that a checkpoint from elsewhere is drawn at: the paper's buckets, or squares."""
    return aspect_buckets(resolution, multiple=multiple) if kind == "pixart" else ((resolution, resolution),)


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _trained_sizes(resolution: int, buckets: list[str]) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of the trainer's bucket names "HxW"; none at all means square."""
    if not buckets:
        return ((resolution, resolution),)
    sizes = [bucket.split("x") for bucket in buckets]
    return tuple((int(height), int(width)) for height, width in sizes)
