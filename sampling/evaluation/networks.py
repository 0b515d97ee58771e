"""Networks that turn images into features: Inception-v3 for FID, CLIP, and any vision model of transformers."""

# B images, D feature width, H W pixels

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from encoders.weights import require_model, resolve_model
from pipelines.store.files import sha256_file
from sampling.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INCEPTION_RESIZER = "PIL bicubic with antialiasing, each channel in float32, squashed to 299x299 (as clean-fid)"
INCEPTION_PIXELS = 299
# The CLIP that CMMD is defined with (Jayasumana et al. 2024): ViT-L/14 at 336 pixels.
CMMD_VISION = {"hidden_size": 1024, "patch_size": 14, "image_size": 336}
LABELS = {"dinov2": "DINOv2", "dinov2_with_registers": "DINOv2", "llava": "LLaVA", "llava_next": "LLaVA-NeXT"}
RESAMPLING = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """A network before it is loaded.

    Attributes:
        key: the recipe's key, "inception", "clip" or "vision".
        identity: hash of the weights, or hub id and revision.
        distance: what a Fréchet distance of its features is called.
        mmd: what an MMD of its features is called; None where none is taken.
        resizer: how images reach the network's size, in words.
    """

    key: str
    location: str
    revision: str | None
    identity: str
    distance: str
    mmd: str | None
    resizer: str


class Network(Protocol):
    """A loaded network."""

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as the network reads it, float32 [3, H, W]."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Turn prepared images [B, 3, H, W] into features [B, D], float32."""
        ...


def find_networks(config: EvaluationConfig) -> list[NetworkSource]:
    """Return the networks that the recipe names, in the order of the table.

    Raises:
        FileNotFoundError, ValueError: one is not there; names the recipe key and how to get it.
    """
    finders = {"inception": _find_inception, "clip": _find_clip, "vision": _find_vision}
    return [finder(config) for key, finder in finders.items() if getattr(config, key) is not None]


def _find_inception(config: EvaluationConfig) -> NetworkSource:
    assert config.inception is not None
    path = Path(config.inception).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"evaluation.inception {path} does not exist: fetch pt_inception-2015-12-05-6726825d.pth from the releases "
            "of pytorch-fid (tag fid_weights) and give its path"
        )
    from sampling.evaluation.inception import is_published

    return NetworkSource(
        key="inception",
        location=str(path),
        revision=None,
        identity=f"sha256:{sha256_file(path)}",
        # Only features of the published weights make a distance that papers call FID.
        distance="FID" if is_published(path) else "FD-Inception",
        mmd=None,
        resizer=INCEPTION_RESIZER,
    )


def _find_clip(config: EvaluationConfig) -> NetworkSource:
    assert config.clip is not None
    source = resolve_model(config.clip, config.clip_revision)
    require_model(source, key="evaluation.clip")
    settings = _read_json(source.location, source.revision, "config.json", key="evaluation.clip")
    if settings.get("model_type") != "clip":
        raise ValueError(f"evaluation.clip {config.clip} is a {settings.get('model_type')}, not a CLIP of both towers")
    # CLIPVisionConfig's defaults, which configs on the hub leave out.
    vision = {"hidden_size": 768, "patch_size": 32, "image_size": 224} | (settings.get("vision_config") or {})
    is_cmmd = all(vision[name] == value for name, value in CMMD_VISION.items())
    return NetworkSource(
        key="clip",
        location=source.location,
        revision=source.revision,
        identity=source.identity,
        distance="CLIP-FD",
        mmd="CMMD" if is_cmmd else "CLIP-MMD",
        resizer=_describe_resizer(source.location, source.revision, key="evaluation.clip"),
    )


def _find_vision(config: EvaluationConfig) -> NetworkSource:
    assert config.vision is not None
    source = resolve_model(config.vision, config.vision_revision)
    require_model(source, key="evaluation.vision")
    kind = _read_json(source.location, source.revision, "config.json", key="evaluation.vision").get("model_type", "")
    return NetworkSource(
        key="vision",
        location=source.location,
        revision=source.revision,
        identity=source.identity,
        distance=f"FD-{LABELS.get(kind, kind)}",
        mmd=None,
        resizer=_describe_resizer(source.location, source.revision, key="evaluation.vision"),
    )


