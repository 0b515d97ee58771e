"""CLIP score: the cosine between CLIP's embeddings of an image and of its caption (arXiv 2104.08718, unscaled)."""

# N images, D embedding width

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning.config import CaptioningConfig
from encoders.devices import choose_device, choose_dtype
from encoders.tokens import TextCut
from encoders.vision import ClipTowers
from encoders.weights import resolve_model

# The last digits of a product depend on what it is batched with.
NUM_DECIMALS = 4
BATCH_SIZE = 32


class ClipScorer:
    """A CLIP model of transformers; embeds images as they pass and captions when they are there."""

    def __init__(self, config: CaptioningConfig) -> None:
        """Load `captioning.clip_model`.

        Raises:
            UserError: it is no CLIP, or lacks weights.
        """
        assert config.clip_model is not None
        device = choose_device(config.device, key="captioning.device")
        source, dtype = resolve_model(config.clip_model), choose_dtype("auto", device)
        self._towers = ClipTowers(source, device=device, dtype=dtype, key="captioning.clip_model")

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an image as CLIP sees it, [3, height, width]; called from several threads."""
        return self._towers.prepare(image)

    def collect(self) -> "ImageEmbeddings":
        """Return what takes the images of one slice."""
        return ImageEmbeddings(self)

    @torch.inference_mode()
    def embed_images(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """Return unit embeddings [N, D] on the CPU."""
        return self._towers.features(torch.from_numpy(np.stack(pixels))).cpu()

    def count_cut(self, captions: Sequence[str]) -> TextCut:
        """Count what CLIP does not read of captions, and so what their scores are not about."""
        return self._towers.count_cut(captions)

    @torch.inference_mode()
    def scores(self, embeddings: Tensor, captions: Sequence[str]) -> list[float]:
        """Return one cosine per caption, for images embedded as `embeddings` [N, D].

        CLIP reads 77 tokens, begin and end included: of a longer caption the start is scored.
        """
        starts = range(0, len(captions), BATCH_SIZE)
        texts = torch.cat([self._towers.text_features(captions[start : start + BATCH_SIZE]).cpu() for start in starts])
        return [round(float(value), NUM_DECIMALS) for value in (embeddings * texts).sum(-1)]


class ImageEmbeddings:
    """Collects the images of one slice as they pass, and embeds them a batch at a time."""

    def __init__(self, scorer: ClipScorer) -> None:
        self._scorer = scorer
        self._waiting: list[np.ndarray] = []
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
