"""Training steps on a device, ours and diffusers', timed without a wait between them.

Both sides have the same weights, latents, noise, times and captions, minimise the same loss, and take one fused AdamW
over bf16 weights, gradients and moments, with the gradient clipped. Ours reads a batch as the reader gives it, and is
what training makes of a network; diffusers' reads captions padded to 120 tokens with a mask, as its users do.
"""

# B samples of a batch, T tokens of all its captions, C latent channels, h x w latent size

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from benchmarks.train import (
    GIGABYTE,
    GRADIENT_CLIP,
    LEARNING_RATE,
    MAX_TOKENS,
    TERA,
    VAE_FACTOR,
    WEIGHT_DECAY,
    Case,
    caption_lengths,
    diffusers_shape,
    step_flops,
)
from pixart.compilation import compile_blocks
from pixart.layouts import export_weights, pixart_diffusers_layout
from pixart.model import PixArt
from pixart.processes.ddpm import DDPM
from training.data.batch import PackedBatch, PackedRows
from training.loop.flops import device_peak_teraflops
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs

NUM_WARM_UP_STEPS, NUM_STEPS = 2, 6
WEIGHT_SCALE = 0.3  # times fan-in to the power of -1/2: keeps the scale of what passes through, zero nowhere


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What steps on a device took: seconds of the median one, peak gigabytes, and the loss of the first."""

    seconds: float
    peak_gigabytes: float
    loss: float


class Step(Protocol):
    """One training step on a batch that lies ready on the device; returns its loss, for which nothing waits."""

    def __call__(self) -> Tensor:
        """Train once."""
        ...


def random_network(case: Case, *, device: str) -> PixArt:
    """Return our network with random fp32 weights, made on the device, the same at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        network = PixArt(case.config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=WEIGHT_SCALE / parameter.shape[-1] ** 0.5)
    return network.train()


def diffusers_network(case: Case, *, device: str) -> nn.Module:
    """Return diffusers' network with the weights of `random_network`."""
    with torch.device(device):
        network = PixArtTransformer2DModel(**diffusers_shape(case.config))
    weights = export_weights(random_network(case, device=device), pixart_diffusers_layout(case.config))
    network.load_state_dict(weights, strict=False)  # its positions are a buffer of its own
    return network.train()


def packed_batch(case: Case) -> PackedBatch:
    """Return a batch as the reader gives it, of random numbers: captions end to end, latents without deviation."""
    generator = torch.Generator().manual_seed(2)
    side = case.pixels // VAE_FACTOR
    latents = (case.batch_size, case.config.in_channels, side, side)
    lengths = caption_lengths(case)
    num_tokens, width = int(lengths.sum()), case.caption_channels
    is_dropped = torch.zeros(case.batch_size, dtype=torch.bool)
    return PackedBatch(
        step=0,
        bucket=f"{case.pixels}x{case.pixels}",
        keys=[str(i) for i in range(case.batch_size)],
        shards=["random"] * case.batch_size,
        mean=torch.randn(latents, generator=generator).half(),
        std=None,
        posterior_noise=None,
        noise=torch.randn(latents, generator=generator),
        timestep_draws=torch.rand(case.batch_size, generator=generator, dtype=torch.float64),
        is_dropped=is_dropped,
        is_prior=torch.zeros(case.batch_size, dtype=torch.bool),
        size=torch.zeros(case.batch_size, 3),
        text=PackedRows(
            values=torch.randn(num_tokens, width, generator=generator).bfloat16(),
            scale=None,
            lengths=lengths,
            is_dropped=is_dropped,
            null=torch.zeros(1, width, dtype=torch.bfloat16),
        ),
        labels=None,
    )


def our_step(case: Case, *, device: str, prepare: Callable[[nn.Module], None] = compile_blocks) -> Step:
    """Return a step of our network, which `prepare` changes as training does."""
    network = our_network(case, device=device, prepare=prepare)
    optimizer, objective = fused_adamw(network), our_objective(device=device)
    batch = packed_batch(case).to(torch.device(device))

    def step() -> Tensor:
        loss = objective.loss({"network": network}, batch).total.mean()
        update(loss, network, optimizer)
        return loss.detach()

    return step


def our_network(case: Case, *, device: str, prepare: Callable[[nn.Module], None] = compile_blocks) -> PixArt:
    """Return our network in bf16, which `prepare` changes as training does."""
    network = random_network(case, device=device).to(torch.bfloat16)
    prepare(network)
    return network


