"""Memory of a step: what is reckoned by shapes is what a CPU takes, and grows with samples as a line does."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
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


def operations(image: torch.Tensor, kernel: torch.Tensor) -> list[torch.Tensor]:
    """Of a view, of types that follow from scalars, of several results of which one is none, and of other strides."""
    turned = image.transpose(1, 3)
    summed, gradient = image * 2, torch.ones_like(image)
    parts = [turned.contiguous(), turned + 1, image.int() + 1, image.int() + 1.5, image.int() + True, image.add_(1)]
    parts += [*torch.native_layer_norm(image, [8], None, None, 1e-6), F.conv2d(image, kernel, padding=1), summed[:, 1:]]
    parts += torch.ops.aten.convolution_backward(
        gradient, image, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    return [part for part in parts if part is not None]


def test_what_is_made_of_remembered_shapes_is_what_was_computed() -> None:
    def given(device: str) -> list[torch.Tensor]:
        image = torch.ones(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
        return operations(image, torch.ones(3, 3, 3, 3, device=device))

    expected = given("meta")
    for _ in range(3):
        meter = LivingBytes()
        with meter.watching(ignored=[]):
            made = given("meta")
            assert [(x.shape, x.stride(), x.dtype) for x in made] == [(x.shape, x.stride(), x.dtype) for x in expected]
            storages = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in made}
            # Of all results but a view and what was changed in place, which lie in storages that are no result's.
            assert len(storages) == len(made)
            del made, storages
    with LivingBytes().watching(ignored=[]):
        assert all(torch.equal(a, b) for a, b in zip(given("cpu"), given("cpu"), strict=True))


@pytest.mark.parametrize("kept", KEPT)
def test_a_peak_is_the_same_of_shapes_that_are_known(kept: KeepActivations, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(PIXART)
    with monkeypatch.context() as patch:
        patch.setattr("encoders.living_bytes._makes_storages", lambda function: False)
        computed = step.reckon(8, kept)
    assert [step.reckon(8, kept), step.reckon(8, kept)] == [computed, computed]
