"""Weights in 8 bits: how far they are off, what a device holds of them, and that a text encoder reads with them."""

from pathlib import Path

import pytest
import torch
from tiny_encoders import save_decoder, save_text_encoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from encoders.int8_weights import round_weights
from encoders.living_bytes import LivingBytes, plain_parts, storage_bytes
from encoders.opening import open_text_encoder

CPU = torch.device("cpu")


def test_weights_are_within_half_a_step_and_multiply_as_they_are():
    torch.manual_seed(0)
    linear = nn.Linear(40, 9).requires_grad_(False)
    linear.weight[3] = 0
    before = linear.weight.clone()
    round_weights(linear, device=CPU)
    values, scale, _ = plain_parts(linear.weight)
    assert values.dtype == torch.int8
    step = before.abs().amax(dim=1, keepdim=True) / 127.5
    restored = values.float() * scale
    assert ((restored - before).abs() <= step / 2 + 1e-7).all()
    x = torch.randn(5, 40)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, restored, linear.bias))


@pytest.mark.parametrize("save", [save_text_encoder, save_decoder], ids=["t5", "gemma2"])
def test_an_encoder_in_eight_bits_is_close(save, tmp_path: Path):
    folder = save(tmp_path / "model")
    texts = ["a red circle, left", "two"]
    exact, rounded = (
        open_text_encoder(str(folder), max_tokens=40, dtype="float32", is_8bit=is_8bit) for is_8bit in (False, True)
    )
    layers = [module for module in rounded.model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) >= 2 * 4 and all(plain_parts(layer.weight)[0].dtype == torch.int8 for layer in layers)
    for expected, found in zip(exact.encode(texts), rounded.encode(texts), strict=True):
        assert 0 < (found - expected).norm() / expected.norm() < 0.02


def test_a_device_never_holds_more_than_one_layer_as_it_was():
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16) for _ in range(16)))
    whole = storage_bytes(model.parameters())
    meter = LivingBytes(device="meta")  # which stands for a GPU
    assert isinstance(meter, TorchDispatchMode)
    with meter:
        round_weights(model.requires_grad_(False), device=torch.device("meta"))
    kept = storage_bytes(model.parameters())
    assert whole == 16 * 256 * 256 * 2 and kept < 0.52 * whole
    # A layer in bfloat16, in float32 while it is rounded, and as it is rounded.
    assert kept <= meter.peak_bytes < kept + 20 * 256 * 256
