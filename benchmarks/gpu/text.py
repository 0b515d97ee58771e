"""`text_xxl`: the encoder of T5-XXL's shape as features run it, against transformers' with captions padded to 120."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from benchmarks.gpu.parts import Figures, Size
from encoders.compilation import can_compile
from encoders.t5 import T5Encoder
from encoders.t5_packed import PackedT5
from encoders.text import DEFAULT_BATCH_TOKENS, DEFAULT_CLEANING, TextSpec, text_batches
from training.loop.flops import device_peak_teraflops

MAX_TOKENS, MIN_TOKENS = 120, 12
# Cut at both ends, these lengths have a mean of 80.
MEAN_TOKENS, TOKENS_DEVIATION = 81.6, 22
PADDED_BATCH_SIZE, NUM_CAPTIONS, NUM_ROUNDS = 64, 1024, 3
CHECKED_LAYERS, CHECKED_CAPTIONS = 6, 5
TERA = 1e12


def text_xxl(size: Size) -> Figures:
    """Captions per second of both ways, in turns; MFU of real tokens; how far each is from float32."""
    device = torch.device(size.device)
    config = _config(is_tiny=size.is_tiny)
    captions = random_captions(32 if size.is_tiny else NUM_CAPTIONS, vocab_size=config.vocab_size)
    figures: Figures = dict(_errors(config, captions[:CHECKED_CAPTIONS], device))
    size.keep({f"text_xxl_{name}": value for name, value in figures.items()})
    theirs = _random_model(config, device)
    ours = make_encoder(_shared_copy(theirs, config), batch_tokens=DEFAULT_BATCH_TOKENS[device.type])
    if can_compile(device):
        ours.compile_kernels()
    for _ in range(2):
        ours.embed(captions[: len(captions) // 2])  # two lengths, so that nothing is left to compile
    _encode_padded(theirs, captions[:PADDED_BATCH_SIZE])
    seconds: dict[str, list[float]] = {"ours": [], "padded": []}
    for _ in range(1 if size.is_tiny else NUM_ROUNDS):
        seconds["ours"].append(_timed(lambda: ours.embed(captions)))
        seconds["padded"].append(_timed(lambda: _encode_padded(theirs, captions)))
    our_seconds, padded_seconds = (min(found) for found in seconds.values())
    num_tokens = sum(map(len, captions))
    peak = device_peak_teraflops(device)
    teraflops = num_tokens * flops_per_token(config, num_tokens / len(captions)) / our_seconds / TERA
    figures |= {
        "captions_per_second": round(len(captions) / our_seconds, 1),
        "padded_captions_per_second": round(len(captions) / padded_seconds, 1),
        "ratio": round(padded_seconds / our_seconds, 3),
        "teraflops": round(teraflops, 1),
        "mfu": None if peak is None else round(teraflops / peak, 4),
    }
    return {f"text_xxl_{name}": value for name, value in figures.items()}


def random_captions(count: int, *, vocab_size: int) -> list[list[int]]:
    """Token ids of captions of 12 to 120 tokens, 80 on average."""
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.randn(count, generator=generator) * TOKENS_DEVIATION + MEAN_TOKENS).round()
    lengths = lengths.clamp(MIN_TOKENS, MAX_TOKENS).int().tolist()
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def make_encoder(model: Any, *, batch_tokens: int) -> T5Encoder:
    """Our encoder around the weights of a transformers model, which is taken apart; it is fed ids, not texts."""
    spec = TextSpec(width=model.config.d_model, max_tokens=MAX_TOKENS, cleaning=DEFAULT_CLEANING, identity="random")
    return T5Encoder(spec, PackedT5(model).requires_grad_(False), None, text_batches(batch_tokens))


def flops_per_token(config: T5Config, mean_tokens: float) -> float:
    """Floating-point operations that a token's forward pass needs: products of weights, and attention."""
    inner = config.num_heads * config.d_kv
    weights = 4 * config.d_model * inner + 3 * config.d_model * config.d_ff
    return config.num_layers * 2.0 * (weights + 2 * mean_tokens * inner)


def _config(*, is_tiny: bool) -> T5Config:
    width, layers = (64, 2) if is_tiny else (4096, 24)
    return T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=16 if is_tiny else 64,
        d_ff=width * 5 // 2,
        num_heads=4 if is_tiny else 64,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
    )


def _random_model(config: T5Config, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A T5 encoder with weights made on the device, of the scale that transformers begins training with."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = T5EncoderModel(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    scales = {"shared": 1.0, "q": (config.d_model * config.d_kv) ** -0.5, "o": (config.num_heads * config.d_kv) ** -0.5}
    scales |= {"wo": config.d_ff**-0.5, "relative_attention_bias": config.d_model**-0.5}
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(std=scales.get(name.split(".")[-2], config.d_model**-0.5))
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def _shared_copy(model: Any, config: T5Config) -> Any:
    """A second model of the same weights: ours lays its projections side by side in memory of their own."""
    with torch.device("meta"):
        twin: Any = T5EncoderModel(config)
    twin.load_state_dict(model.state_dict(), assign=True, strict=False)
    twin.encoder.embed_tokens.weight = twin.shared.weight
    return twin.eval().requires_grad_(False)


def _encode_padded(model: Any, captions: list[list[int]]) -> list[Tensor]:
    """What extraction scripts do: batches in the given order, every caption padded to the limit."""
    embeddings: list[Tensor] = []
    for start in range(0, len(captions), PADDED_BATCH_SIZE):
        batch = captions[start : start + PADDED_BATCH_SIZE]
        ids = torch.tensor([tokens + [0] * (MAX_TOKENS - len(tokens)) for tokens in batch]).to(model.device)
        lengths = [len(tokens) for tokens in batch]
        mask = (torch.arange(MAX_TOKENS) < torch.tensor(lengths)[:, None]).long().to(model.device)
        with torch.inference_mode():
            hidden = model(ids, attention_mask=mask).last_hidden_state
        embeddings += [row[:length].clone() for row, length in zip(hidden.cpu(), lengths, strict=True)]
    return embeddings


def _errors(config: T5Config, captions: list[list[int]], device: torch.device) -> dict[str, float]:
    """Root mean square distance from float32, of a few layers, relative to what float32 gives."""
    config = copy.deepcopy(config)
    config.num_layers = min(config.num_layers, CHECKED_LAYERS)
    theirs = _random_model(config, device)
    found = {"theirs": _encode_padded(theirs, captions)}
    batch_tokens = DEFAULT_BATCH_TOKENS[device.type]
    found["ours"] = make_encoder(_shared_copy(theirs, config), batch_tokens=batch_tokens).embed(captions)
    exact = torch.cat(_encode_padded(theirs.float(), captions))
    errors = {
        f"{side}_error": round(((torch.cat(rows).float() - exact).norm() / exact.norm()).item(), 6)
        for side, rows in found.items()
    }
    return errors | {"error_of_theirs": round(errors["ours_error"] / errors["theirs_error"], 3)}


def _timed(encode: Any) -> float:
    # Embeddings are on the host when it returns, so there is nothing to wait for.
    start_seconds = time.perf_counter()
    encode()
    return time.perf_counter() - start_seconds
