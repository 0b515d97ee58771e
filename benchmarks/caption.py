"""`make bench-caption`: continuous batching against `model.generate` over fixed batches in arrival order.

The same model, images, prompts, batch width, precision and threads on both sides, preprocessing included; half of the
prompts carry an alt text. Captions end where the model ends them, so their lengths vary as they do in use. The greedy
captions are compared.

Where torch sees a GPU, a model of LLaVA-1.5-7B's shape follows: random weights in bfloat16, caption lengths drawn
around 100 tokens and forced on both sides, prompts prepared beforehand. Tokens/s are also given as a share of what the
device's memory bandwidth allows.
"""

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
)

from captioning.config import CaptioningConfig
from captioning.engines.decoding import ContinuousDecoder, DecodingSettings, TokenizedPrompt
from captioning.engines.llama import LlamaForward
from captioning.engines.protocol import Request
from captioning.engines.transformers_engine import TransformersEngine
from captioning.loading import PREPARED_TOGETHER, read_ahead
from captioning.prompts import fill_prompt
from toyworld.render import render
from toyworld.scenes import random_scene
from toyworld.wording import alt_text

RESULT = Path(__file__).parent / "results" / "caption.json"
SEED = 7
SIDE_PIXELS = 96


def make_requests(count: int, config: CaptioningConfig) -> list[Request]:
    """Images of generated scenes; the first half as from a LAION shard, alt text in the prompt, then as from SAM."""
    rng = np.random.default_rng(SEED)
    requests = []
    for number in range(count):
        scene = random_scene(rng)
        image = render(scene, SIDE_PIXELS, SIDE_PIXELS, rng=rng)
        template = config.prompts["img2dataset" if number < count // 2 else "default"]
        prompt = fill_prompt(template, alt_text(scene, rng), default=config.prompts["default"], max_alt_text_chars=300)
        requests.append(Request(image=image, prompt=prompt, seed=number))
    return requests


def caption_with_generate(
    engine: TransformersEngine, requests: Sequence[Request], config: CaptioningConfig
) -> list[str]:
    """What captioning scripts do: fixed batches in arrival order, each as slow as its longest caption."""
    processor, texts = engine.processor, []
    for start in range(0, len(requests), config.batch_size):
        batch = requests[start : start + config.batch_size]
        messages = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.prompt}]}]
            for request in batch
        ]
        prompts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
        images = [request.image for request in batch]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(engine.model.device, engine.model.dtype)
        with torch.inference_mode():
            output = engine.model.generate(**inputs, do_sample=False, max_new_tokens=config.max_new_tokens)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return texts