def our_objective(*, device: str) -> Denoise:
    """Return what training minimises, in bf16."""
    inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=None, dtype=torch.bfloat16)
    return Denoise(process=DDPM(device=device), inputs=inputs)


def diffusers_step(case: Case, *, device: str, is_compiled: bool) -> Step:
    """Return a step of diffusers' network, eager or compiled block by block."""
    network = diffusers_network(case, device=device).to(torch.bfloat16)
    if is_compiled:
        for block in network.get_submodule("transformer_blocks").children():
            block.compile()
    optimizer = fused_adamw(network)
    process, packed = DDPM(device=device), packed_batch(case)
    assert packed.text is not None
    text, mask = padded_captions(packed.text, device=device)
    latents, noise = packed.mean.float().to(device), packed.noise.to(device)
    times = process.times(packed.timestep_draws.to(device))

    def step() -> Tensor:
        output: Any = network(
            process.noisy(latents, noise, times).bfloat16(),
            encoder_hidden_states=text,
            timestep=times,
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
        loss = process.loss(output.sample, latents, noise, times).total.mean()
        update(loss, network, optimizer)
        return loss.detach()

    return step


def padded_captions(text: PackedRows, *, device: str) -> tuple[Tensor, Tensor]:
    """Return captions [B, 120, D] padded with zeros, and their mask [B, 120], as diffusers' users make them."""
    mask = torch.arange(MAX_TOKENS) < text.lengths[:, None]
    padded = torch.zeros(*mask.shape, text.values.shape[1], dtype=torch.bfloat16)
    padded[mask] = text.values
    return padded.to(device), mask.to(device)


def fused_adamw(network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of both sides."""
    return torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def update(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Go back from a loss, clip, take a step and forget the gradient, without a wait for the device."""
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_CLIP)
    optimizer.step()
    optimizer.zero_grad()


def time_steps(step: Callable[[], Any], *, device: str, num_steps: int = NUM_STEPS) -> list[float]:
    """Return the seconds of each of `num_steps` calls; the device has its work queued ahead, as in training."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(num_steps):
            step()
            marks.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


@contextmanager
def fresh_memory(device: str) -> Iterator[None]:
    """Let what is inside start with the device's memory empty and its peak forgotten."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


def measure_step(make: Callable[[], Step], *, device: str) -> Timing:
    """Make a step, warm it up, time it, and let go of it."""
    with fresh_memory(device):
        step = make()
        losses = [step() for _ in range(NUM_WARM_UP_STEPS)]
        seconds = statistics.median(time_steps(step, device=device))
        peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return Timing(seconds=seconds, peak_gigabytes=peak_bytes / GIGABYTE, loss=float(losses[0]))


def largest_fitting(case: Case, measure: Callable[[Case], None]) -> Case:
    """Measure a case, with a batch a quarter smaller while the device's memory is too small; returns what was measured.

    Raises:
        torch.OutOfMemoryError: not even a quarter of the batch fits.
    """
    smallest = max(1, case.batch_size // 4)
    while True:
        try:
            measure(case)
            return case
        except torch.OutOfMemoryError:
            if case.batch_size <= smallest:
                raise
            # A multiple of 4, which is what products of small numbers want.
            case = replace(case, batch_size=max(smallest, case.batch_size * 3 // 4 // 4 * 4))


def mfu(case: Case, seconds: float, *, device: str) -> float | None:
    """Return the share of the device's dense bf16 peak that the mathematics of a step takes; None without a peak."""
    peak_teraflops = device_peak_teraflops(torch.device(device))
    return case_flops(case) / TERA / seconds / peak_teraflops if peak_teraflops else None


@lru_cache
def case_flops(case: Case) -> int:
    """Return the operations of a step, those of the mathematics, without padding."""
    side = case.pixels // VAE_FACTOR
    num_text_tokens = int(caption_lengths(case).sum())

    def of_layers(num_layers: int) -> int:
        counter = step_flops(replace(case, num_layers=num_layers))
        return counter.of_samples(case.batch_size, height=side, width=side, num_text_tokens=num_text_tokens)

    # Blocks cost the same: two networks that are quickly counted say what all of them cost.
    return of_layers(1) + (case.num_layers - 1) * (of_layers(2) - of_layers(1))
