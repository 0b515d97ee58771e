"""`caption_7b`: continuous batching against `model.generate` with a model of LLaVA-1.5-7B's shape.

Random weights in bfloat16, prepared images and prompts on both sides, caption lengths drawn around 96 tokens and forced
on both sides: ours ends a row at its length, `generate` keeps a batch until its longest caption ends. Steps of decoding
alone are held against the time that the memory takes for the bytes they must move: the text model's weights and the
keys and values of all rows, once each.
"""

# B rows, L prompt tokens

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.gpu.parts import Figures, Size
from captioning.engines.decoding import ContinuousDecoder
from captioning.engines.llama import LlamaForward
from captioning.engines.room import slot_bytes
from captioning.engines.rows import DecodingSettings, TokenizedPrompt

SEED = 7
IMAGE_TOKEN = 3
# Bytes/s of the data sheets; of other devices a large copy is measured.
BANDWIDTHS = {"H200": 4.8e12, "H100 80GB HBM3": 3.35e12, "H100 SXM": 3.35e12}
NUM_DISTINCT_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaVA of a given size; `num_prompt_tokens` without the image's.

    `num_images` are captioned with each number of slots, `generated` images at once by each call of `generate`.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    num_prompt_tokens: int
    mean_tokens: float
    num_images: dict[int, int]
    generated: tuple[int, ...]
    num_timed_steps: int


TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
LLAVA_7B = Shape(
    text=dict(zip(TEXT, (32_064, 4096, 11_008, 32, 32), strict=True)),
    vision=dict(zip(VISION, (1024, 4096, 24, 16, 336, 14), strict=True)),
    num_prompt_tokens=40,
    mean_tokens=96.0,
    # Half of the images for 32 slots: the part has a minute.
    num_images={96: 384, 32: 192},
    generated=(32, 96),
    num_timed_steps=24,
)
TINY = Shape(
    text=dict(zip(TEXT, (64, 32, 48, 2, 4), strict=True)),
    vision=dict(zip(VISION, (16, 24, 2, 2, 16, 4), strict=True)),
    num_prompt_tokens=6,
    mean_tokens=12.0,
    num_images={96: 112, 32: 40},
    generated=(32, 96),
    num_timed_steps=3,
)


def caption_7b(size: Size) -> Figures:
    """Captions/s with each number of slots and by `generate`, and decoding's share of the memory bandwidth."""
    shape = TINY if size.is_tiny else LLAVA_7B
    if size.is_tiny:
        # Threads of a busy machine wait for each other longer than tensors of this size take.
        torch.set_num_threads(1)
    model = build_model(shape, device=size.device, dtype=torch.float32 if size.is_tiny else torch.bfloat16)
    prompts, lengths = make_prompts(shape)
    bandwidth = memory_bandwidth(size.device)
    figures: Figures = {"caption_7b_bandwidth_terabytes": round(bandwidth / 1e12, 2)}
    forward = LlamaForward(model)
    captions: list[list[int]] = []
    rates, generated_rates = [], []
    for num_slots, num_images in shape.num_images.items():
        decoder = ForcedDecoder(forward, num_slots=num_slots, longest=max(lengths) + 8 + shape.num_timed_steps)
        row = _time_ours(decoder, prompts[:num_images], lengths[:num_images], shape, bandwidth=bandwidth)
        captions = captions or row.captions
        rates.append(num_images / row.seconds)
        figures |= {f"caption_7b_{name}_{num_slots}": value for name, value in row.figures.items()}
        size.keep(figures)
        del decoder
        _forget(size.device)
    for batch_size in shape.generated:
        rate, theirs = _time_generate(model, prompts[:batch_size], lengths[:batch_size])
        if rate is not None:
            generated_rates.append(rate)
            figures["caption_7b_ratio"] = round(max(rates) / max(generated_rates), 2)
            figures["caption_7b_identical"] = theirs == captions[:batch_size]
        figures[f"caption_7b_generate_captions_per_second_{batch_size}"] = None if rate is None else round(rate, 2)
        size.keep(figures)
        _forget(size.device)
    return figures


class ForcedDecoder(ContinuousDecoder):
    """Ends each caption at its given length, and not before."""

    def __init__(self, forward: LlamaForward, *, num_slots: int, longest: int) -> None:
        super().__init__(
            forward,
            DecodingSettings(num_slots=num_slots, max_new_tokens=longest, temperature=0.0, end_token_ids=frozenset()),
        )
        self.lengths: Sequence[int] = []

    def _limit(self, index: int) -> int:
        return self.lengths[index]

    @torch.inference_mode()
    def time_steps(self, prompts: Sequence[TokenizedPrompt], *, num_steps: int) -> tuple[float, float]:
        """Fill all slots and decode; returns seconds of a step and tokens that it reads, of all rows.

        As many steps go before, in which graphs are captured.
        """
        num_slots, device = self._settings.num_slots, self._device.type
        self.lengths = [self._settings.max_new_tokens] * num_slots
        self._rows, self._results = [], []
        self._states.start(penalty=1.0)
        self._fill(iter(prompts[:num_slots]))
        assert len(self._rows) == num_slots
        for _ in range(4):
            self._launch()
        _synchronise(device)
        start = time.perf_counter()
        before = sum(row.length for row in self._rows)
        for _ in range(num_steps):
            self._launch()
        _synchronise(device)
        seconds = (time.perf_counter() - start) / num_steps
        # The tokens cached before a step, and the one that it appends.
        return seconds, before + num_slots * (num_steps + 1) / 2