def caption_with_engine(engine: TransformersEngine, requests: Sequence[Request], config: CaptioningConfig) -> list[str]:
    """What `python -m captioning` does once an image is decoded."""
    groups = [requests[start : start + PREPARED_TOGETHER] for start in range(0, len(requests), PREPARED_TOGETHER)]
    ahead = read_ahead(groups, engine.prepare, num_threads=config.num_decode_threads)
    prompts = (prompt for prompt in itertools.chain.from_iterable(ahead) if prompt is not None)
    return [caption.text for caption in engine.caption(prompts)]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The fastest round: wall seconds, and CPU seconds of this process, which a busy machine stretches less."""

    wall_seconds: float
    cpu_seconds: float


def fastest(functions: Sequence[Callable[[], object]], *, num_rounds: int) -> list[Timing]:
    """Time each function in turns, so that a busy machine slows all alike."""
    wall: list[list[float]] = [[] for _ in functions]
    cpu: list[list[float]] = [[] for _ in functions]
    for _ in range(num_rounds):
        for number, function in enumerate(functions):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            function()
            wall[number].append(time.perf_counter() - wall_start)
            cpu[number].append(time.process_time() - cpu_start)
    return [Timing(wall_seconds=min(a), cpu_seconds=min(b)) for a, b in zip(wall, cpu, strict=True)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Caption the same requests both ways; gives the figures of the last line."""
    table = {
        "model": options.model,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "device": "cpu",
    }
    config = CaptioningConfig.model_validate(table)
    engine = TransformersEngine(config, num_threads=options.threads)
    requests = make_requests(options.images, config)
    ours, theirs = caption_with_engine(engine, requests, config), caption_with_generate(engine, requests, config)
    our_timing, generate_timing = fastest(
        [
            lambda: caption_with_engine(engine, requests, config),
            lambda: caption_with_generate(engine, requests, config),
        ],
        num_rounds=options.rounds,
    )
    return {
        "ratio_generate": round(generate_timing.wall_seconds / our_timing.wall_seconds, 2),
        "ratio_generate_cpu_seconds": round(generate_timing.cpu_seconds / our_timing.cpu_seconds, 2),
        "identical": ours == theirs,
        "num_different": sum(our != other for our, other in zip(ours, theirs, strict=True)),
        "captions_per_second": round(len(requests) / our_timing.wall_seconds, 1),
        "generate_captions_per_second": round(len(requests) / generate_timing.wall_seconds, 1),
        "num_images": len(requests),
        "batch_size": config.batch_size,
        "caption_tokens": describe_lengths(engine, ours),
        "device": platform.machine(),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "threads": options.threads,
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def describe_lengths(engine: TransformersEngine, captions: Sequence[str]) -> dict[str, float]:
    """Mean and spread of the captions' lengths, in the model's tokens."""
    lengths = [len(engine.tokenizer(text, add_special_tokens=False).input_ids) for text in captions]
    p5, p95 = (int(value) for value in np.percentile(lengths, (5, 95)))
    return {"mean": round(float(np.mean(lengths)), 1), "p5": p5, "p95": p95, "max": max(lengths)}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaVA of given size with random weights; `num_prompt_tokens` without the image's."""

    text: dict[str, Any]
    vision: dict[str, Any]
    num_prompt_tokens: int
    num_images: int
    batch_size: int
    mean_tokens: float


TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
SHAPES = {
    "llava-1.5-7b": Shape(
        text=dict(zip(TEXT, (32_064, 4096, 11_008, 32, 32), strict=True)),
        vision=dict(zip(VISION, (1024, 4096, 24, 16, 336, 14), strict=True)),
        num_prompt_tokens=40,
        num_images=256,
        batch_size=32,
        mean_tokens=100.0,
    ),
    "tiny": Shape(
        text=dict(zip(TEXT, (64, 32, 48, 2, 4), strict=True)),
        vision=dict(zip(VISION, (16, 24, 2, 2, 16, 4), strict=True)),
        num_prompt_tokens=6,
        num_images=12,
        batch_size=4,
        mean_tokens=12.0,
    ),
}
END_TOKEN, IMAGE_TOKEN = 2, 3


def build_model(shape: Shape, *, device: str, dtype: torch.dtype) -> Any:
    """Return a LLaVA with random weights, made on the device."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            **shape.text, max_position_embeddings=4096, bos_token_id=1, eos_token_id=END_TOKEN, pad_token_id=0
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
    rng = np.random.default_rng(SEED)
    side, patch = shape.vision["image_size"], shape.vision["patch_size"]
    prompts = []
    for number in range(shape.num_images):
        text = torch.from_numpy(rng.integers(4, shape.text["vocab_size"], shape.num_prompt_tokens))
        input_ids = torch.cat([torch.tensor([1]), torch.full(((side // patch) ** 2,), IMAGE_TOKEN), text])
        pixels = torch.from_numpy(rng.normal(size=(1, 3, side, side)).astype(np.float32))
        prompts.append(TokenizedPrompt(input_ids=input_ids, image_inputs={"pixel_values": pixels}, seed=number))
    lengths = rng.lognormal(np.log(shape.mean_tokens) - 0.08, 0.4, shape.num_images)
    return prompts, [int(length) for length in lengths.clip(2, 3 * shape.mean_tokens)]


class ForcedDecoder(ContinuousDecoder):
    """Ends each caption at its given length, and not before."""

    def __init__(self, forward: LlamaForward, settings: DecodingSettings, *, lengths: Sequence[int]) -> None:
        super().__init__(forward, settings)
        self._lengths = lengths

    def _choose(self, logits: torch.Tensor, rows: Sequence[Any]) -> list[int]:
        logits[:, END_TOKEN] = -torch.inf
        tokens = super()._choose(logits, rows)
        pairs = zip(tokens, rows, strict=True)
        return [END_TOKEN if len(row.token_ids) == self._lengths[row.index] else token for token, row in pairs]


class ForceLengths(LogitsProcessor):
    """The same for `model.generate`: `lengths` of one batch, `start` prompt tokens."""

    def __init__(self, lengths: torch.Tensor, start: int) -> None:
        self._lengths, self._start = lengths, start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Let a row end at its length, and not before."""
        is_end = self._lengths == input_ids.shape[1] - self._start
        scores[:, END_TOKEN] = -torch.inf
        scores[is_end] = -torch.inf
        scores[is_end, END_TOKEN] = 0.0
        return scores


def generate_forced(
    model: Any, prompts: Sequence[TokenizedPrompt], lengths: Sequence[int], *, batch_size: int
) -> list[list[int]]:
    """Caption fixed batches in arrival order with `model.generate`; returns the new tokens."""
    captions: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        batch, wanted = prompts[start : start + batch_size], lengths[start : start + batch_size]
        input_ids = torch.stack([prompt.input_ids for prompt in batch]).to(model.device)
        pixels = torch.cat([prompt.image_inputs["pixel_values"] for prompt in batch]).to(model.device, model.dtype)
        force = ForceLengths(torch.tensor(wanted, device=model.device), input_ids.shape[1])
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=max(wanted) + 1,
                logits_processor=LogitsProcessorList([force]),
            )
        new_tokens = output[:, input_ids.shape[1] :].tolist()
        captions += [tokens[:length] for tokens, length in zip(new_tokens, wanted, strict=True)]
    return captions


