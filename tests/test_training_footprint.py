"""Memory of a step: what is reckoned by shapes is what a CPU takes, and grows with samples as a line does."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from encoders.living_bytes import LivingBytes
from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from pixart.processes.make import process_of
from pixart.processes.specs import ddpm_spec
from training.config import KeepActivations, StageTraining
from training.data.blank import SampleShape
from training.launch.memory import KEPT
from training.loop.footprint import Step
from training.objectives.denoise import Denoise
from training.objectives.inputs import NetworkInputs
from training.objectives.objective import Objective
from training.stages.networks import blank_network

CPU = torch.device("cpu")
PIXART = PixArtConfig(num_layers=3, num_heads=2, head_dim=16, caption_channels=20, sample_size=32)
DIT = DiTConfig(num_layers=3, num_heads=2, head_dim=16, num_classes=10, sample_size=32)


def step_of(config: PixArtConfig | DiTConfig, *, dtype: torch.dtype = torch.float32) -> Step:
    is_pixart = isinstance(config, PixArtConfig)

    def objective(device: torch.device) -> Objective:
        null_label = None if is_pixart else config.num_classes
        inputs = NetworkInputs(scaling_factor=1.0, shift_factor=0.0, null_label=null_label, dtype=dtype)
        return Denoise(process=process_of(ddpm_spec(), device=device), inputs=inputs)

    text_width = config.caption_channels if is_pixart else None
    return Step(
        settings=StageTraining(network=config.kind),
        objective=objective,
        networks={"network": blank_network(config)},
        sample=SampleShape(channels=4, height=16, width=16, num_text_tokens=6, text_width=text_width),
        dtype=dtype,
    )


@pytest.mark.parametrize("config", [PIXART, DIT], ids=["pixart", "dit"])
@pytest.mark.parametrize("kept", KEPT)
def test_what_is_reckoned_is_what_a_cpu_takes(config: PixArtConfig | DiTConfig, kept: KeepActivations) -> None:
    step = step_of(config)
    reckoned = [step.reckon(size, kept) for size in (4, 8, 16)]
    measured = [step.measure(size, kept, device=CPU, meter=LivingBytes()) for size in (4, 8, 16)]
    assert reckoned == pytest.approx(measured, rel=0.01)
    assert reckoned[2] - reckoned[1] == pytest.approx(2 * (reckoned[1] - reckoned[0]), rel=0.01)


def test_a_block_keeps_what_the_pages_say() -> None:
    # 24 units of tokens x width, of which products are 14 and inputs 1; and two of its text.
    step, unit = step_of(replace(PIXART, num_layers=20)), 64 * 32 * 4
    per_block = {kept: (step.reckon(9, kept) - step.reckon(8, kept)) / 20 / unit for kept in KEPT}
    assert per_block["all"] == pytest.approx(24, abs=2)
    assert per_block["products"] == pytest.approx(15, abs=2)
    assert per_block["inputs"] == pytest.approx(2.5, abs=1)


def test_what_is_frozen_keeps_less() -> None:
    whole, part = step_of(PIXART), step_of(PIXART)
    (network,) = part.networks.values()
    assert isinstance(network, PixArt | DiT)
    for name, weight in network.named_parameters():
        weight.requires_grad_("blocks.2" in name)
    assert part.reckon(8, "all") < 0.5 * whole.reckon(8, "all")


def test_half_the_width_takes_half() -> None:
    assert step_of(PIXART, dtype=torch.bfloat16).reckon(16, "all") < 0.62 * step_of(PIXART).reckon(16, "all")


def test_the_meter_forgets_what_is_freed_and_what_was_there() -> None:
    before = torch.zeros(1000)
    meter = LivingBytes()
    assert isinstance(meter, TorchDispatchMode)
    with meter.watching(ignored=[before]):
        for _ in range(3):
            after = before.view(10, 100) + 1
            del after
    assert meter.peak_bytes == 4000
