"""The scores that CLIP gives: `clip`, embeddings of images, and `clip_score`, how well a text fits its image."""

# B images or texts, D width of embeddings

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.scores.protocol import REJECT, Column, ImageScore, LoadedImage, Reads, TableScore
from encoders.batches import Batches
from encoders.devices import choose_device, choose_dtype, require_device
from encoders.tokens import TextCut
from encoders.weights import ModelSource, fetch_files, read_config, require_model, resolve_model
from errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from encoders.vision import ClipTowers

CLIP_KEY = "columns.clip_model"
EMBEDDING = "clip_embedding"
EMBEDDINGS_FOLDER = "columns/clip"
MAIN_CAPTION, ALT_TEXT = "caption", "alt_text"
NON_FINITE = "non_finite_embedding"
# The last digits of a product depend on what it is batched with.
NUM_DECIMALS = 4
_CLIP_TYPE = "clip"  # of a config.json of transformers
_LOADING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ClipChoice:
    """Which CLIP a recipe's columns are made with, where, and how many images or texts it takes at once."""

    model: str
    revision: str | None
    device: str
    batch_size: int

    @property
    def source(self) -> ModelSource:
        """Where it is; raises as `resolve_model`."""
        return resolve_model(self.model, self.revision)

    def width(self) -> int:
        """Return the width of its embeddings.

        Raises:
            UserError: it is not there, or is no CLIP; names the key.
        """
        config = read_config(self.source)
        if config is None:
            fetch_files(self.source, ["config.json"], key=CLIP_KEY)
            config = read_config(self.source) or {}
        if config.get("model_type") != _CLIP_TYPE:
            raise UserError(f"{CLIP_KEY} = {self.model!r} is a {config.get('model_type')}, not a CLIP")
        return int(config.get("projection_dim", 512))  # transformers' own default, which files may leave out

    def require(self) -> None:
        """Find out that the model or the device is missing before any work starts; raises UserError."""
        require_model(self.source, key=CLIP_KEY)
        require_device(self.device, key="columns.device")
        self.width()

    def towers(self) -> ClipTowers:
        """Load both towers."""
        from encoders.vision import ClipTowers

        device = choose_device(self.device, key="columns.device")
        return ClipTowers(self.source, device=device, dtype=choose_dtype("auto", device), key=CLIP_KEY)


class _Loaded:
    """The towers of a score, loaded with its first image or text; what travels to a worker is the choice alone."""

    def __init__(self, clip: ClipChoice) -> None:
        self._clip = clip
        self._towers: ClipTowers | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_clip": self._clip, "_towers": None}

    @property
    def towers(self) -> ClipTowers:
        with _LOADING:  # threads look at images
            if self._towers is None:
                self._towers = self._clip.towers()
            return self._towers


