"""`make bench-features`: T5 on length-sorted batches of real tokens, against padding every caption to 120 tokens.

The same model, batch size and captions on both sides, and the embeddings are compared. Lengths are those of the demo
(captions of generated scenes) and a realistic spread: mean 80 tokens, as LLaVA's captions of photographs have.
"""

# L text tokens (with padding), D text width

from __future__ import annotations

import argparse
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
from transformers import T5Config, T5EncoderModel

from features.encoders import Batches, TextEncoder, clean_prompt
from toyworld.scenes import random_scene
from toyworld.wording import dense_caption

RESULT = Path(__file__).parent / "results" / "features.json"
TOKENIZER = "toyworld/weights/t5"
MAX_TOKENS = 120
# Cut at both ends, these lengths have a mean of 80.
MEAN_TOKENS, TOKENS_DEVIATION, MIN_TOKENS = 81.6, 22, 12
NUM_ROUNDS = 2
# Words that are one token each in the toy tokenizer.
WORDS = ("red", "blue", "circle", "star", "on", "the", "left", "small", "large", "and", "a", "background")


def make_encoder(width: int, *, num_layers: int, batch_size: int, device: str) -> TextEncoder:
    """A randomly weighted T5 encoder with the gated-GELU blocks of Flan-T5, behind the toy tokenizer."""
    encoder = TextEncoder.load(TOKENIZER, max_tokens=MAX_TOKENS, dtype="float32", device=device)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=encoder.model.config.vocab_size,
        d_model=width,
        d_kv=64,
        d_ff=round(width * 2.5),
        num_heads=width // 64,
        num_layers=num_layers,
        feed_forward_proj="gated-gelu",
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # Its type stubs hide nn.Module.to.
    model: Any = T5EncoderModel(config)
    model = model.to(device, dtype).eval().requires_grad_(False)
    return TextEncoder(model, encoder.tokenizer, MAX_TOKENS, width, encoder.device, Batches(batch_size))


def demo_captions(count: int) -> list[str]:
    """Dense captions of generated scenes, as the demo's captioner writes them."""
    rng = np.random.default_rng(0)
    return [dense_caption(random_scene(rng), rng) for _ in range(count)]


def realistic_captions(count: int) -> list[str]:
    """Captions of 12 to 120 tokens, 80 on average."""
    rng = np.random.default_rng(1)
    lengths = rng.normal(MEAN_TOKENS, TOKENS_DEVIATION, count).round().clip(MIN_TOKENS, MAX_TOKENS).astype(int)
    return [" ".join(rng.choice(WORDS, length - 1)) for length in lengths]


def encode_padded(encoder: TextEncoder, texts: Sequence[str]) -> list[torch.Tensor]:
    """What extraction scripts do: batches in the given order, every caption padded to the limit."""
    embeddings: list[torch.Tensor] = []
    size = encoder.batches.size
    for start in range(0, len(texts), size):
        inputs = encoder.tokenizer(
            [clean_prompt(text) for text in texts[start : start + size]],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        with torch.inference_mode():
            hidden = encoder.model(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        lengths = inputs.attention_mask.sum(1).tolist()
        embeddings += [row[:length] for row, length in zip(hidden.cpu(), lengths, strict=True)]
    return embeddings


def timed(encode: Callable[[], list[torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
    """Seconds and embeddings of one call; on a CPU the process's own seconds, so that other jobs do not count."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start_seconds = clock()
    embeddings = encode()
    return clock() - start_seconds, embeddings


def compare(encoder: TextEncoder, texts: Sequence[str]) -> dict[str, float]:
    """Time both ways in turns, and measure how far their embeddings are apart, in steps of bfloat16."""
    our_seconds, padded_seconds, largest = [], [], 0.0
    for _ in range(NUM_ROUNDS):
        seconds, ours = timed(lambda: encoder.encode(texts))
        our_seconds.append(seconds)
        seconds, padded = timed(lambda: encode_padded(encoder, texts))
        padded_seconds.append(seconds)
        largest = max(largest, *(bfloat16_steps(*pair) for pair in zip(ours, padded, strict=True)))
    num_tokens = sum(map(len, encoder.tokenize(texts)))
    return {
        "mean_tokens": round(num_tokens / len(texts), 1),
        "our_captions_per_second": round(len(texts) / min(our_seconds), 1),
        "padded_captions_per_second": round(len(texts) / min(padded_seconds), 1),
        "ratio": round(min(padded_seconds) / min(our_seconds), 2),
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
    parser.add_argument("--captions", type=int, default=1024)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = make_encoder(options.width, num_layers=options.layers, batch_size=options.batch_size, device=device)
    spreads = {
        "demo": compare(encoder, demo_captions(options.captions)),
        "realistic": compare(encoder, realistic_captions(options.captions)),
    }
    result = {
        "ratio_padded_text": spreads["realistic"]["ratio"],
        "ratio_padded_text_demo": spreads["demo"]["ratio"],
        **spreads,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    table = Table("captions", "mean tokens", "ours /s", "padded to 120 /s", "ratio", "largest difference, bf16 steps")
    for name, figures in spreads.items():
        table.add_row(name, *(str(value) for value in figures.values()))
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
