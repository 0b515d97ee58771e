"""Twenty steps of AdamW from a seed give the losses they gave when they were first written down.

A change of the layers or of the loss that should change no number shows here; docs/LOG.md has what changed them.
"""

import pytest
import torch

from pixart.dit import DiT, DiTConfig
from pixart.model import PixArt, PixArtConfig
from pixart.processes.ddpm import DDPM

SHAPE = {"num_layers": 3, "num_heads": 2, "head_dim": 16, "sample_size": 8}
LOSSES = {
    "pixart": [
        1.010477,
        1.009213,
        0.961910,
        0.977168,
        0.961185,
        0.909397,
        0.924753,
        0.918404,
        0.858128,
        0.832605,
        0.779935,
        0.759467,
        0.677895,
        0.652825,
        0.705075,
        0.645285,
        0.593408,
        0.519856,
        0.442577,
        0.537309,
    ],
    "ablation": [
        1.010477,
        1.009404,
        0.962595,
        0.981516,
        0.966021,
        0.922413,
        0.941355,
        0.933592,
        0.878967,
        0.857680,
        0.831593,
        0.811540,
        0.756893,
        0.752874,
        0.796164,
        0.752059,
        0.682345,
        0.687362,
        0.575823,
        0.641900,
    ],
    "dit": [
        1.010477,
        1.009017,
        0.963354,
        0.983517,
        0.969549,
        0.928014,
        0.943093,
        0.940162,
        0.885823,
        0.866629,
        0.829455,
        0.812708,
        0.754523,
        0.752795,
        0.796010,
        0.751444,
        0.689746,
        0.687084,
        0.581979,
        0.653219,
    ],
}


def twenty_losses(name: str) -> list[float]:
    torch.manual_seed(0)
    if name == "dit":
        network = DiT(DiTConfig(**SHAPE, num_classes=10))
    else:
        adaln = "per-block" if name == "ablation" else "single"
        network = PixArt(PixArtConfig(**SHAPE, caption_channels=24, adaln=adaln))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.03)
    process, generator = DDPM(), torch.Generator().manual_seed(1)
    losses = []
    for _ in range(20):
        latents, noise = (torch.randn(8, 4, 8, 12, generator=generator) for _ in range(2))
        timesteps = torch.randint(1000, (8,), generator=generator)
        text = torch.randn(8, 7, 24, generator=generator)
        lengths = torch.randint(1, 8, (8,), generator=generator)
        noisy = process.noisy(latents, noise, timesteps)
        if name == "dit":
            output = network(noisy, timesteps, lengths)
        else:
            output = network(noisy, timesteps, text, torch.arange(7) < lengths[:, None])
        loss = process.loss(output, latents, noise, timesteps).total.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_before(name):
    assert twenty_losses(name) == pytest.approx(LOSSES[name], rel=1e-4)
