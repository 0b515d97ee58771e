"""Inception-v3 as FID means it: the TensorFlow network of 2015-12-05, which differs from others of that name.

Layout and weights are those of `pt_inception-2015-12-05-6726825d.pth`, the PyTorch port that pytorch-fid publishes
(Seitzer 2020): modules named as in torchvision, 1008 classes, no auxiliary head. Against Szegedy et al. (2015) average
pools leave padding out of the mean, and the last block pools by maximum.
"""

# B images, C channels, H W pixels

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from errors import UserError

WIDTH = 2048
# Hub files carry the start of their SHA-256 in their name.
PUBLISHED_SHA256 = "6726825d"


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(num_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, num_out, H', W']."""
        return functional.relu(self.bn(self.conv(x)))


def _mean_pool(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(nn.Module):
    """35 x 35 pixels: 1x1, 5x5, double 3x3 and pooled branches."""

    def __init__(self, num_in: int, num_pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(num_in, 64, kernel=1)
        self.branch5x5_1 = ConvNorm(num_in, 48, kernel=1)
        self.branch5x5_2 = ConvNorm(48, 64, kernel=5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(num_in, 64, kernel=1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, kernel=3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, kernel=3, padding=1)
        self.branch_pool = ConvNorm(num_in, num_pooled, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_in, H, W] to [B, 224 + num_pooled, H, W]."""
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_mean_pool(x)),
        ]
        return torch.cat(branches, dim=1)


class BlockB(nn.Module):
    """From 35 x 35 to 17 x 17 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(288, 384, kernel=3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(288, 64, kernel=1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, kernel=3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, kernel=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 288, H, W] to [B, 768, H/2, W/2]."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, stride=2)], dim=1)


def _wide(num_in: int, num_out: int) -> ConvNorm:
    return ConvNorm(num_in, num_out, kernel=(1, 7), padding=(0, 3))


def _high(num_in: int, num_out: int) -> ConvNorm:
    return ConvNorm(num_in, num_out, kernel=(7, 1), padding=(3, 0))


class BlockC(nn.Module):
    """17 x 17 pixels: 7x7 kernels as pairs of 1x7 and 7x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(768, 192, kernel=1)
        self.branch7x7_1 = ConvNorm(768, width, kernel=1)
        self.branch7x7_2 = _wide(width, width)
        self.branch7x7_3 = _high(width, 192)
        self.branch7x7dbl_1 = ConvNorm(768, width, kernel=1)
        self.branch7x7dbl_2 = _high(width, width)
        self.branch7x7dbl_3 = _wide(width, width)
        self.branch7x7dbl_4 = _high(width, width)
        self.branch7x7dbl_5 = _wide(width, 192)
        self.branch_pool = ConvNorm(768, 192, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 768, H, W] to [B, 768, H, W]."""
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_mean_pool(x)),
        ]
        return torch.cat(branches, dim=1)


class BlockD(nn.Module):
    """From 17 x 17 to 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, kernel=1)
        self.branch3x3_2 = ConvNorm(192, 320, kernel=3, stride=2)
        self.branch7x7x3_1 = ConvNorm(768, 192, kernel=1)
        self.branch7x7x3_2 = _wide(192, 192)
        self.branch7x7x3_3 = _high(192, 192)
        self.branch7x7x3_4 = ConvNorm(192, 192, kernel=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 768, H, W] to [B, 1280, H/2, W/2]."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven)]
        return torch.cat([*branches, functional.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8 x 8 pixels: 3x3 kernels fanned out into 1x3 and 3x1; the network's last block pools by maximum."""

    def __init__(self, num_in: int, *, is_last: bool) -> None:
        super().__init__()
        self.pool = _max_pool if is_last else _mean_pool
        self.branch1x1 = ConvNorm(num_in, 320, kernel=1)
        self.branch3x3_1 = ConvNorm(num_in, 384, kernel=1)
        self.branch3x3_2a = ConvNorm(384, 384, kernel=(1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(384, 384, kernel=(3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNorm(num_in, 448, kernel=1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, kernel=3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, kernel=(1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNorm(384, 384, kernel=(3, 1), padding=(1, 0))
        self.branch_pool = ConvNorm(num_in, 192, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_in, H, W] to [B, 2048, H, W]."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, dim=1)


class InceptionV3(nn.Module):
    """Images to FID's features: the 2048 channels of the last average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, kernel=3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, kernel=3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, kernel=3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, kernel=1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, kernel=3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB()
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, is_last=False)
        self.Mixed_7c = BlockE(2048, is_last=True)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, 299, 299] in 0..255 to features [B, 2048]."""
        x = images / 127.5 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # [B, 192, 71, 71]
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [B, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [B, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        return x.mean(dim=(2, 3))


def inception_of(weights: Mapping[str, Tensor], *, origin: str) -> InceptionV3:
    """Return the network with these weights; `origin` names their file in an error.

    Raises:
        UserError: they are not exactly this network's (and its classifier's, which is not used).
    """
    weights = {name: value for name, value in weights.items() if name not in ("fc.weight", "fc.bias")}
    network = InceptionV3()
    expected = network.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    wrong = sorted((expected.keys() - counters) ^ (weights.keys() - counters))
    wrong += sorted(name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape)
    if wrong:
        raise UserError(
            f"{origin} is not the Inception-v3 of FID: {len(wrong)} weights differ in name or shape "
            f"({', '.join(wrong[:3])}, ...); it should be pt_inception-2015-12-05-6726825d.pth"
        )
    network.load_state_dict(weights, strict=False)
    return network.eval().requires_grad_(False)


def is_published(path: Path) -> bool:
    """Whether the file is the one that FID is defined by, judged by its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(PUBLISHED_SHA256)
