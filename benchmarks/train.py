"""`make bench-train`: one training step of our PixArt against diffusers' `PixArtTransformer2DModel`.

Same weights, loss, AdamW, latents, noise and captions of mean 80 tokens on all sides, each in a process of its own, by
turns: ours, which keeps all that the backward pass asks for, ours that keeps products alone
(`training.keep_activations`), and diffusers', which keeps all. Steps are compared with ours as it is, memory with ours
that keeps less. Our batch ends with its longest caption, as our reader cuts it; diffusers' is padded to 120 tokens with
a mask, as its users do. Weights, gradients and AdamW's moments are bf16 on all sides.

The seconds are the process's own with one thread, and peak memory is what the process grew by since before the model
was built, in a run of its own in which freed memory leaves the process at once. XL/2 on a GPU is `make bench-gpu`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.sample import random_model
from pixart.layouts import export_weights, pixart_diffusers_layout
from pixart.model import PixArtConfig
from pixart.processes.ddpm import DDPM
from training.loop.flops import StepFlops
from training.loop.memory import keep_activations
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.stages.networks import blank_network

RESULT = Path(__file__).parent / "results" / "train.json"
PRODUCTS_SIDE = "ours_keeping_products"
SIDES = ("ours", PRODUCTS_SIDE, "diffusers")
VAE_FACTOR = 8  # of the VAE that both sides are trained on
MAX_TOKENS, MEAN_TOKENS, SPREAD_TOKENS = 120, 80, 22
KIBIBYTE, GIGABYTE, TERA = 1024, 1e9, 1e12
GRADIENT_CLIP, LEARNING_RATE, WEIGHT_DECAY = 0.01, 2e-5, 0.03  # the paper's
# glibc gives larger blocks back to the system when they are freed: without it the peak hangs on chance holes
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: the network's shape, and the images."""

    width: int
    num_layers: int
    pixels: int
    batch_size: int
    head_dim: int = 72
    caption_channels: int = 4096

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"width {self.width}, {self.num_layers} blocks, {self.pixels}px, batch {self.batch_size}"

    @property
    def config(self) -> PixArtConfig:
        """The network's shape; above 512 pixels positions are interpolated."""
        return PixArtConfig(
            num_layers=self.num_layers,
            num_heads=self.width // self.head_dim,
            head_dim=self.head_dim,
            caption_channels=self.caption_channels,
            sample_size=self.pixels // VAE_FACTOR,
            interpolation_scale=max(self.pixels // 512, 1),
        )


CASES = [
    Case(width=384, num_layers=6, pixels=256, batch_size=16, head_dim=64),
]


def diffusers_shape(config: PixArtConfig) -> dict[str, Any]:
    """The same network as diffusers' `PixArtTransformer2DModel` is told of it."""
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_channels,
        "sample_size": config.sample_size,
        "interpolation_scale": int(config.interpolation_scale),
        "use_additional_conditions": False,
    }


def diffusers_model(config: PixArtConfig) -> nn.Module:
    """diffusers' network with the weights of ours."""
    model = PixArtTransformer2DModel(**diffusers_shape(config))
    weights = export_weights(random_model(config), pixart_diffusers_layout(config))
    model.load_state_dict(weights, strict=False)  # its positions are a buffer of its own
    return model


def step_flops(case: Case) -> StepFlops:
    """The counter of what a step needs."""
    inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=None, dtype=torch.bfloat16)
    objective = Denoise(process=DDPM(device="meta"), inputs=inputs)
    network = blank_network(case.config).to(torch.bfloat16)
    in_channels, text_width = case.config.in_channels, case.caption_channels
    return StepFlops(objective, {"network": network}, in_channels=in_channels, text_width=text_width)


def caption_lengths(case: Case) -> Tensor:
    """Tokens of each caption, int64 [B]; the same on both sides."""
    generator = torch.Generator().manual_seed(1)
    lengths = MEAN_TOKENS + SPREAD_TOKENS * torch.randn(case.batch_size, generator=generator)
    return lengths.round().long().clamp(1, MAX_TOKENS)


