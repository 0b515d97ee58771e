"""`make bench-features`: T5 on length-sorted batches of real tokens, against padding every caption to 120 tokens.

The same weights and captions on both sides, and the embeddings are compared. Lengths are those of the demo (captions of
generated scenes) and a realistic spread: mean 80 tokens, as LLaVA's captions of photographs have. The other side is
transformers' own encoder at the better of two batch sizes. Padding alone is worth 120 / 80 = 1.5 to its linear layers;
more comes from batches bounded in tokens, the squares in attention, and a fused GELU.
"""

# L text tokens (with padding), D text width

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from encoders.t5 import T5Encoder
from encoders.t5_packed import PackedT5
from encoders.text import DEFAULT_BATCH_TOKENS, DEFAULT_CLEANING, TextSpec, clean_text, text_batches
from toyworld.scenes import random_scene
from toyworld.wording import dense_caption

RESULT = Path(__file__).parent / "results" / "features.json"
TOKENIZER = "toyworld/weights/t5"
MAX_TOKENS = 120
# Cut at both ends, these lengths have a mean of 80.
MEAN_TOKENS, TOKENS_DEVIATION, MIN_TOKENS = 81.6, 22, 12
NUM_ROUNDS = 3
# Captions a batch of the padded side, as extraction scripts have them, and one that suits a CPU's cache.
PADDED_BATCH_SIZES = (32, 8)
# Words that are one token each in the toy tokenizer.
WORDS = ("red", "blue", "circle", "star", "on", "the", "left", "small", "large", "and", "a", "background")


def make_model(width: int, *, num_layers: int, device: str) -> Any:
    """A randomly weighted T5 encoder with the gated-GELU blocks of Flan-T5, over the toy tokenizer's vocabulary."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(AutoTokenizer.from_pretrained(TOKENIZER)),
        d_model=width,
        d_kv=64,
        d_ff=round(width * 2.5),
        num_heads=width // 64,
        num_layers=num_layers,
        feed_forward_proj="gated-gelu",
    )
    # Its type stubs hide nn.Module.to.
    model: Any = T5EncoderModel(config)
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval().requires_grad_(False)


def make_encoder(model: Any, *, batch_tokens: int | None) -> T5Encoder:
    """Our encoder around a copy of `model`."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    batches = text_batches(batch_tokens or DEFAULT_BATCH_TOKENS[model.device.type])
    spec = TextSpec(width=model.config.d_model, max_tokens=MAX_TOKENS, cleaning=DEFAULT_CLEANING, identity="random")
    return T5Encoder(spec, PackedT5(copy.deepcopy(model)), tokenizer, batches)


def demo_captions(count: int) -> list[str]:
    """Dense captions of generated scenes, as the demo's captioner writes them."""
    rng = np.random.default_rng(0)
    return [dense_caption(random_scene(rng), rng) for _ in range(count)]


def realistic_captions(count: int) -> list[str]:
    """Captions of 12 to 120 tokens, 80 on average."""
    rng = np.random.default_rng(1)
    lengths = rng.normal(MEAN_TOKENS, TOKENS_DEVIATION, count).round().clip(MIN_TOKENS, MAX_TOKENS).astype(int)
    return [" ".join(rng.choice(WORDS, length - 1)) for length in lengths]


def encode_padded(model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int) -> list[torch.Tensor]:
    """What extraction scripts do: batches in the given order, every caption padded to the limit."""
    embeddings: list[torch.Tensor] = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            [clean_text(text, DEFAULT_CLEANING) for text in texts[start : start + batch_size]],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            hidden = model(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        lengths = inputs.attention_mask.sum(1).tolist()
        embeddings += [row[:length] for row, length in zip(hidden.cpu(), lengths, strict=True)]
    return embeddings


def timed(encode: Callable[[], list[torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
    """Seconds and embeddings of one call; on a CPU the process's own seconds, so that other jobs do not count."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start_seconds = clock()
    embeddings = encode()
    return clock() - start_seconds, embeddings


def compare(encoder: T5Encoder, model: Any, texts: Sequence[str]) -> dict[str, float]:
    """Time both ways in turns, and measure how far their embeddings are apart, in steps of bfloat16."""
    our_seconds: list[float] = []
    padded_seconds: dict[int, list[float]] = {size: [] for size in PADDED_BATCH_SIZES}
    largest = 0.0
    for _ in range(NUM_ROUNDS):
        seconds, ours = timed(lambda: encoder.encode(texts))
        our_seconds.append(seconds)
        for size, found in padded_seconds.items():
            padded_way = functools.partial(encode_padded, model, encoder.tokenizer, texts, batch_size=size)
            seconds, padded = timed(padded_way)
            found.append(seconds)
            largest = max(largest, *(bfloat16_steps(*pair) for pair in zip(ours, padded, strict=True)))
    best_size = min(padded_seconds, key=lambda size: min(padded_seconds[size]))
    num_tokens = sum(map(len, encoder.tokenize(texts)))
    return {
        "mean_tokens": round(num_tokens / len(texts), 1),
        "our_captions_per_second": round(len(texts) / min(our_seconds), 1),
        "padded_captions_per_second": round(len(texts) / min(padded_seconds[best_size]), 1),
        "padded_batch_size": best_size,
        "ratio": round(min(padded_seconds[best_size]) / min(our_seconds), 2),
        "max_difference_bfloat16_steps": round(largest, 4),
    }


def bfloat16_steps(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference of two embeddings [L, D], in units of the last place that bfloat16 keeps."""
    assert ours.shape == reference.shape
    step = torch.finfo(torch.bfloat16).eps * reference.float().abs().clamp_min(reference.float().std())
    return ((ours.float() - reference.float()).abs() / step).max().item()


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/features.json."""
    parser = argparse.ArgumentParser(description="Length-sorted T5 batches against padding to the limit.")
    parser.add_argument("--captions", type=int, default=768)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, help="tokens of our batches, default that of the device")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(options.width, num_layers=options.layers, device=device)
    encoder = make_encoder(model, batch_tokens=options.batch_tokens)
    spreads = {
        "demo": compare(encoder, model, demo_captions(options.captions)),
        "realistic": compare(encoder, model, realistic_captions(options.captions)),
    }
    result = {
        "ratio_padded_text": min(figures["ratio"] for figures in spreads.values()),
        "batch_tokens": encoder.batches.size,
        **spreads,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    table = Table(
        "captions", "mean tokens", "ours /s", "padded to 120 /s", "its batch", "ratio", "largest difference, bf16 steps"
    )
    for name, figures in spreads.items():
        table.add_row(name, *(str(value) for value in figures.values()))
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
