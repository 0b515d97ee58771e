"""Newton's and Schulz's iteration, by which Muon (Jordan et al., 2024) makes all singular values of matrices one."""

# m x n a matrix, K matrices of one shape

import torch
from torch import Tensor

# Of torch.optim.Muon, whose numbers these are.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS, EPSILON = 5, 1e-7
MATCHED_ADAMW = 0.2


def orthogonalized(matrices: Tensor) -> Tensor:
    """Give of matrices [K, m, n] the nearest whose singular values are about one.

    Products are in bf16, but in fp32 on a CPU: one without instructions for bf16 takes thirty times as long for it.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def matching_scale(shape: torch.Size) -> float:
    """Return what makes the update of a matrix [m, n] as large as AdamW's would be (Liu et al., 2025)."""
    return MATCHED_ADAMW * max(shape) ** 0.5


def num_multiplications(shape: torch.Size) -> int:
    """Return those of an iteration of an m x n matrix."""
    short, long = sorted(shape)
    return 2 * short * short * long + short**3
