"""Muon of a codec: convolutions are stepped as torch's own Muon steps the matrices that they are laid out as."""

from typing import Any

import pytest
import torch
from torch import nn

from training.codec.autoencoder import config_of_shape
from training.codec_keys import CodecShape
from training.config import StageTraining
from training.loop.optimizers.muon import Muon, is_matrix_of_block

SETTINGS = StageTraining(network="vae", objective="reconstruct", optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
BIAS = "decoder.conv_out.bias"
SHAPES = {"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_out.weight": (3, 8, 3, 3), BIAS: (3,)}


def weights_of(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def test_a_convolution_is_the_matrix_of_what_each_output_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's products are then ours on a CPU
    ours, theirs = weights_of(0), weights_of(0)
    matrices = {name: nn.Parameter(theirs[name].detach().flatten(1)) for name in list(SHAPES)[:2]}
    rest = [theirs[BIAS]]
    rate_and_decay: Any = {"lr": SETTINGS.learning_rate, "weight_decay": SETTINGS.weight_decay}
    expected = (
        torch.optim.Muon(list(matrices.values()), adjust_lr_fn="match_rms_adamw", **rate_and_decay),
        torch.optim.AdamW(rest, **rate_and_decay),
    )
    optimizer = Muon(ours, SETTINGS)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    for step in range(3):
        for name, gradient in weights_of(step + 1).items():
            ours[name].grad = gradient.detach().clone()
            if name in matrices:
                matrices[name].grad = gradient.detach().flatten(1).clone()
            else:
                theirs[name].grad = gradient.detach().clone()
        optimizer.step()
        for each in expected:
            each.step()
    # What is orthogonalised was rounded to bf16.
    for name, matrix in matrices.items():
        torch.testing.assert_close(ours[name].flatten(1), matrix, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours[BIAS], rest[0])


def test_of_a_codec_it_takes_every_convolution_and_nothing_of_its_critic() -> None:
    shape = CodecShape(block_channels=[8, 16], layers_per_block=1, norm_groups=2, middle_attention=True)
    network = config_of_shape(shape, sample_size=32).network()
    network.add_module("critic", nn.Sequential(nn.Conv2d(3, 8, 4)))
    taken = {name for name, weight in network.named_parameters() if is_matrix_of_block(name, weight)}
    assert taken == {
        name
        for name, weight in network.named_parameters()
        if weight.ndim >= 2 and name.startswith(("encoder.", "decoder."))
    }
    assert {"encoder.conv_in.weight", "decoder.mid_block.attentions.0.to_q.weight"} <= taken


@pytest.mark.parametrize("name", ["blocks.0.patch.weight", "critic.layers.0.weight"])
def test_no_other_convolution_is_a_matrix(name: str) -> None:
    assert not is_matrix_of_block(name, torch.zeros(4, 3, 2, 2))
