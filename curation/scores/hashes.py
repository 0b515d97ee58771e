"""The score `hashes`: what exact and near duplicates of an image are found by, see `curation.hashing`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.hashing import (
    EXACT_BYTES,
    HASHING_VERSION,
    THUMBNAIL_BYTES,
    exact_hash,
    perceptual_hashes,
    thumbnail,
)
from curation.scores.protocol import Column, ImageScore, LoadedImage


class Hashes(ImageScore):
    """The hash of the file, a small thumbnail, and the perceptual hash that follows from it."""

    name = "hashes"
    version: ClassVar[int] = HASHING_VERSION
    columns = (
        Column(name="exact_hash", type=pa.binary(EXACT_BYTES), unit="", meaning="BLAKE2b of the image's file"),
        Column(
            name="perceptual_hash",
            type=pa.uint64(),
            unit="bits",
            meaning="Which of the lowest frequencies of luma (40) and of chroma (12 each) exceed a small bar",
        ),
        Column(
            name="thumbnail",
            type=pa.binary(THUMBNAIL_BYTES),
            unit="",
            meaning="Area means of the image as shown: 24 x 24 luma, 12 x 12 Cb, 12 x 12 Cr, bytes (BT.601)",
        ),
    )

    def look(self, loaded: LoadedImage) -> Any:
        """Return the exact hash of an image and its thumbnail."""
        return exact_hash(loaded.data), thumbnail(loaded.pixels)

    def measure(self, looks: Sequence[Any]) -> Mapping[str, Any]:
        """Return the rows' columns."""
        thumbnails = np.stack([small for _, small in looks])
        return {
            "exact_hash": [exact for exact, _ in looks],
            "perceptual_hash": perceptual_hashes(thumbnails),
            "thumbnail": [small.tobytes() for small in thumbnails],
        }