def memory_bandwidth(device: str) -> float:
    """Return bytes/s of a large copy on the device, read and write counted."""
    source = torch.zeros(2**30 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        _synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def bandwidth_limit(model: Any, shape: Shape, lengths: Sequence[int], *, bytes_per_second: float) -> float:
    """Return tokens/s if each step reads the text model's weights and the live keys and values once, all slots full.

    A token has half of its caption behind it on average, and longer captions have more tokens.
    """
    text = model.model.language_model
    element = model.dtype.itemsize
    weights = sum(p.numel() for p in text.layers.parameters()) + model.lm_head.weight.numel()
    image_tokens = (shape.vision["image_size"] // shape.vision["patch_size"]) ** 2
    behind = 1 + image_tokens + shape.num_prompt_tokens + sum(n * n / 2 for n in lengths) / sum(lengths)
    width = text.layers[0].self_attn.head_dim * shape.text["num_attention_heads"]
    per_token = 2 * shape.text["num_hidden_layers"] * width * behind
    return bytes_per_second * shape.batch_size / ((weights + shape.batch_size * per_token) * element)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_shape(name: str, *, device: str, num_rounds: int) -> dict[str, Any]:
    """Caption prepared prompts both ways with a random model of a known shape."""
    shape = SHAPES[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build_model(shape, device=device, dtype=dtype)
    prompts, lengths = make_prompts(shape)
    settings = DecodingSettings(
        num_slots=shape.batch_size,
        max_new_tokens=max(lengths) + 1,
        temperature=0.0,
        end_token_ids=frozenset([END_TOKEN]),
    )
    decoder = ForcedDecoder(LlamaForward(model), settings, lengths=lengths)

    def ours() -> list[list[int]]:
        captions = [continuation.token_ids for continuation in decoder.decode(prompts)]
        _synchronise(device)
        return captions

    def theirs() -> list[list[int]]:
        return generate_forced(model, prompts, lengths, batch_size=shape.batch_size)

    our_tokens, their_tokens = ours(), theirs()
    assert [len(tokens) for tokens in our_tokens] == lengths == [len(tokens) for tokens in their_tokens]
    our_timing, generate_timing = fastest([ours, theirs], num_rounds=num_rounds)
    tokens_per_second = sum(lengths) / our_timing.wall_seconds
    limit = bandwidth_limit(model, shape, lengths, bytes_per_second=memory_bandwidth(device))
    return {
        "shape": name,
        "ratio_generate": round(generate_timing.wall_seconds / our_timing.wall_seconds, 2),
        "identical": our_tokens == their_tokens,
        "num_different": sum(our != their for our, their in zip(our_tokens, their_tokens, strict=True)),
        "captions_per_second": round(len(prompts) / our_timing.wall_seconds, 2),
        "generate_captions_per_second": round(len(prompts) / generate_timing.wall_seconds, 2),
        "tokens_per_second": round(tokens_per_second, 1),
        "share_of_bandwidth": round(tokens_per_second / limit, 3),
        "mean_tokens": round(float(np.mean(lengths)), 1),
        "num_images": len(prompts),
        "batch_size": shape.batch_size,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def print_table(figures: dict[str, Any]) -> None:
    """Show both ways side by side."""
    table = Table(title=f"{figures['num_images']} images, {figures['batch_size']} at a time, {figures['device']}")
    table.add_column("")
    table.add_column("captions/s", justify="right")
    table.add_row("model.generate, fixed batches", str(figures["generate_captions_per_second"]))
    table.add_row("captioning", str(figures["captions_per_second"]))
    table.add_row("ratio", str(figures["ratio_generate"]))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables, and as last line one JSON object; write the same to benchmarks/results/caption.json."""
    parser = argparse.ArgumentParser(description="Continuous batching against model.generate.")
    parser.add_argument("--model", default="toyworld/weights/llava", help="hub id or local folder")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for both")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="compare with random weights of this shape only")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.shape is not None:
        figures = measure_shape(options.shape, device=device, num_rounds=options.rounds)
    else:
        figures = measure(options)
    print_table(figures)
    if options.shape is None and device == "cuda":
        figures["gpu"] = measure_shape("llava-1.5-7b", device=device, num_rounds=2)
        print_table(figures["gpu"])
    RESULT.parent.mkdir(exist_ok=True)
    line = json.dumps(figures)
    RESULT.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
