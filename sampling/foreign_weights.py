"""Weights that are named: a folder or hub id of diffusers, an original file; what they lack, the recipe says."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from encoders.latents import require_whole_patches
from encoders.weights import REPOSITORY, cached_hub_file, of_transformer, require_model, resolve_model
from errors import MissingFileError, UserError
from pipelines.engine.progress import get_logger
from pipelines.raw.images import aspect_buckets
from pipelines.store.checkpoints import ADAPTER, CONTROL, TRAINER, checkpoint_folders
from pipelines.store.files import sha256_file
from pixart.evidence import PIPELINE_FILE, origins_of_folder
from pixart.origins import Origins
from pixart.processes.scheduler_configs import describe_replaced_sampler
from pixart.processes.specs import WEIGHT_FOLDERS, ddpm_spec
from pixart.published import PIPELINE_TEXTS
from pixart.weight_files import find_weight_files, is_original_name, read_json
from sampling.agreement import agreed_encoders, codec_spec, is_encoder_known, own_cleaning
from sampling.config import EncoderConfig
from sampling.trained_model import TrainedModel, open_checkpoint_model

log = get_logger("sampling")
PARTS = ("transformer", "vae", "text_encoder")
# of a hub repository, at any depth; of a part that has no .safetensors, the pickles as well
DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.model"]


def open_trained_model(
    location: str,
    encoders: EncoderConfig | None,
    *,
    revision: str | None = None,
    resolution: int | None = None,
    departs_in: Collection[str] = (),
) -> TrainedModel:
    """Open what `sampling.checkpoint` names: a folder or hub id of diffusers, an original file (.pth, .safetensors), or
    a checkpoint of training, or a stage's folder for that in force.

    A pipeline's folder brings its text encoder, tokenizer, VAE and process; what is missing is `encoders`, which must
    be what the weights were trained with, as far as that is known and `departs_in` does not say otherwise; without
    `encoders` it is that itself. `resolution` in pixels is for an original file that holds no positions.

    Raises:
        MissingFileError: there is no such file, or a folder without a transformer's config.json or weights.
        UserError: it is another kind of model, is damaged or asks for what is not known here, cannot be downloaded, or
            lacks encoders that nobody names.
    """
    places = [root / location for root in (Path(), REPOSITORY)]
    if file := next((path for path in places if path.is_file()), None):
        return _open_original(file, encoders, resolution=resolution, departs_in=departs_in)
    if folder := next((path for path in places if (path / TRAINER).is_file() or checkpoint_folders(path)), None):
        return open_checkpoint_model(folder)
    if folder := next((path.parent for path in places if _is_part_of_training(path)), None):
        return open_checkpoint_model(folder)
    if is_original_name(location) and not any(path.is_dir() for path in places):
        file = cached_hub_file(location, revision, key="sampling.checkpoint")
        return _open_original(file, encoders, resolution=resolution, departs_in=departs_in)
    folder = _find_folder(location, revision)
    if (folder / PIPELINE_FILE).is_file():
        return _open_pipeline(folder, encoders, location=location, departs_in=departs_in)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    kind = _kind(folder)
    origins = origins_of_folder(folder, location=location)
    needed = ("text", "vae") if kind == "pixart" else ("vae",)
    parts = agreed_encoders(location, origins, encoders, needed=needed, departs_in=departs_in)
    return _open_transformer(folder, origins=origins, **parts)


def _is_part_of_training(path: Path) -> bool:
    return path.name in (ADAPTER, CONTROL) and (path.parent / TRAINER).is_file()


def _find_folder(location: str, revision: str | None) -> Path:
    """Return the local folder of a checkpoint; a hub id's is in the hub's cache, filled if the hub can be reached."""
    try:
        source = resolve_model(of_transformer(location), revision)
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


def _open_pipeline(
    folder: Path, encoders: EncoderConfig | None, *, location: str, departs_in: Collection[str]
) -> TrainedModel:
    index = read_json(folder / PIPELINE_FILE)
    weights = folder / "transformer"
    origins = origins_of_folder(weights, location=location)
    has_text = (folder / "text_encoder").is_dir() or "text_encoder" not in index
    has_vae = (folder / "vae").is_dir()
    needed = [part for part, is_there in (("text", has_text), ("vae", has_vae)) if not is_there]
    parts = agreed_encoders(str(folder), origins, encoders, needed=needed, departs_in=departs_in) if needed else {}
    if has_text:
        if origins.max_tokens is None and _kind(weights) == "pixart":
            raise UserError(
                f"{folder / PIPELINE_FILE}: _class_name {index.get('_class_name')} is none of "
                f"{', '.join(PIPELINE_TEXTS)}, so how many tokens of a prompt it reads is not known: name {weights} as "
                "sampling.checkpoint, and its encoders and tokens in [features]"
            )
        parts["text"] = {
            "model": str(folder / "text_encoder"),
            "tokenizer": str(folder / "tokenizer"),
            "revision": None,
            "max_tokens": None if origins.max_tokens is None else origins.max_tokens.value,
            "cleaning": own_cleaning(origins),
        }
    if has_vae:
        parts["vae"] = {"model": str(folder / "vae"), "revision": None}
    return _open_transformer(weights, origins=origins, **parts)


def _kind(folder: Path) -> str:
    from pixart.transformer_config import read_transformer_config

    return read_transformer_config(folder).kind


def _open_transformer(
    folder: Path, *, origins: Origins, vae: dict[str, Any], text: dict[str, Any] | None = None
) -> TrainedModel:
    from pixart.transformer_config import read_transformer_config

    config = read_transformer_config(folder)
    find_weight_files(folder)  # what is missing is said before the text encoder is loaded
    process = ddpm_spec() if origins.process is None else origins.process.value
    if (replaced := describe_replaced_sampler(folder)) is not None:
        log.info(replaced)
    factor = codec_spec(vae).factor
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
        origins=origins,
    )


def _open_original(
    path: Path, encoders: EncoderConfig | None, *, resolution: int | None, departs_in: Collection[str]
) -> TrainedModel:
    from pixart.convert import file_origins, infer_config, is_original_dit, num_null_tokens
    from pixart.tensor_files import read_weight_file

    stored = read_weight_file(path, key="sampling.checkpoint")
    weights = stored.tensors
    try:
        origins = file_origins(path, stored)
    except UserError as error:
        raise UserError(f"sampling.checkpoint {path}: {error}") from None
    needed = ("vae",) if is_original_dit(weights) else ("text", "vae")
    parts = agreed_encoders(str(path), origins, encoders, needed=needed, departs_in=departs_in)
    codec = codec_spec(parts["vae"])
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
    if num_null_tokens(weights) is not None:
        is_known = is_encoder_known(origins, parts["text"]["model"]) or "text_encoder" in departs_in
        parts["text"]["null_caption"] = {"file": str(path), "is_encoder_known": is_known}
    return TrainedModel(
        name=path.stem,
        kind=config.kind,
        model_path=path,
        identity=f"sha256:{sha256_file(path)}",
        num_classes=config.num_classes if config.kind == "dit" else None,
        resolution=resolution,
        patch_pixels=patch_pixels,
        buckets=_folder_sizes(resolution, config.kind, multiple=patch_pixels),
        text=parts.get("text"),
        vae=parts["vae"],
        process=ddpm_spec() if origins.process is None else origins.process.value,
        original_config=config,
        origins=origins,
    )


def _folder_sizes(resolution: int, kind: str, *, multiple: int) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) that a checkpoint from elsewhere is drawn at: the paper's buckets, or squares."""
    return aspect_buckets(resolution, multiple=multiple) if kind == "pixart" else ((resolution, resolution),)