def _read_json(location: str, revision: str | None, name: str, *, key: str) -> dict[str, Any]:
    path = Path(location) / name
    if not Path(location).is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(location, name, revision=revision)
        path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        raise ValueError(f"{key} {location} has no {name}: it is not a folder that transformers saves")
    return json.loads(path.read_text(encoding="utf-8"))


def _describe_resizer(location: str, revision: str | None, *, key: str) -> str:
    processor = _image_processor(location, revision, key=key)
    method = RESAMPLING.get(int(processor.resample), str(processor.resample))
    sides = {name: side for name, side in dict(processor.size).items() if side is not None}
    size = f"{sides['width']}x{sides['height']}" if "width" in sides else f"shortest side {sides.get('shortest_edge')}"
    crop = dict(processor.crop_size) if processor.do_center_crop else {}
    cut = f", centre crop {crop['width']}x{crop['height']}" if crop else ""
    return f"PIL {method} with antialiasing to {size}{cut}"


def _image_processor(location: str, revision: str | None, *, key: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(location, revision=revision, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} {location} has no image processor: {str(error).splitlines()[0]}") from None


def load_network(source: NetworkSource, *, device: torch.device) -> Network:
    """Load a network in float32, in evaluation mode."""
    loaders: dict[str, Callable[..., Network]] = {"inception": _Inception, "clip": Clip, "vision": _Vision}
    return loaders[source.key](source, device=device)


class _Inception:
    def __init__(self, source: NetworkSource, *, device: torch.device) -> None:
        from sampling.evaluation.inception import load_inception

        self._device = device
        self._model = load_inception(Path(source.location)).to(device)

    def prepare(self, image: Image.Image) -> np.ndarray:
        size = (INCEPTION_PIXELS, INCEPTION_PIXELS)
        channels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
        # In mode F nothing is rounded or clipped between resizing and the network (Parmar et al. 2022).
        return np.stack(
            [np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)) for channel in channels]
        )

    def features(self, images: Tensor) -> Tensor:
        return self._model(images.to(self._device))


class Clip:
    """Both towers of CLIP; embeddings have unit length."""

    def __init__(self, source: NetworkSource, *, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self._device = device
        self._processor = _image_processor(source.location, source.revision, key="evaluation.clip")
        self._tokenizer = AutoTokenizer.from_pretrained(source.location, revision=source.revision)
        self._model = _load(CLIPModel, source, device)
        self._max_tokens = self._model.config.text_config.max_position_embeddings

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as CLIP reads it, float32 [3, H, W]."""
        return self._processor(images=image, return_tensors="np")["pixel_values"][0]

    def features(self, images: Tensor) -> Tensor:
        """Turn prepared images [B, 3, H, W] into embeddings [B, D]."""
        from torch.nn.functional import normalize

        return normalize(self._model.get_image_features(pixel_values=images.to(self._device)).pooler_output, dim=1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into embeddings [B, D]; what is longer than CLIP's 77 tokens is cut."""
        from torch.nn.functional import normalize

        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        output = self._model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return normalize(output.pooler_output, dim=1)


class _Vision:
    def __init__(self, source: NetworkSource, *, device: torch.device) -> None:
        from transformers import AutoModel

        self._device = device
        self._processor = _image_processor(source.location, source.revision, key="evaluation.vision")
        model = _load(AutoModel, source, device)
        # Of a LLaVA only the tower, at the layer that its language model reads.
        self._layer = getattr(model.config, "vision_feature_layer", None)
        self._model = model if self._layer is None else model.vision_tower

    def prepare(self, image: Image.Image) -> np.ndarray:
        return self._processor(images=image, return_tensors="np")["pixel_values"][0]

    def features(self, images: Tensor) -> Tensor:
        images = images.to(self._device)
        if self._layer is None:
            return self._model(pixel_values=images).pooler_output
        states = self._model(pixel_values=images, output_hidden_states=True).hidden_states  # [B, 1 + N, D] each
        return states[self._layer][:, 1:].mean(dim=1)


def _load(model_class: Any, source: NetworkSource, device: torch.device) -> Any:
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, report = model_class.from_pretrained(
        source.location, revision=source.revision, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(str(name) for name in report["missing_keys"])
    if missing:
        raise ValueError(
            f"evaluation.{source.key} {source.location} lacks {len(missing)} weights ({', '.join(missing[:3])}, ...): "
            "its features would be random"
        )
    return model.eval().requires_grad_(False).to(device)
