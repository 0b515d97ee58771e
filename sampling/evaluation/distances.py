"""The mathematics of the scores: means and covariances as a stream, Fréchet distance, MMD, Wilson's interval."""

# N, M numbers of images, D width of a feature; everything is float64

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
WILSON_Z = 1.959963984540054  # 95%
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian that a Fréchet distance sees of a set of features: mean [D], covariance [D, D]."""

    mean: Array
    covariance: Array
    num_images: int


class Moments:
    """Mean and covariance of features that come in batches, in float64, without keeping them.

    Batches are merged by Chan, Golub and LeVeque's update (1979), which does not cancel for features far from zero.
    """

    def __init__(self, width: int) -> None:
        self.num_images = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, features: NDArray[np.floating]) -> Self:
        """Take in features [N, D] of any float type; returns itself."""
        if not len(features):
            return self
        batch = np.asarray(features, dtype=np.float64)
        mean = batch.mean(axis=0)
        centred = batch - mean
        total = self.num_images + len(batch)
        shift = mean - self._mean
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.num_images * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self.num_images = total
        return self

    def gaussian(self) -> Gaussian:
        """Return mean and unbiased covariance (divided by N - 1).

        Raises:
            ValueError: there are fewer than two images.
        """
        if self.num_images < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.num_images}")
        return Gaussian(self._mean.copy(), self._scatter / (self.num_images - 1), self.num_images)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017, equation 6).

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½). The trace of the root is the sum of the roots of the eigenvalues of
    C1^½ C2 C1^½, which is symmetric and positive semi-definite: no complex numbers and no epsilon on the diagonal,
    also where there are fewer images than dimensions.

    Raises:
        ValueError: the widths differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of width {len(first.mean)} and {len(second.mean)} have no distance")
    root = _square_root(first.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ second.covariance @ root)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    difference = first.mean - second.mean
    distance = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace_of_root
    return max(0.0, float(distance))


def _square_root(matrix: Array) -> Array:
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T


def squared_mmd(first: Array, second: Array, *, sigma: float) -> float:
    """Return the squared maximum mean discrepancy of features [N, D] and [M, D] under a Gaussian kernel.

    The kernel is exp(-|x - y|² / (2 sigma²)); the estimate is the biased one of least variance (Gretton et al. 2012,
    equation 5), as CMMD takes it: 0 for equal sets, never negative. Kernels are summed in blocks of rows.
    """
    same_first = _mean_kernel(first, first, sigma)
    same_second = _mean_kernel(second, second, sigma)
    return max(0.0, same_first + same_second - 2 * _mean_kernel(first, second, sigma))


def _mean_kernel(first: Array, second: Array, sigma: float) -> float:
    second_norms = (second**2).sum(axis=1)
    total = 0.0
    for start in range(0, len(first), _BLOCK_ROWS):
        rows = first[start : start + _BLOCK_ROWS]
        squared = (rows**2).sum(axis=1)[:, None] + second_norms - 2 * rows @ second.T  # [rows, M]
        total += np.exp(-squared.clip(min=0) / (2 * sigma**2)).sum()
    return float(total / (len(first) * len(second)))


def cmmd(first: Array, second: Array) -> float:
    """Return CMMD of CLIP embeddings [N, D] and [M, D] of unit length (Jayasumana et al. 2024).

    The squared MMD with a Gaussian kernel of sigma 10, times 1000.
    """
    return CMMD_SCALE * squared_mmd(first, second, sigma=CMMD_SIGMA)


def wilson_interval(num_wins: int, num_votes: int, *, z: float = WILSON_Z) -> tuple[float, float]:
    """Return Wilson's (1927) score interval of a proportion, 95% by default; no votes give (0, 1)."""
    if num_votes == 0:
        return 0.0, 1.0
    rate = num_wins / num_votes
    spread = z * math.sqrt(rate * (1 - rate) / num_votes + z**2 / (4 * num_votes**2))
    centre, scale = rate + z**2 / (2 * num_votes), 1 + z**2 / num_votes
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