@dataclass(frozen=True, kw_only=True)
class _Timed:
    captions: list[list[int]]
    seconds: float
    figures: Figures


def _time_ours(
    decoder: ForcedDecoder,
    prompts: Sequence[TokenizedPrompt],
    lengths: Sequence[int],
    shape: Shape,
    *,
    bandwidth: float,
) -> _Timed:
    """Time steps with all slots in use, then all captions; the first also loads and compiles what both need."""
    device, model = decoder._device.type, decoder._forward.model
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_seconds, num_tokens = decoder.time_steps(prompts, num_steps=shape.num_timed_steps)
    step_bytes = text_bytes(model) + num_tokens * slot_bytes(model, num_tokens=64) / 64
    # Rows that end one after the other: every number of rows that a graph is captured for.
    num_slots = decoder._settings.num_slots
    slots = range(num_slots)
    decoder.lengths = [2 + 16 * slot // num_slots + 4 * max(0, slot - num_slots + 8) for slot in slots]
    decoder.decode(prompts[:num_slots])
    decoder.lengths = lengths
    _synchronise(device)
    start = time.perf_counter()
    captions = [continuation.token_ids for continuation in decoder.decode(prompts)]
    _synchronise(device)
    seconds = time.perf_counter() - start
    assert [len(caption) for caption in captions] == list(lengths), "lengths are forced"
    figures: Figures = {
        "captions_per_second": round(len(prompts) / seconds, 2),
        "tokens_per_second": round(sum(lengths) / seconds, 1),
        "step_milliseconds": round(1e3 * step_seconds, 2),
        "step_gigabytes": round(step_bytes / 1e9, 2),
        "share_of_bandwidth": round(step_bytes / step_seconds / bandwidth, 3),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device == "cuda" else None,
    }
    return _Timed(captions=captions, seconds=seconds, figures=figures)


def _time_generate(
    model: Any, prompts: Sequence[TokenizedPrompt], lengths: Sequence[int]
) -> tuple[float | None, list[list[int]]]:
    """Caption one batch with `model.generate`; returns captions/s, or None if it does not fit, and the new tokens."""
    device = model.device.type
    input_ids = torch.stack([prompt.input_ids for prompt in prompts])
    pixels = torch.cat([prompt.image_inputs["pixel_values"] for prompt in prompts])

    def caption(num_rows: int, num_tokens: int) -> list[list[int]]:
        asked = input_ids[:num_rows].to(model.device)
        output = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            pixel_values=pixels[:num_rows].to(model.device, model.dtype),
            do_sample=False,
            max_new_tokens=num_tokens,
        )
        return output[:, asked.shape[1] :].tolist()

    try:
        with torch.inference_mode():
            caption(2, 3)
            _synchronise(device)
            start = time.perf_counter()
            captions = caption(len(prompts), max(lengths))
            seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        return None, []
    captions = [tokens[:length] for tokens, length in zip(captions, lengths, strict=True)]
    return len(prompts) / seconds, captions


def build_model(shape: Shape, *, device: str, dtype: torch.dtype) -> Any:
    """Return a LLaVA with random weights, made on the device; it knows no end token."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            **shape.text, max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=0
        ),
        vision_config=CLIPVisionConfig(**shape.vision),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def make_prompts(shape: Shape) -> tuple[list[TokenizedPrompt], list[int]]:
    """Return prepared prompts, and how many tokens each caption gets: log-normal, as the lengths of captions are."""
    generator = torch.Generator().manual_seed(SEED)
    side, patch = shape.vision["image_size"], shape.vision["patch_size"]
    images = torch.randn(NUM_DISTINCT_IMAGES, 1, 3, side, side, generator=generator)
    num_images = max(shape.num_images.values())
    begin, image = torch.tensor([1]), torch.full(((side // patch) ** 2,), IMAGE_TOKEN)
    prompts = []
    for number in range(num_images):
        text = torch.randint(4, shape.text["vocab_size"], (shape.num_prompt_tokens,), generator=generator)
        pixels = {"pixel_values": images[number % NUM_DISTINCT_IMAGES]}
        prompts.append(TokenizedPrompt(input_ids=torch.cat([begin, image, text]), image_inputs=pixels, seed=number))
    spread = 0.4
    drawn = torch.randn(num_images, generator=generator).mul(spread).sub(spread**2 / 2).exp() * shape.mean_tokens
    return prompts, drawn.clamp(2, 3 * shape.mean_tokens).int().tolist()


def text_bytes(model: Any) -> int:
    """Return the bytes of the text model that a step reads: its layers and the projection to logits."""
    layers = sum(parameter.nbytes for parameter in model.model.language_model.layers.parameters())
    return layers + model.lm_head.weight.nbytes


def memory_bandwidth(device: str) -> float:
    """Return bytes/s of the device's memory by its data sheet, or of a large copy, read and write counted."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for known, bandwidth in BANDWIDTHS.items():
            if known in name:
                return bandwidth
    source = torch.zeros(2**30 if device == "cuda" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        _synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _forget(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