class Step:
    """One side's training step on a batch that lies ready."""

    def __init__(self, side: str, case: Case) -> None:
        self.side = side
        model = diffusers_model(case.config) if side == "diffusers" else random_model(case.config)
        keep_activations(model, "products" if side == PRODUCTS_SIDE else "all")
        model.to(torch.bfloat16).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.model = model
        self.process = DDPM()
        self.lengths = caption_lengths(case)
        generator = torch.Generator().manual_seed(2)
        latent = (case.batch_size, 4, case.pixels // VAE_FACTOR, case.pixels // VAE_FACTOR)
        self.latents = torch.randn(latent, generator=generator)
        self.noise = torch.randn(latent, generator=generator)
        self.timesteps = torch.randint(1000, (case.batch_size,), generator=generator)
        text = torch.randn(case.batch_size, MAX_TOKENS, case.caption_channels, generator=generator)
        num_tokens = MAX_TOKENS if side == "diffusers" else int(self.lengths.max())
        self.text = text[:, :num_tokens].to(torch.bfloat16)
        self.mask = torch.arange(num_tokens) < self.lengths[:, None]

    def __call__(self) -> float:
        """Train on the batch once; returns its loss."""
        noisy = self.process.noisy(self.latents, self.noise, self.timesteps).to(torch.bfloat16)
        if self.side != "diffusers":
            output = self.model(noisy, self.timesteps, self.text, self.mask)
        else:
            output = self.model(
                noisy,
                encoder_hidden_states=self.text,
                timestep=self.timesteps,
                encoder_attention_mask=self.mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        loss = self.process.loss(output, self.latents, self.noise, self.timesteps).total.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def measure(side: str, case: Case, *, num_steps: int) -> dict[str, float]:
    """Return the first step's loss, which is not timed, of the others the fastest's seconds, and peak gigabytes."""
    torch.set_num_threads(1)
    # The peak starts from what is in use now, and not from what imports have needed.
    Path("/proc/self/clear_refs").write_text("5")
    before_bytes = _peak_bytes()
    step = Step(side, case)
    loss, seconds = step(), []
    for _ in range(num_steps):
        start_seconds = time.process_time()
        step()
        seconds.append(time.process_time() - start_seconds)
    return {
        "loss": loss,
        "seconds": min(seconds),
        "peak_gigabytes": (_peak_bytes() - before_bytes) / GIGABYTE,
    }


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kibibytes) * KIBIBYTE


def measure_in_process(side: str, case: Case, *, num_steps: int, returns_freed_memory: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train", "--steps", str(num_steps), "--side", side]
    environment = os.environ | (RETURN_FREED_MEMORY if returns_freed_memory else {})
    command += ["--case", json.dumps(asdict(case))]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def compare(case: Case, *, num_steps: int, num_rounds: int) -> dict[str, float]:
    """Measure the sides by turns: memory in a first round, the fastest step of all the others."""
    peaks: dict[str, Any] = {}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(num_rounds + 1):
        for side in SIDES:
            is_memory_round = number == 0
            found = measure_in_process(
                side, case, num_steps=1 if is_memory_round else num_steps, returns_freed_memory=is_memory_round
            )
            if is_memory_round:
                peaks[side] = found["peak_gigabytes"]
            else:
                runs[side].append(found)
    best = {side: min(found, key=lambda run: run["seconds"]) for side, found in runs.items()}
    ours, leaner, theirs = best["ours"], best[PRODUCTS_SIDE], best["diffusers"]
    figures: dict[str, float] = {}
    for side, run in best.items():
        figures |= {
            f"{side}_seconds": round(run["seconds"], 4),
            f"{side}_images_per_second": round(case.batch_size / run["seconds"], 4),
            f"{side}_peak_gigabytes": round(peaks[side], 4),
        }
    return {
        **figures,
        "ratio_step": round(theirs["seconds"] / ours["seconds"], 3),
        "ratio_peak_memory": round(peaks["diffusers"] / peaks[PRODUCTS_SIDE], 3),
        "ratio_peak_memory_keeping_all": round(peaks["diffusers"] / peaks["ours"], 3),
        "ratio_step_keeping_products": round(theirs["seconds"] / leaner["seconds"], 3),
        "extra_time_keeping_products": round(leaner["seconds"] / ours["seconds"] - 1, 3),
        "loss_difference": abs(ours["loss"] / theirs["loss"] - 1),
    }


def compare_all(cases: Sequence[Case], *, num_steps: int, num_rounds: int) -> dict[str, Any]:
    """Compare every case; the ratios at the top are the first case's."""
    figures = {case.name: compare(case, num_steps=num_steps, num_rounds=num_rounds) for case in cases}
    first = figures[cases[0].name]
    return {
        "ratio_step": first["ratio_step"],
        "ratio_peak_memory": first["ratio_peak_memory"],
        "extra_time_keeping_products": first["extra_time_keeping_products"],
        **figures,
        "device": "cpu, 1 thread",
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/train.json."""
    parser = argparse.ArgumentParser(description="A training step against diffusers' PixArtTransformer2DModel.")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of a side that are timed")
    parser.add_argument("--side", choices=SIDES, help="measure this side of --case alone, in this process")
    parser.add_argument("--case", type=json.loads, help="a comparison as JSON")
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(measure(options.side, Case(**options.case), num_steps=options.steps)))
        return
    result = compare_all(CASES, num_steps=options.steps, num_rounds=options.rounds)
    names = list(result[CASES[0].name])
    table = Table("", *(case.name for case in CASES))
    for name in names:
        table.add_row(name.replace("_", " "), *(str(result[case.name][name]) for case in CASES))
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
