"""The score `pixels`: what an image is as a file and as pixels."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa

from curation.scores.protocol import Column, ImageScore, LoadedImage


class Pixels(ImageScore):
    """Sizes of the image as it is shown, after its EXIF turn."""

    name = "pixels"
    version: ClassVar[int] = 1
    columns = (
        Column(name="width", type=pa.int32(), unit="pixels", meaning="Width as shown"),
        Column(name="height", type=pa.int32(), unit="pixels", meaning="Height as shown"),
        Column(name="min_side", type=pa.int32(), unit="pixels", meaning="The shorter of both"),
        Column(name="max_side", type=pa.int32(), unit="pixels", meaning="The longer of both"),
        Column(name="aspect", type=pa.float32(), unit="", meaning="Width / height"),
        Column(name="megapixels", type=pa.float32(), unit="10^6 pixels", meaning="Width x height"),
        Column(name="file_bytes", type=pa.int64(), unit="bytes", meaning="Size of the image's file"),
    )

    def look(self, loaded: LoadedImage) -> Mapping[str, Any]:
        """Return the row of an image."""
        width, height = loaded.image.size
        return {
            "width": width,
            "height": height,
            "min_side": min(width, height),
            "max_side": max(width, height),
            "aspect": width / height,
            "megapixels": width * height / 1e6,
            "file_bytes": len(loaded.data),
        }

    def measure(self, looks: Sequence[Any]) -> Mapping[str, Any]:
        """Return the rows' columns."""
        return {each.name: [look[each.name] for look in looks] for each in self.columns}
