"""The networks that evaluation measures with, and what distances of their features are called."""

# B images, D feature width, H W pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.tokens import TextCut, count_cut, pretrained_tokenizer
from encoders.vision import (
    INCEPTION_PIXELS,
    INCEPTION_RESIZER,
    ClipTowers,
    InceptionTower,
    VisionModel,
    VisionTower,
    describe_resizer,
    find_crop,
    find_resize,
)
from encoders.weights import ModelSource, find_file, read_config, require_model, resolve_model
from errors import MissingFileError, UserError
from pipelines.as_typed import typed_path
from pipelines.store.files import sha256_file
from sampling.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    import torch

# The CLIP that CMMD is defined with (Jayasumana et al. 2024): ViT-L/14 at 336 pixels.
CMMD_VISION = {"hidden_size": 1024, "patch_size": 14, "image_size": 336}
CLIP_MAX_TOKENS = 77  # CLIPTextConfig's default, which configs on the hub leave out
LABELS = {"dinov2": "DINOv2", "dinov2_with_registers": "DINOv2", "llava": "LLaVA", "llava_next": "LLaVA-NeXT"}


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """A network before it is loaded.

    Attributes:
        key: the recipe's key, "inception", "clip" or "vision".
        source: where its weights are, and their hash, or hub id and revision.
        distance: what a Fréchet distance of its features is called.
        mmd: what an MMD of its features is called; None where none is taken.
        resizer: how images reach the network's size, in words.
        resized_to: the shortest side in pixels or (width, height) that images are resized to before they lose edges;
            None where they are not.
        cropped: which images lose their edges on the way there: "none", "oblong" ones or "all".
    """

    key: str
    source: ModelSource
    distance: str
    mmd: str | None
    resizer: str
    resized_to: int | tuple[int, int] | None
    cropped: str = "none"


def find_networks(config: EvaluationConfig) -> list[NetworkSource]:
    """Return the networks that the recipe names, in the order of the table.

    Raises:
        MissingFileError, UserError: one is not there; names the recipe key and how to get it.
    """
    finders = {"inception": _find_inception, "clip": _find_clip, "vision": _find_vision}
    return [finder(config) for key, finder in finders.items() if getattr(config, key) is not None]


def _find_inception(config: EvaluationConfig) -> NetworkSource:
    assert config.inception is not None
    path = typed_path(config.inception)
    if not path.is_file():
        raise MissingFileError(
            f"evaluation.inception {path} does not exist: fetch pt_inception-2015-12-05-6726825d.pth from the releases "
            "of pytorch-fid (tag fid_weights) and give its path"
        )
    from encoders.inception import is_published

    network = NetworkSource(
        key="inception",
        source=ModelSource(str(path), None, f"sha256:{sha256_file(path)}"),
        # Only features of the published weights make a distance that papers call FID.
        distance="FID" if is_published(path) else "FD-Inception",
        mmd=None,
        resizer=INCEPTION_RESIZER,
        resized_to=(INCEPTION_PIXELS, INCEPTION_PIXELS),
    )
    if not is_published(path):
        # The published file is known by its bytes. Of any other it turns out here what it is, before images are drawn.
        import torch

        load_network(network, device=torch.device("cpu"))
    return network


def _find_clip(config: EvaluationConfig) -> NetworkSource:
    assert config.clip is not None
    source = resolve_model(config.clip, config.clip_revision)
    require_model(source, key="evaluation.clip")
    settings = _read_config(source, key="evaluation.clip")
    if settings.get("model_type") != "clip":
        raise UserError(f"evaluation.clip {config.clip} is a {settings.get('model_type')}, not a CLIP of both towers")
    # CLIPVisionConfig's defaults, which configs on the hub leave out.
    vision = {"hidden_size": 768, "patch_size": 32, "image_size": 224} | (settings.get("vision_config") or {})
    is_cmmd = all(vision[name] == value for name, value in CMMD_VISION.items())
    return NetworkSource(
        key="clip",
        source=source,
        distance="CLIP-FD",
        mmd="CMMD" if is_cmmd else "CLIP-MMD",
        resizer=describe_resizer(source, key="evaluation.clip"),
        resized_to=find_resize(source, key="evaluation.clip"),
        cropped=find_crop(source, key="evaluation.clip"),
    )


def _find_vision(config: EvaluationConfig) -> NetworkSource:
    assert config.vision is not None
    source = resolve_model(config.vision, config.vision_revision)
    require_model(source, key="evaluation.vision")
    kind = _read_config(source, key="evaluation.vision").get("model_type", "")
    return NetworkSource(
        key="vision",
        source=source,
        distance=f"FD-{LABELS.get(kind, kind)}",
        mmd=None,
        resizer=describe_resizer(source, key="evaluation.vision"),
        resized_to=find_resize(source, key="evaluation.vision"),
        cropped=find_crop(source, key="evaluation.vision"),
    )


def _read_config(source: ModelSource, *, key: str) -> dict[str, Any]:
    config = read_config(source) if find_file(source, "config.json") else None
    if config is None:
        raise UserError(f"{key} {source.location} has no config.json: it is not a folder that transformers saves")
    return config


def count_cut_prompts(prompts: Sequence[str], network: NetworkSource) -> TextCut:
    """Count what a CLIP does not read of prompts, without loading its weights."""
    settings = _read_config(network.source, key=f"evaluation.{network.key}").get("text_config") or {}
    max_tokens = settings.get("max_position_embeddings", CLIP_MAX_TOKENS)
    return count_cut(prompts, pretrained_tokenizer(network.source), max_tokens=max_tokens)


def load_network(network: NetworkSource, *, device: torch.device) -> VisionTower:
    """Load a network in float32, in evaluation mode."""
    import torch

    key = f"evaluation.{network.key}"
    if network.key == "inception":
        from pixart.tensor_files import read_weight_file

        path = Path(network.source.location)
        return InceptionTower(read_weight_file(path, key=key).tensors, origin=f"{key} {path}", device=device)
    if network.key == "clip":
        return ClipTowers(network.source, device=device, dtype=torch.float32, key=key)
    return VisionModel(network.source, device=device, key=key)
