"""Operations of a training step: against the published figure, against a count of the very step, and their sums."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart.dit import DiTConfig
from pixart.model import PixArt, PixArtConfig
from pixart.processes.ddpm import DDPM
from training.loop.flops import StepFlops, device_peak_teraflops
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.stages.networks import blank_network

SMALL = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=24, sample_size=8)


def step_flops(config: DiTConfig | PixArtConfig) -> StepFlops:
    null_label = None if isinstance(config, PixArtConfig) else config.num_classes
    inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=null_label, dtype=torch.float32)
    objective = Denoise(process=DDPM(device="meta"), inputs=inputs)
    text_width = config.caption_channels if isinstance(config, PixArtConfig) else None
    return StepFlops(objective, {"network": blank_network(config)}, in_channels=4, text_width=text_width)


def test_dit_xl_2_has_its_published_operations() -> None:
    # Peebles & Xie 2023, table 4: 118.64 G multiplications and additions, counted as one; a step takes three times it.
    forward = step_flops(DiTConfig()).of_samples(1, height=32, width=32) / 3
    assert forward / 2 == pytest.approx(118.64e9, rel=1e-3)


@pytest.mark.parametrize("num_text_tokens", [1, 5, 9])
def test_a_step_is_counted_as_torch_counts_it(num_text_tokens: int) -> None:
    model = PixArt(SMALL)
    # The CPU's fused attention is not among the operations that torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        text = torch.randn(3, num_text_tokens, 24)
        model(torch.randn(3, 4, 8, 12), torch.tensor([1, 2, 3]), text).sum().backward()
    ours = step_flops(SMALL).of_samples(3, height=8, width=12, num_text_tokens=3 * num_text_tokens)
    assert ours == counter.get_total_flops()


def test_compressed_keys_and_values_save_three_quarters_of_the_products_with_them() -> None:
    blocks = range(14, 28)  # as PixArt-Sigma's own
    plain, compressed = (
        step_flops(PixArtConfig(sample_size=128, kv_compressed_blocks=tuple(found))).of_samples(
            1, height=128, width=128, num_text_tokens=300
        )
        for found in ((), blocks)
    )
    num_tokens, width = 64 * 64, 1152
    products = 2 * 2 * num_tokens * (num_tokens // 4) * 3 * width  # of queries with keys, and of scores with values
    convolutions = 2 * 2 * 4 * (num_tokens // 4) * width  # of keys and of values, channel by channel
    assert plain - compressed == len(blocks) * 3 * (products - convolutions)


def test_captions_add_up() -> None:
    flops = step_flops(SMALL)
    parts = [flops.of_samples(1, height=8, width=8, num_text_tokens=length) for length in (2, 11)]
    assert flops.of_samples(2, height=8, width=8, num_text_tokens=13) == sum(parts)


def test_the_peak_of_a_cpu_is_not_guessed() -> None:
    assert device_peak_teraflops(torch.device("cpu")) is None
