"""Weights that are named: a folder or hub id of diffusers, an original file; what they lack, the recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoders.kl import PUBLISHED_VAE
from encoders.latents import LatentSpec, require_whole_patches
from encoders.opening import latent_spec
from encoders.weights import REPOSITORY, require_model, resolve_model
from errors import MissingFileError, UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.images import aspect_buckets
from pipelines.store.checkpoints import TRAINER
from pipelines.store.files import sha256_file
from pixart.processes.scheduler_configs import describe_replaced_sampler, spec_beside
from pixart.processes.specs import WEIGHT_FOLDERS, ddpm_spec
from pixart.weight_files import find_weight_files, is_original_name, read_json
from sampling.config import EncoderConfig
from sampling.trained_model import TrainedModel, open_checkpoint_model

log = get_logger("sampling")
# what diffusers' pipelines read of a prompt; their folders do not say
PIPELINE_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300, "PixArtSigmaPAGPipeline": 300}
PARTS = ("transformer", "vae", "text_encoder")
# of a hub repository, at any depth; of a part that has no .safetensors, the pickles as well
DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.model"]


def open_trained_model(
    location: str, encoders: EncoderConfig | None, *, revision: str | None = None, resolution: int | None = None
) -> TrainedModel:
    """Open what `sampling.checkpoint` names: a folder or hub id of diffusers, an original file (.pth, .safetensors), or
    a checkpoint of training.

    A pipeline's folder brings its text encoder, tokenizer, VAE and process; what is missing is `encoders`.
    `resolution` in pixels is for an original file that holds no positions.

    Raises:
        MissingFileError: there is no such file, or a folder without a transformer's config.json or weights.
        UserError: it is another kind of model, is damaged or asks for what is not known here, cannot be downloaded, or
            lacks encoders that nobody names.
    """
    places = [root / location for root in (Path(), REPOSITORY)]
    if file := next((path for path in places if path.is_file()), None):
        return _open_original(file, encoders, resolution=resolution)
    if folder := next((path for path in places if (path / TRAINER).is_file()), None):
        return open_checkpoint_model(folder)
    if is_original_name(location) and not any(path.is_dir() for path in places):
        raise MissingFileError(f"sampling.checkpoint {location} does not exist")
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
    except MissingFileError as error:
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
    from pixart.transformer_config import read_transformer_config

    index = read_json(folder / "model_index.json")
    has_text = (folder / "text_encoder").is_dir() or "text_encoder" not in index
    has_vae = (folder / "vae").is_dir()
    parts = {} if has_text and has_vae else _encoders(str(folder), encoders)
    class_name = str(index.get("_class_name"))
    if has_text:
        if class_name not in PIPELINE_TOKENS and read_transformer_config(folder / "transformer").kind == "pixart":
            raise UserError(
                f"{folder / 'model_index.json'}: _class_name {class_name} is none of {', '.join(PIPELINE_TOKENS)}, so "
                f"how many tokens of a prompt it reads is not known: name {folder / 'transformer'} as "
                "sampling.checkpoint, and its encoders and tokens in [features]"
            )
        parts["text"] = {
            "model": str(folder / "text_encoder"),
            "tokenizer": str(folder / "tokenizer"),
            "revision": None,
        }
    if class_name in PIPELINE_TOKENS:
        parts["text"]["max_tokens"] = PIPELINE_TOKENS[class_name]
    if has_vae:
        parts["vae"] = {"model": str(folder / "vae"), "revision": None}
    return _open_transformer(folder / "transformer", **parts)


def _open_transformer(folder: Path, *, text: dict[str, Any], vae: dict[str, Any]) -> TrainedModel:
    from pixart.transformer_config import read_transformer_config

    config = read_transformer_config(folder)
    find_weight_files(folder)  # what is missing is said before the text encoder is loaded
    process = spec_beside(folder) or ddpm_spec()
    if (replaced := describe_replaced_sampler(folder)) is not None:
        log.info(replaced)
    factor = _codec_spec(vae).factor
    resolution, patch_pixels = config.sample_size * factor, config.patch_size * factor
    return TrainedModel(
        name=folder.parent.name if folder.name in WEIGHT_FOLDERS else folder.name,
        kind=config.kind,
        model_path=folder,
        identity=resolve_model(str(folder)).identity,
        num_classes=config.num_classes if config.kind == "dit" else None,
        resolution=resolution,
        patch_pixels=patch_pixels,
        buckets=_folder_sizes(resolution, config.kind, multiple=patch_pixels),
        text=text if config.kind == "pixart" else None,
        vae=vae,
        process=process,
    )


def _open_original(path: Path, encoders: EncoderConfig | None, *, resolution: int | None) -> TrainedModel:
    from pixart.convert import infer_config
    from pixart.tensor_files import read_weight_file

    parts = _encoders(str(path), encoders)
    codec = _codec_spec(parts["vae"])
    stored = read_weight_file(path, key="sampling.checkpoint")
    weights = stored.tensors
    try:
        side = None if resolution is None else resolution // codec.factor
        config = infer_config(weights, sample_size=side, num_heads=stored.num_heads)
    except UserError as error:
        hint = " (see sampling.checkpoint_resolution)" if "resolution" in str(error) else ""
        raise UserError(f"sampling.checkpoint {path}: {error}{hint}") from None
    if stored.part is not None:
        log.info(f"sampling.checkpoint {path}: {stored.describe()} are taken")
    if resolution is not None:
        key = "sampling.checkpoint_resolution"
        require_whole_patches(resolution, codec, patch_size=config.patch_size, key=key)
    resolution, patch_pixels = config.sample_size * codec.factor, config.patch_size * codec.factor
    if (null_caption := weights.get("y_embedder.y_embedding")) is not None and null_caption.ndim == 2:
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
