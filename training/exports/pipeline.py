"""A whole pipeline of diffusers around a PixArt: what `PixArtAlphaPipeline` or `PixArtSigmaPipeline` opens."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.weights import WEIGHT_FILE, model_folder
from errors import UserError
from pipelines.store.files import atomic_write_json
from pixart.model import PixArtConfig
from pixart.origins import Fact, Origins
from pixart.published import PIPELINE_TEXTS
from pixart.transformer_config import DIFFUSERS_VERSION
from pixart.weight_files import read_json

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
MODEL_INDEX = "model_index.json"
# Latent side of the one alpha that diffusers' pipeline tells the size of its images, and of that which alpha's lacks.
TOLD_SIDE, SIGMA_SIDE = 128, 256
# What a tokenizer's folder has, beside weights or in a folder of its own.
TOKENIZER_FILES = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json")
NOT_THERE = [None, None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What stands around a transformer in its pipeline.

    Attributes:
        class_name: of the pipeline.
        text_encoder, tokenizer, vae: folders; None for one that is not on this machine, which whoever opens the
            pipeline passes to `from_pretrained`.
        text_name, vae_name: what the recipe, or whoever published the weights, calls them.
    """

    class_name: str
    text_encoder: Path | None
    tokenizer: Path | None
    vae: Path | None
    text_name: str | None
    vae_name: str | None


def pipeline_class(config: PixArtConfig, origins: Origins) -> str:
    """Return which pipeline of diffusers draws with a PixArt as it was trained.

    Alpha's alone tells a network the size of its images; Sigma's alone knows the sizes of 2K. Else the tokens decide.

    Raises:
        UserError: diffusers has no pipeline of it.
    """
    if config.adaln != "single":
        raise UserError(f"diffusers has no pipeline of a PixArt with {config.adaln} adaLN: leave PIPELINE out")
    if config.kv_compressed_blocks:
        raise UserError("diffusers has no pipeline of a PixArt with compressed keys and values: leave PIPELINE out")
    if config.has_size_condition and config.sample_size != TOLD_SIDE:
        raise UserError(
            f"the network is told each image's size, and diffusers' {ALPHA} tells it to networks of sample_size "
            f"{TOLD_SIDE} alone, but this one's is {config.sample_size}: leave PIPELINE out, and draw with it here"
        )
    if config.has_size_condition:
        return ALPHA
    if config.sample_size == SIGMA_SIDE or (origins.cleaning is not None and origins.cleaning.value == "none"):
        return SIGMA
    most = PIPELINE_TEXTS[ALPHA][0]
    return ALPHA if origins.max_tokens is None or origins.max_tokens.value <= most else SIGMA


def find_parts(config: PixArtConfig, origins: Origins) -> Parts:
    """Return the parts of a pipeline as far as they are in local folders or in the hub's cache.

    Raises:
        UserError: a part is of a kind that these pipelines cannot hold.
    """
    class_name = pipeline_class(config, origins)
    text_name, text = _find(origins.text_encoder)
    vae_name, vae = _find(origins.vae)
    if text is not None and (kind := read_json(text / "config.json").get("model_type")) != "t5":
        raise UserError(f"the text encoder {text} is a {kind}, and {class_name} reads a T5 alone: leave PIPELINE out")
    if vae is not None and (kind := read_json(vae / "config.json").get("_class_name")) != "AutoencoderKL":
        raise UserError(f"the VAE {vae} is a {kind}, and {class_name} takes an AutoencoderKL alone: leave PIPELINE out")
    tokenizer = text
    if text is not None and (text.parent / MODEL_INDEX).is_file() and (text.parent / "tokenizer").is_dir():
        tokenizer = text.parent / "tokenizer"
    return Parts(
        class_name=class_name,
        text_encoder=text,
        tokenizer=tokenizer,
        vae=vae,
        text_name=text_name,
        vae_name=vae_name,
    )


def _find(names: Fact[tuple[str, ...]] | None) -> tuple[str | None, Path | None]:
    """Return the name of a model for people, and its folder where its weights are on this machine."""
    if names is None:
        return None, None
    for name in names.value:
        folder = model_folder(name)
        if folder is not None and any(WEIGHT_FILE.fullmatch(path.name) for path in folder.iterdir()):
            return name, folder
    return names.value[0], None


def write_parts(folder: Path, parts: Parts, *, scheduler_class: str) -> None:
    """Write what belongs around `transformer/` and `scheduler/` in `folder`: hard links, and copies between disks."""
    index: dict[str, Any] = {
        "_class_name": parts.class_name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": NOT_THERE,
        "tokenizer": NOT_THERE,
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": NOT_THERE,
    }
    if parts.text_encoder is not None:
        _link(_model_files(parts.text_encoder), folder / "text_encoder")
        index["text_encoder"] = ["transformers", "T5EncoderModel"]
    if parts.tokenizer is not None:
        _link(_matching(parts.tokenizer, TOKENIZER_FILES), folder / "tokenizer")
        index["tokenizer"] = ["transformers", _tokenizer_class(parts.tokenizer)]
    if parts.vae is not None:
        _link(_model_files(parts.vae), folder / "vae")
        index["vae"] = ["diffusers", "AutoencoderKL"]
    atomic_write_json(folder / MODEL_INDEX, index)


def _tokenizer_class(folder: Path) -> str:
    """Return the class that a tokenizer says it is of, if it is one of transformers."""
    import transformers

    path = folder / "tokenizer_config.json"
    name = str(json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")) if path.is_file() else ""
    return name if hasattr(transformers, name) else "T5Tokenizer"


def _model_files(folder: Path) -> Iterator[Path]:
    """Yield the config and the weights, of two kinds of which the pickles are left out."""
    weights = [path for path in sorted(folder.iterdir()) if WEIGHT_FILE.fullmatch(path.name)]
    safe = [path for path in weights if path.suffix == ".safetensors"]
    suffix = ".safetensors" if safe else ".bin"
    yield folder / "config.json"
    yield from safe or weights
    yield from sorted(path for path in folder.glob("*.index*.json") if suffix in path.name)


def _matching(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(path for path in folder.glob(pattern) if path.is_file())


def _link(files: Iterator[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in files:
        real = path.resolve()  # the hub's cache has links, which lead nowhere once it is gone
        try:
            os.link(real, folder / path.name)
        except OSError:
            shutil.copy2(real, folder / path.name)
