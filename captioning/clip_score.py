"""CLIP score: the cosine between CLIP's embeddings of an image and of its caption (arXiv 2104.08718, unscaled)."""

# N images, D embedding width

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoProcessor, CLIPModel

from captioning.config import CaptioningConfig
from encoders.devices import choose_device, choose_dtype
from encoders.weights import resolve_model

# The last digits of a product depend on what it is batched with.
NUM_DECIMALS = 4
BATCH_SIZE = 32


class ClipScorer:
    """A CLIP model of transformers; embeds images as they pass and captions when they are there."""

    def __init__(self, config: CaptioningConfig) -> None:
        """Load `captioning.clip_model`.

        Raises:
            ValueError: it is no CLIP, or lacks weights.
        """
        assert config.clip_model is not None
        device = choose_device(config.device, key="captioning.device")
        source = resolve_model(config.clip_model)
        loaded: Any = CLIPModel.from_pretrained(
            source.location, dtype=choose_dtype("auto", device), output_loading_info=True
        )
        self._model, loading = loaded
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"])[:3])
            raise ValueError(f"captioning.clip_model {config.clip_model!r} is no CLIP: it lacks {missing}")
        self._model.to(device).eval()
        self._processor = AutoProcessor.from_pretrained(source.location)
        self._max_tokens = self._model.config.text_config.max_position_embeddings

    def prepare(self, image: Image.Image) -> Tensor:
        """Return an image as CLIP sees it, [3, height, width]; called from several threads."""
        return self._processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def collect(self) -> "ImageEmbeddings":
        """Return what takes the images of one slice."""
        return ImageEmbeddings(self)

    @torch.inference_mode()
    def embed_images(self, pixels: Sequence[Tensor]) -> Tensor:
        """Return unit embeddings [N, D] on the CPU."""
        return self._unit(self._model.get_image_features(pixel_values=self._on_device(torch.stack(list(pixels)))))

    @torch.inference_mode()
    def scores(self, embeddings: Tensor, captions: Sequence[str]) -> list[float]:
        """Return one cosine per caption, for images embedded as `embeddings` [N, D].

        CLIP reads 77 tokens, begin and end included: of a longer caption the start is scored.
        """
        starts = range(0, len(captions), BATCH_SIZE)
        texts = torch.cat([self._embed_texts(captions[start : start + BATCH_SIZE]) for start in starts])
        return [round(float(value), NUM_DECIMALS) for value in (embeddings * texts).sum(-1)]

    def _embed_texts(self, captions: Sequence[str]) -> Tensor:
        inputs = self._processor.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        device = self._model.device
        return self._unit(
            self._model.get_text_features(
                input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device)
            )
        )

    def _on_device(self, pixels: Tensor) -> Tensor:
        return pixels.to(self._model.device, self._model.dtype)

    @staticmethod
    def _unit(output: Any) -> Tensor:
        return functional.normalize(output.pooler_output.float(), dim=-1).cpu()


class ImageEmbeddings:
    """Collects the images of one slice as they pass, and embeds them a batch at a time."""

    def __init__(self, scorer: ClipScorer) -> None:
        self._scorer = scorer
        self._waiting: list[Tensor] = []
        self._embedded: list[Tensor] = []

    def add(self, pixels: Any) -> None:
        """Take an image that `ClipScorer.prepare` has prepared."""
        self._waiting.append(pixels)
        if len(self._waiting) == BATCH_SIZE:
            self._embed()

    def scores(self, captions: Sequence[str]) -> list[float]:
        """Return the score of each image's caption, in the order of `add`."""
        if self._waiting:
            self._embed()
        return self._scorer.scores(torch.cat(self._embedded), captions) if captions else []

    def _embed(self) -> None:
        self._embedded.append(self._scorer.embed_images(self._waiting))
        self._waiting = []
