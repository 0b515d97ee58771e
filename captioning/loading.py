"""From a raw shard to requests that are ready for the device: reading, decoding and preprocessing run ahead of it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from captioning.config import CaptioningConfig
from captioning.engine import CaptionEngine, PromptTooLongError, Request, sample_seed
from captioning.prompts import fill_prompt, template_for
from pipelines.images import SampleReject, decode_image
from pipelines.shards import RawSample, RawShard

Item = TypeVar("Item")
Result = TypeVar("Result")

# Prepared images kept ready: about 1.4 MB each for LLaVA-1.5.
READ_AHEAD_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class LoadedSample:
    """A sample on its way: its row so far, and what the engine takes; `prepared` is None for a rejected one."""

    row: dict[str, Any]
    prepared: Any | None


class ShardLoader:
    """Loads the samples of one open shard.

    Attributes:
        wait_seconds: how long the consumer of `load` has waited for data.
    """

    def __init__(self, raw: RawShard, config: CaptioningConfig, engine: CaptionEngine, *, max_pixels: int) -> None:
        self._raw = raw
        self._config = config
        self._engine = engine
        self._max_pixels = max_pixels
        self._template = template_for(raw.name, raw.dialect, config.prompts)
        # Threads share the shard's file and its position.
        self._lock = threading.Lock()
        self.wait_seconds = 0.0

    def load(self, samples: Sequence[RawSample]) -> Iterator[LoadedSample]:
        """Yield samples in order, decoded and prepared ahead of the consumer."""
        ahead = read_ahead(samples, self._load_one, num_threads=self._config.num_decode_threads)
        while True:
            start_seconds = time.monotonic()
            loaded = next(ahead, None)
            self.wait_seconds += time.monotonic() - start_seconds
            if loaded is None:
                return
            yield loaded

    def alt_text(self, sample: RawSample) -> str | None:
        """Return the text that came with an image, as it is.

        Raises:
            SampleReject: the sample's members are faulty, or its text cannot be read.
        """
        if sample.reject is not None:
            raise SampleReject(sample.reject)
        try:
            with self._lock:
                return self._raw.alt_text(sample)
        except ValueError as error:
            raise SampleReject("corrupt_alt_text", str(error)) from None

    def request(self, sample: RawSample, alt_text: str | None) -> Request:
        """Return what to ask about a sample.

        Raises:
            SampleReject: the image cannot be used.
        """
        with self._lock:
            data = self._raw.image_bytes(sample)
        image = decode_image(data, max_pixels=self._max_pixels)
        _require_shape(image, self._config.max_aspect_ratio)
        prompt = fill_prompt(
            self._template,
            alt_text,
            default=self._config.prompts["default"],
            max_alt_text_chars=self._config.max_alt_text_chars,
        )
        return Request(image=image, prompt=prompt, seed=sample_seed(self._config.seed, self._raw.name, sample.key))

    def _load_one(self, sample: RawSample) -> LoadedSample:
        row = {"key": sample.key, "shard": self._raw.name, "flags": [], "reject": None}
        try:
            row["alt_text"] = self.alt_text(sample)
            request = self.request(sample, row["alt_text"])
        except SampleReject as reject:
            return LoadedSample(row={**row, "reject": reject.reason}, prepared=None)
        try:
            prepared = self._engine.prepare(request)
        except PromptTooLongError:
            # An alt text of the longest kind, in a script that takes a token per byte: the image is asked without it.
            request = replace(request, prompt=self._config.prompts["default"])
            prepared = self._engine.prepare(request)
        size = {"width": request.image.width, "height": request.image.height}
        return LoadedSample(row={**row, **size, "prompt": request.prompt}, prepared=prepared)


def _require_shape(image: Image.Image, max_aspect_ratio: float) -> None:
    # A processor that scales the short side to 336 pixels would turn a 2 x 5000 line into 280 million pixels.
    ratio = max(image.size) / min(image.size)
    if ratio > max_aspect_ratio:
        raise SampleReject("too_elongated", f"{image.width} x {image.height}")


def read_ahead(items: Iterable[Item], function: Callable[[Item], Result], *, num_threads: int) -> Iterator[Result]:
    """Yield `function(item)` in order, computed by threads at most `READ_AHEAD_SAMPLES` items ahead."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    window: deque[Future[Result]] = deque()
    try:
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > READ_AHEAD_SAMPLES:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
