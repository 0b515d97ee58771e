"""From a raw shard to requests that are ready for the device: reading, decoding and preprocessing run ahead of it."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from captioning.config import CaptioningConfig
from captioning.engines.protocol import CaptionEngine, Request, sample_seed
from captioning.prompts import fill_prompt, template_for
from errors import UserError
from pipelines.raw.images import SampleReject, decode_image
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard

Item = TypeVar("Item")
Result = TypeVar("Result")

# A processor's call costs more than the work on one small image.
PREPARED_TOGETHER = 8
# Groups of prepared images kept ready: about 11 MB each for LLaVA-1.5.
READ_AHEAD_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class LoadedSample:
    """A sample on its way: its row so far, what the engine takes and what CLIP takes; None for a rejected one."""

    row: dict[str, Any]
    prepared: Any | None
    look: Any | None


class SampleLoader:
    """Loads the samples of one open shard; a subclass says what becomes of each.

    Attributes:
        wait_seconds: how long the consumer of `load` has waited for data.
    """

    def __init__(
        self,
        raw: RawShard,
        config: CaptioningConfig,
        *,
        max_pixels: int,
        look: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self._raw = raw
        self._config = config
        self._max_pixels = max_pixels
        # What else is done with each image while it is there.
        self._look = look
        self.wait_seconds = 0.0

    def load(self, samples: Sequence[RawSample]) -> Iterator[LoadedSample]:
        """Yield samples in order, decoded and prepared ahead of the consumer."""
        groups = [samples[start : start + PREPARED_TOGETHER] for start in range(0, len(samples), PREPARED_TOGETHER)]
        ahead = read_ahead(groups, self._load_group, num_threads=self._config.num_decode_threads)
        while True:
            start_seconds = time.monotonic()
            group = next(ahead, None)
            self.wait_seconds += time.monotonic() - start_seconds
            if group is None:
                return
            yield from group

    def text(self, sample: RawSample) -> str | None:
        """Return the text that came with an image, as it is.

        Raises:
            SampleReject: the sample's members are faulty, or its text cannot be read.
        """
        if sample.reject is not None:
            raise SampleReject(sample.reject)
        return self._raw.text(sample)

    def limit_of(self, width: int, height: int) -> str | None:
        """Return the reason why an image of this size (pixels) is rejected, or None."""
        if width * height > self._max_pixels:
            return "too_many_pixels"
        # A processor that scales the short side to 336 pixels would turn a 2 x 5000 line into 280 million pixels.
        if max(width, height) / min(width, height) > self._config.max_aspect_ratio:
            return "too_elongated"
        return None

    def require_limits(self, width: int, height: int) -> None:
        """Raise `SampleReject` for an image of a size (pixels) that `limit_of` has a reason against."""
        if (reason := self.limit_of(width, height)) is not None:
            raise SampleReject(reason, f"{width} x {height}")

    def _load_group(self, samples: Sequence[RawSample]) -> list[LoadedSample]:
        """Return a few samples, loaded together in one of the threads."""
        raise NotImplementedError


class ShardLoader(SampleLoader):
    """Loads samples for an engine, which prepares them."""

    def __init__(
        self,
        raw: RawShard,
        config: CaptioningConfig,
        engine: CaptionEngine,
        *,
        max_pixels: int,
        look: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        super().__init__(raw, config, max_pixels=max_pixels, look=look)
        self._engine = engine
        self._template = template_for(raw.name, config.prompts)

    def request(self, sample: RawSample, alt_text: str | None) -> Request:
        """Return what to ask about a sample.

        Raises:
            SampleReject: the image cannot be used.
        """
        image = decode_image(self._raw.image_bytes(sample), max_pixels=self._max_pixels)
        self.require_limits(*image.size)
        prompt = fill_prompt(
            self._template,
            alt_text,
            default=self._config.prompts["default"],
            max_alt_text_chars=self._config.max_alt_text_chars,
        )
        return Request(image=image, prompt=prompt, seed=sample_seed(self._config.seed, self._raw.name, sample.key))

    def _load_group(self, samples: Sequence[RawSample]) -> list[LoadedSample]:
        opened = [self._open(sample) for sample in samples]
        requests = {index: request for index, (_, request) in enumerate(opened) if request is not None}
        prepared = dict(zip(requests, self._engine.prepare(list(requests.values())), strict=True))
        for index in [index for index, result in prepared.items() if result is None]:
            # An alt text of the longest kind, in a script that takes a token per byte: the image is asked without it.
            requests[index] = replace(requests[index], prompt=self._config.prompts["default"])
            prepared[index] = self._engine.prepare([requests[index]])[0]
            if prepared[index] is None:
                raise UserError(
                    f"captioning.max_new_tokens {self._config.max_new_tokens} and the default prompt do not fit the "
                    f"model's context with {self._raw.name}/{samples[index].key}"
                )
        for index, request in requests.items():
            opened[index][0]["prompt"] = request.prompt
        looks = {index: self._look(request.image) for index, request in requests.items()} if self._look else {}
        return [
            LoadedSample(row=row, prepared=prepared.get(index), look=looks.get(index))
            for index, (row, _) in enumerate(opened)
        ]

    def _open(self, sample: RawSample) -> tuple[dict[str, Any], Request | None]:
        row = {"key": sample.key, "shard": self._raw.name, "flags": [], "reject": None}
        try:
            row["alt_text"] = self.text(sample)
            request = self.request(sample, row["alt_text"])
        except SampleReject as reject:
            return {**row, "reject": reject.reason}, None
        return {**row, "width": request.image.width, "height": request.image.height}, request


def read_ahead(items: Iterable[Item], function: Callable[[Item], Result], *, num_threads: int) -> Iterator[Result]:
    """Yield `function(item)` in order, computed by threads at most `READ_AHEAD_GROUPS` items ahead."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    window: deque[Future[Result]] = deque()
    try:
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > READ_AHEAD_GROUPS:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
