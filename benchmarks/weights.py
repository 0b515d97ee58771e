"""`make bench-weights`: how far weights in 8 bits are off, at published width and by the toy world's judge.

Blocks of PixArt-XL/2 and of T5-XXL with random weights, in int8 and in fp8 (e4m3, one scale to each output), against
float32: the relative error of what they give. The toy world's released PixArt draws the same unseen prompts from the
same noise with whole weights and with those in int8, and the judge looks for the same objects in both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.cache import Illustrator, compare
from encoders.living_bytes import storage_bytes
from encoders.text import pack
from pixart.model import PixArt, PixArtConfig
from sampling.config import EncoderConfig
from sampling.foreign_weights import open_trained_model
from sampling.renderer import Renderer

RESULT = Path(__file__).parent / "results" / "weights.json"
CPU = torch.device("cpu")
NUM_LAYERS = 4
NUM_TOKENS, NUM_PROMPT_TOKENS = 256, 120
MAX_TOKENS = 120  # of the toy encoder
NUM_PROMPTS = 300  # with two objects each, more or less
KINDS = ("int8", "fp8")


def quantize(model: nn.Module, kind: str) -> None:
    """Round the weights of all linear layers."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    quantize_(model, config(set_inductor_config=False))


def transformer(dtype: torch.dtype, kind: str | None) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Return a PixArt of the published width, and what gives its output."""
    torch.manual_seed(0)
    model = PixArt(PixArtConfig(num_layers=NUM_LAYERS)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():  # what starts at zero hides what blocks do
        if not weight.any():
            nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    generator = torch.Generator().manual_seed(1)
    side = 2 * int(NUM_TOKENS**0.5)
    latents = torch.randn(2, 4, side, side, generator=generator)
    text = torch.randn(2, NUM_PROMPT_TOKENS, model.config.caption_channels, generator=generator)
    model.to(dtype)
    if kind is not None:
        quantize(model.blocks, kind)
    times = torch.tensor([100, 800])
    return model, lambda: model(latents.to(dtype), times, text.to(dtype)).float()


def text_encoder(dtype: torch.dtype, kind: str | None) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Return an encoder of T5-XXL's width, and what gives its output."""
    from transformers import T5Config, T5EncoderModel

    from encoders.t5_packed import PackedT5

    torch.manual_seed(0)
    shape = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    config = T5Config(vocab_size=512, num_layers=NUM_LAYERS // 2, **shape)
    model = PackedT5(T5EncoderModel(config)).eval().requires_grad_(False).to(dtype)
    if kind is not None:
        quantize(model, kind)
    ids = torch.randint(2, 512, (NUM_PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    return model, lambda: model(pack([ids], CPU, length_step=8)).float()


def errors(make: Callable[[torch.dtype, str | None], tuple[nn.Module, Callable[[], torch.Tensor]]]) -> dict[str, float]:
    """Return the error of each kind of weights relative to float32, and of plain bfloat16 for comparison."""
    with torch.inference_mode():
        model, compute = make(torch.float32, None)
        exact, whole = compute(), storage_bytes(model.parameters())
        found: dict[str, float] = {}
        for name, dtype, kind in (
            ("bfloat16", torch.bfloat16, None),
            *((kind, torch.float32, kind) for kind in KINDS),
            ("int8_bfloat16", torch.bfloat16, "int8"),
        ):
            del model, compute
            model, compute = make(dtype, kind)
            found[name] = ((compute() - exact).norm() / exact.norm()).item()
            found[f"bytes_{name}"] = storage_bytes(model.parameters()) / whole
    return found


def judged() -> dict[str, Any]:
    """Return what the judge says of the released toy PixArt in int8 against whole weights."""
    encoders = EncoderConfig(text_model="toyworld/weights/t5", vae_model="toyworld/weights/vae", max_tokens=MAX_TOKENS)
    trained = open_trained_model("toyworld/released/pixart", encoders)
    illustrator = Illustrator(trained, num_prompts=NUM_PROMPTS, num_steps=20)
    whole = illustrator.draw({})
    config = illustrator.config.model_copy(update={"weight_dtype": "int8"})
    illustrator.renderer = Renderer(config, illustrator.renderer.trained)
    found = compare(whole, illustrator.draw({"weight_dtype": "int8"}))
    hits = [is_right for image in whole.right for is_right in image]
    names = ("points_lost", "points_lost_95", "num_lost", "num_gained")
    return {"num_objects": len(hits), "right_whole": sum(hits) / len(hits), **{name: found[name] for name in names}}


def print_table(figures: Mapping[str, Mapping[str, float]]) -> None:
    """Print a row for each kind of weights."""
    table = Table("weights", "transformer", "text encoder", "bytes", title="relative error against float32")
    for name in ("bfloat16", *KINDS, "int8_bfloat16"):
        cells = [f"{figures[part][name]:.3%}" for part in ("transformer", "text_encoder")]
        table.add_row(name, *cells, f"{figures['transformer'][f'bytes_{name}']:.2f}")
    Console().print(table)


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/weights.json."""
    found: dict[str, Any] = {"transformer": errors(transformer), "text_encoder": errors(text_encoder)}
    print_table(found)
    found["judge"] = judged()
    line = json.dumps(found)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
