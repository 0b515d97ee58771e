"""How large the image of a sample is, from its header."""

from pipelines.raw.images import SampleReject, image_size
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard

# JPEGs have thumbnails and colour profiles in front of their size; what needs more is read whole.
HEADER_BYTES = 64 * 1024


def measure_image(raw: RawShard, sample: RawSample, *, max_pixels: int) -> tuple[int, int]:
    """Return width and height of a sample's image as `image_size` does, from as few bytes as may be.

    Raises:
        SampleReject: as `image_size` and `RawShard.image_bytes`.
    """
    start = raw.image_start(sample, HEADER_BYTES)
    if len(start) == HEADER_BYTES:
        try:
            return image_size(start, max_pixels=max_pixels)
        except SampleReject as reject:
            if reject.reason not in ("corrupt_image", "not_an_image"):
                raise
    return image_size(raw.image_bytes(sample), max_pixels=max_pixels)