class Clip(ImageScore):
    """CLIP's embedding of the image, of unit length."""

    name = "clip"
    version: ClassVar[int] = 1
    few_samples: ClassVar[int] = 500

    def __init__(self, clip: ClipChoice) -> None:
        self._clip = clip
        self._loaded = _Loaded(clip)
        self._batches = Batches(clip.batch_size)

    @cached_property
    def columns(self) -> tuple[Column, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One column; its width is the model's."""
        kind = pa.list_(pa.float16(), self._clip.width())
        return (Column(name=EMBEDDING, type=kind, unit="", meaning="CLIP's embedding of the image, of unit length"),)

    def settings(self) -> dict[str, Any]:
        """Return which CLIP it is."""
        return {"clip_model": self._clip.source.identity}

    def require(self) -> None:
        """Find out that the model is missing, or none, before any work starts."""
        self._clip.require()

    def look(self, loaded: LoadedImage) -> np.ndarray:
        """Return the image as CLIP reads it, float32 [3, height, width]."""
        return self._loaded.towers.prepare(loaded.image)

    def measure(self, looks: Sequence[Any]) -> Mapping[str, Any]:
        """Return the embeddings; an image whose embedding is no number is rejected."""
        embeddings = np.stack(list(self._batches.run(looks, self._embed))).astype(np.float16)  # [B, D]
        reasons = [None if np.isfinite(embedding).all() else NON_FINITE for embedding in embeddings]
        arrays = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
        return {EMBEDDING: arrays, REJECT: reasons}

    def _embed(self, looks: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        with torch.inference_mode():
            return list(self._loaded.towers.features(torch.from_numpy(np.stack(looks))).float().cpu().numpy())


class ClipScore(TableScore):
    """The cosine between the embeddings of the image and of one of its texts (arXiv 2104.08718, unscaled).

    CLIP reads 77 tokens, begin and end included: of a longer text the start is scored, and what is cut off is counted.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[Literal["image", "text", "table"]] = "text"
    few_samples: ClassVar[int] = 2_000
    columns = (
        Column(name="clip_score", type=pa.float32(), unit="cosine", meaning="CLIP's of the image and the text"),
        Column(name="clip_tokens", type=pa.int32(), unit="tokens", meaning="Of the text, as this CLIP counts them"),
        Column(name="clip_tokens_cut", type=pa.int32(), unit="tokens", meaning="At its end, which CLIP does not read"),
    )

    def __init__(self, clip: ClipChoice, *, caption_column: str, is_beside: bool = False) -> None:
        """`is_beside`: the texts are a column of `captions/`, and no pass of their own."""
        self.name = "clip_score" if caption_column == MAIN_CAPTION else f"clip_score@{caption_column}"
        is_of_captions = is_beside or caption_column in (MAIN_CAPTION, ALT_TEXT)
        folder = "captions" if is_of_captions else f"captions@{caption_column}"
        column = caption_column if is_of_captions else MAIN_CAPTION
        self.reads = (Reads(folder=EMBEDDINGS_FOLDER, columns=(EMBEDDING,)), Reads(folder=folder, columns=(column,)))
        self._text = f"{folder}.{column}"
        self._clip = clip
        self._loaded = _Loaded(clip)
        self._batches = Batches(clip.batch_size)

    def settings(self) -> dict[str, Any]:
        """Return which CLIP it is."""
        return {"clip_model": self._clip.source.identity}

    def require(self) -> None:
        """Find out that the model is missing, or none, before any work starts."""
        self._clip.require()

    def measure(self, table: pa.Table) -> Mapping[str, Any]:
        """Return the columns; of a sample without this text they are null."""
        texts = table[self._text].to_pylist()
        embeddings = unit_embeddings(table[f"clip.{EMBEDDING}"])
        places = [place for place, text in enumerate(texts) if text is not None]
        found: list[tuple[float, int, int] | None] = [None] * len(texts)
        if places:
            said = [texts[place] for place in places]
            towers = self._loaded.towers
            of_texts = np.stack(list(self._batches.run(said, self._embed)))  # [B, D]
            cosines = (embeddings[places] * of_texts).sum(axis=1)
            lengths = towers.count_tokens(said)
            for place, cosine, length in zip(places, cosines.tolist(), lengths, strict=True):
                found[place] = round(cosine, NUM_DECIMALS), length, max(0, length - towers.max_tokens)
        columns = zip(*[each or (None, None, None) for each in found], strict=True)
        return dict(zip((each.name for each in self.columns), columns, strict=True))

    def details(self, made: pa.Table) -> dict[str, int]:
        """Return, to be summed, how many texts and tokens there are and CLIP does not read."""
        lengths = made["clip_tokens"].drop_null().to_numpy()
        cut = made["clip_tokens_cut"].drop_null().to_numpy()
        counts = {"clip_texts": len(lengths), "clip_texts_cut": int((cut > 0).sum())}
        is_cut = cut > 0
        limit = {"max_clip_tokens": int((lengths - cut)[is_cut][0])} if is_cut.any() else {}
        return counts | limit | {"clip_tokens": int(lengths.sum()), "clip_tokens_cut": int(cut.sum())}

    def say(self, details: Mapping[str, int]) -> str | None:
        """Return how much of the texts the scores are not about."""
        if not details.get("clip_texts_cut"):
            return None
        cut = TextCut(
            max_tokens=details["max_clip_tokens"],
            num_texts=details["clip_texts"],
            num_cut=details["clip_texts_cut"],
            num_tokens=details["clip_tokens"],
            num_tokens_cut=details["clip_tokens_cut"],
        )
        return cut.describe(noun="texts", model="this CLIP")

    def _embed(self, texts: Sequence[str]) -> list[np.ndarray]:
        import torch

        with torch.inference_mode():
            found: Tensor = self._loaded.towers.text_features(texts)
            return list(found.float().cpu().numpy())


def unit_embeddings(column: pa.ChunkedArray) -> np.ndarray:
    """Return embeddings as they are computed with: float32 [B, D], of unit length in that precision."""
    array = column.combine_chunks()
    found = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(array), -1)
    return found / np.linalg.norm(found, axis=1, keepdims=True)
