"""`make bench-caption`: continuous batching against `model.generate` over fixed batches in arrival order.

The same model, images, prompts, batch width, precision and threads on both sides, preprocessing included; half of the
prompts carry an alt text. Captions end where the model ends them, so their lengths vary as they do in use. The greedy
captions are compared. A model of LLaVA-1.5-7B's shape on a GPU: `benchmarks.gpu.captioning`.
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

from captioning.config import CaptioningConfig
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
    figures = measure(parser.parse_args(argv))
    print_table(figures)
    RESULT.parent.mkdir(exist_ok=True)
    line = json.dumps(figures)
    RESULT.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
