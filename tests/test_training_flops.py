"""Operations of a training step: against the published figure, against a count of the very step, and their sums."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart.dit import DiTConfig
from pixart.model import PixArt, PixArtConfig
from training.loop.flops import StepFlops, device_peak_teraflops

SMALL = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=24, sample_size=8)


def test_dit_xl_2_has_its_published_operations() -> None:
    # Peebles & Xie 2023, table 4: 118.64 G multiplications and additions, counted as one.
    forward = StepFlops(DiTConfig()).of_samples(1, height=32, width=32) / 3
    assert forward / 2 == pytest.approx(118.64e9, rel=1e-3)


@pytest.mark.parametrize("num_text_tokens", [1, 5, 9])
def test_a_step_is_counted_as_torch_counts_it(num_text_tokens: int) -> None:
    model = PixArt(SMALL)
    latents = torch.randn(3, 4, 8, 12, requires_grad=True)
    text = torch.randn(3, num_text_tokens, 24, requires_grad=True)
    # The CPU's fused attention is not among the operations that torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, torch.tensor([1, 2, 3]), text).sum().backward()
    ours = StepFlops(SMALL).of_samples(3, height=8, width=12, num_text_tokens=3 * num_text_tokens)
    # Nothing is propagated back to the timesteps.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert ours >= counter.get_total_flops()


def test_captions_add_up() -> None:
    flops = StepFlops(SMALL)
    parts = [flops.of_samples(1, height=8, width=8, num_text_tokens=length) for length in (2, 11)]
    assert flops.of_samples(2, height=8, width=8, num_text_tokens=13) == sum(parts)


def test_the_peak_of_a_cpu_is_not_guessed() -> None:
    assert device_peak_teraflops(torch.device("cpu")) is None
