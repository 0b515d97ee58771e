"""How much memory drawing takes, by part and by what is done at the time: reckoned by shapes, without any weights.

What draws is run on tensors without values, of the largest batch, so that what is counted is what the code holds. Not
counted are the workspace of kernels, gaps between what the allocator hands out, and what a GPU's driver takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from encoders.latents import DiffusersCodec, LatentCodec
from encoders.living_bytes import LivingBytes, fused_attention, storage_bytes
from encoders.opening import blank_codec, blank_text_encoder
from encoders.text import DEFAULT_BATCH_TOKENS, pack
from encoders.vae_precision import PROBE_SIZE
from pixart.control import Control
from pixart.dit import DiT
from pixart.drawing.graphs import MAX_SHAPES, pays_to_capture
from pixart.model import PixArt
from sampling.compiled_shapes import batches, frequent_shapes
from sampling.config import SamplingConfig
from sampling.renderer import MAX_DECODED_PIXELS, Renderer, fits_whole, round_blocks
from sampling.requests import ImageRequest
from sampling.text_encoding import text_id
from sampling.trained_model import TrainedModel
from sampling.worker import TEXTS_AHEAD

META = torch.device("meta")
# Of a solver's: enough for all that it keeps of former steps.
NUM_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What the device holds while one thing is done.

    Attributes:
        name: of what is done, one of the names below.
        parts: bytes by what they are for.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


READING, TESTING, DENOISING, DECODING = "reading prompts", "testing the VAE's dtype", "denoising", "decoding"
LEADING = "encoding control images"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What drawing takes on a GPU that has `room_bytes` for it, or of a CPU's memory (None).

    Attributes:
        config: in which no dtype is left to the machine.
        requests: in the order of work.
        known: what has been reckoned, by what it depends on; those with other settings share it.
    """

    config: SamplingConfig
    trained: TrainedModel
    requests: Sequence[ImageRequest]
    room_bytes: int | None
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False)

    def moments(self) -> list[Moment]:
        """Return what is held at each of the things that are done one after another."""
        config = self.config
        batch = max(batches(config, self.requests), key=_size_of)
        height, width = batch[0].height, batch[0].width
        transformer, denoising, left = self._denoising(batch)
        loaded = {self._transformer: transformer, "VAE": self._codec_bytes(config.vae_dtype)}
        shapes = self._captured_shapes()
        # Graphs keep the memory of a pass, each shape its own.
        captured = {"captured passes": min(len(shapes), MAX_SHAPES) * denoising} if shapes else {}
        others = sum(loaded.values()) + sum(captured.values()) + left
        shape = (min(len(batch), max(1, MAX_DECODED_PIXELS // (height * width))), height, width)
        is_tiled = self._is_tiled(shape, free_bytes=(self.room_bytes or 0) - others)
        decoding = left + self._decoding(config.vae_dtype, shape, is_tiled=is_tiled)
        is_captured = (len(batch), height, width) in shapes
        passing = captured if is_captured else captured | {f"{len(batch)} of {width}x{height} at once": denoising}
        return [
            *self._reading(loaded),
            *self._testing(loaded),
            *self._leading(loaded | captured),
            Moment(name=DENOISING, parts=loaded | passing),
            Moment(name=DECODING, parts=loaded | captured | {"by tiles" if is_tiled else "whole": decoding}),
        ]

    def _captured_shapes(self) -> set[tuple[int, int, int]]:
        """Return (images, height, width) of the batches whose passes are captured in graphs."""
        if self.room_bytes is None or self.config.compile is False:
            return set()
        factor = self.codec(self.config.vae_dtype).spec.factor
        return {
            (number, height, width)
            for number, height, width in frequent_shapes(self.config, self.requests)
            if pays_to_capture(number, height // factor, width // factor)
        }

    @property
    def _transformer(self) -> str:
        return "transformer" if self.trained.branch is None else "transformer and control branch"

    def codec(self, dtype: str) -> DiffusersCodec:
        """Return the VAE without values; of one that is to be tested the one that takes more."""
        vae, key = self.trained.vae, f"VAE of {self.trained.name}"
        return blank_codec(vae["model"], vae["revision"], dtype="float32" if dtype == "tested" else dtype, key=key)

    def _once(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]

    def _denoising(self, batch: Sequence[ImageRequest]) -> tuple[int, int, int]:
        """Return the bytes of the transformer, the most that denoising takes beside it, and what is left of that."""
        key = ("denoising", self.config.weight_dtype, len(batch), batch[0].height, batch[0].width)
        return self._once(key, lambda: _BlankRenderer(self).peaks(batch))

    def _codec_bytes(self, dtype: str) -> int:
        return self._once(("VAE", dtype), lambda: storage_bytes(self.codec(dtype).model.parameters()))

    def _decoding(self, dtype: str, shape: tuple[int, int, int], *, is_tiled: bool) -> int:
        """Return what decoding so many images of a height and width at once takes beside weights and latents."""

        def compute() -> int:
            codec, (number, height, width) = self.codec(dtype), shape
            sides = height // codec.spec.factor, width // codec.spec.factor
            return codec.decoding_bytes((number, codec.spec.channels, *sides), is_tiled=is_tiled)

        return self._once(("decoding", dtype, *shape, is_tiled), compute)

    def _is_tiled(self, shape: tuple[int, int, int], *, free_bytes: int) -> bool:
        if self.config.vae_tiles != "auto":
            return self.config.vae_tiles
        if self.room_bytes is None or not self.codec(self.config.vae_dtype).can_tile:
            return False
        return not fits_whole(self._decoding(self.config.vae_dtype, shape, is_tiled=False), free_bytes=free_bytes)

    def _reading(self, loaded: Mapping[str, int]) -> list[Moment]:
        """Return what is held while prompts are encoded, if that is done on the device that draws."""
        config, text = self.config, self.trained.text
        is_elsewhere = config.text_encoder == "cpu" and self.room_bytes is not None
        if text is None or config.text_encoder == "precomputed" or is_elsewhere:
            return []
        batch_tokens = DEFAULT_BATCH_TOKENS["cpu" if self.room_bytes is None else "cuda"]
        number = len({config.negative_prompt, *(request.prompt for request in self.requests[:TEXTS_AHEAD])})
        number = min(number, max(1, batch_tokens // text["max_tokens"]))
        weights, reading = self._once(("reading", config.text_encoder, number), lambda: self._encoder_bytes(number))
        parts = {"text encoder": weights, f"{number} prompts at once": reading}
        if len(self.requests) > TEXTS_AHEAD:
            parts.update(loaded)  # beyond the first, prompts are encoded when transformer and VAE are there
        return [Moment(name=READING, parts=parts)]

    def _encoder_bytes(self, num_prompts: int) -> tuple[int, int]:
        """Return the bytes of the text encoder, and of what encoding so many prompts of the most tokens takes."""
        config, text = self.config, self.trained.text
        assert text is not None
        encoder = blank_text_encoder(
            text["model"],
            text["revision"],
            dtype=config.text_dtype,
            is_8bit=config.text_encoder == "8bit",
            key="text encoder",
        )
        prompts = pack([[1] * text["max_tokens"]] * num_prompts, META, length_step=encoder.length_step)
        weights = list(encoder.model.parameters())
        meter = LivingBytes(device="meta")
        with torch.inference_mode(), fused_attention(), meter.watching(ignored=weights):
            encoder.hidden_states(prompts)
        return storage_bytes(weights), meter.peak_bytes

    def _testing(self, loaded: Mapping[str, int]) -> list[Moment]:
        """Return what is held while a test picture says in which dtype the VAE decodes: there are two of it then."""
        if self.config.vae_dtype != "tested":
            return []
        side = PROBE_SIZE * self.codec("float32").spec.factor
        parts = {
            self._transformer: loaded[self._transformer],
            "VAE twice": self._codec_bytes("float32") + self._codec_bytes("bfloat16"),
            "test picture": self._decoding("float32", (1, side, side), is_tiled=False),
        }
        return [Moment(name=TESTING, parts=parts)]

    def _leading(self, loaded: Mapping[str, int]) -> list[Moment]:
        """Return what is held while the largest control image is encoded, if any leads what is drawn."""
        led = [item for item in self.requests if item.control is not None]
        if not led:
            return []
        largest = max(led, key=lambda item: item.height * item.width)
        height, width, dtype = largest.height, largest.width, self.config.vae_dtype
        encoding = self._once(("encoding", dtype, height, width), lambda: self._encoding(dtype, height, width))
        return [Moment(name=LEADING, parts=dict(loaded) | {f"one of {width}x{height}": encoding})]

    def _encoding(self, dtype: str, height: int, width: int) -> int:
        """Return what encoding an image of a height and width takes beside the weights."""
        codec = self.codec(dtype)
        image = torch.empty(1, 3, height, width, dtype=codec.model.dtype, device=META)
        meter = LivingBytes(device="meta")
        with torch.inference_mode(), fused_attention(), meter.watching(ignored=list(codec.model.parameters())):
            codec.moments(image)
        return meter.peak_bytes


def _size_of(batch: Sequence[ImageRequest]) -> tuple[int, bool]:
    """Return what tells the largest of batches: pixels, and of as many whether a branch is computed, too."""
    return len(batch) * batch[0].height * batch[0].width, batch[0].control is not None


class _BlankRenderer(Renderer):
    """A renderer whose models have shapes and no values."""

    def __init__(self, footprint: Footprint) -> None:
        self._footprint = footprint
        config = footprint.config
        few = {"num_steps": min(config.num_steps, NUM_STEPS), "times": None, "vae_tiles": False}
        super().__init__(config.model_copy(update=few), footprint.trained)

    def _choose_device(self) -> torch.device:
        return META

    def _load_model(self, dtype: torch.dtype) -> PixArt | DiT:
        return round_blocks(self.trained.blank(), self.config, device=META, dtype=dtype)

    def _open_codec(self) -> tuple[LatentCodec, str]:
        return self._footprint.codec(self.config.vae_dtype), self.config.vae_dtype

    def _lead(self, requests: Sequence[ImageRequest]) -> Control:
        spec = self.codec.spec
        sides = (requests[0].height // spec.factor, requests[0].width // spec.factor)
        return Control(torch.zeros(len(requests), spec.channels, *sides, device=META))

    def peaks(self, requests: Sequence[ImageRequest]) -> tuple[int, int, int]:
        """Return the bytes of the transformer, the most that denoising a batch takes beside it, and what is left."""
        texts = {}
        if isinstance(self.model, PixArt):
            assert self.trained.text is not None
            # On the CPU, as embeddings are.
            embedding = torch.zeros(self.trained.text["max_tokens"], self.model.config.caption_channels)
            names = [self.config.negative_prompt, *(text_id(request, self.config) for request in requests)]
            texts = dict.fromkeys(names, embedding)
        meter, passes, left = LivingBytes(device="meta"), [], []

        def after_step(_: int) -> None:
            passes.append(meter.restart())
            left.append(meter.peak_bytes)

        weights = list(self.model.parameters())
        with fused_attention(), meter.watching(ignored=weights):
            self.draw(requests, texts, on_step=after_step)
        return storage_bytes(weights), max(passes), left[-1]
