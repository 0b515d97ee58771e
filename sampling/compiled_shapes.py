"""`sampling.compile`: which batches of a job are drawn by compiled passes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from pixart.compilation import pays_to_compile, require_compiler
from sampling.config import SamplingConfig
from sampling.requests import ImageRequest

# A compilation takes 15 to 25 seconds.
MIN_IMAGES = 8
# Of the VAE's decoder about as long, for some hundredths of a second a megapixel.
MIN_DECODED_PIXELS = 1_000_000_000


def compiled_shapes(config: SamplingConfig, requests: Sequence[ImageRequest]) -> set[tuple[int, int, int]]:
    """Return (images, height, width) of the batches that are worth compiling for, of all requests of a job.

    It does not depend on which images are missing: an image drawn after a kill is the one that would have been.

    Raises:
        UserError: the recipe insists on compiling, and there is no compiler.
    """
    if config.compile is True:
        require_compiler(key="sampling.compile")
    elif config.compile is False or config.device == "cpu" or not pays_to_compile():
        return set()
    return frequent_shapes(config, requests)


def frequent_shapes(config: SamplingConfig, requests: Sequence[ImageRequest]) -> set[tuple[int, int, int]]:
    """Return (images, height, width) of the batches that are worth compiling for where compiling pays."""
    num_images: Counter[tuple[int, int, int]] = Counter()
    for batch in batches(config, requests):
        num_images[len(batch), batch[0].height, batch[0].width] += len(batch)
    return {shape for shape, number in num_images.items() if config.compile is True or number >= MIN_IMAGES}


def batches(config: SamplingConfig, requests: Sequence[ImageRequest]) -> Iterator[list[ImageRequest]]:
    """Yield the batches of a job, whose requests are in the order of work."""
    for start in range(0, len(requests), config.batch_size):
        batch = requests[start : start + config.batch_size]
        for _, group in groupby(batch, key=lambda item: item.shape):
            yield list(group)


def compiles_decoder(config: SamplingConfig, requests: Sequence[ImageRequest]) -> bool:
    """Whether a job is long enough to compile the VAE's decoder as well, where batches are compiled at all."""
    return config.compile is True or sum(item.height * item.width for item in requests) >= MIN_DECODED_PIXELS
