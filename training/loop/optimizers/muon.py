"""Muon (Jordan et al., 2024) for the matrices of blocks, and AdamW for all else.

A matrix is moved by the average of its gradients with all singular values made about one, so that directions which few
gradients have in common count as much as others. Rates are AdamW's: an update is as large as its would be (Liu et al.,
2025, "Muon is scalable for LLM training").
"""

# m x n a matrix, K matrices of one shape

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from training.config import StageTraining
from training.loop.sizes import TAKEN_AT_ONCE

# Of torch.optim.Muon, whose numbers these are.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS, EPSILON, MOMENTUM = 5, 1e-7, 0.95
MATCHED_ADAMW = 0.2


def is_matrix_of_block(name: str, weight: Tensor) -> bool:
    """Whether Muon takes a weight: the matrix of a linear layer of a block, also of an adapter beside one."""
    return "blocks." in name and name.endswith(".weight") and weight.ndim == 2 and "modulation" not in name


def orthogonalized(matrices: Tensor) -> Tensor:
    """Give of matrices [K, m, n] the nearest whose singular values are about one, in bf16, by Newton and Schulz."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(Optimizer):
    """Keeps `exp_avg` of each matrix of a block, and AdamW's state of all other weights.

    Attributes:
        grad_scale, found_inf: scalars beside the weights, as `Rule` says.
        change: scalar that steps add the sum of squares of what they change to, if there is one.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, weights: Mapping[str, nn.Parameter], settings: StageTraining) -> None:
        super().__init__(
            weights.values(),
            {
                "lr": settings.learning_rate,
                "betas": settings.adam_betas,
                "eps": settings.adam_epsilon,
                "weight_decay": settings.weight_decay,
            },
        )
        # By place: DeepSpeed puts masters in the place of weights.
        self._is_matrix = [is_matrix_of_block(name, weight) for name, weight in weights.items()]
        self.change: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step all weights that have a gradient."""
        (group,) = self.param_groups
        stepped = [
            (is_matrix, weight)
            for is_matrix, weight in zip(self._is_matrix, group["params"], strict=True)
            if weight.grad is not None
        ]
        self._step_others(group, [weight for is_matrix, weight in stepped if not is_matrix])
        for matrices in _pieces([weight for is_matrix, weight in stepped if is_matrix]):
            self._step_matrices(group, matrices)

    def _step_matrices(self, group: dict[str, Any], matrices: Sequence[nn.Parameter]) -> None:
        """Step matrices of one shape [m, n] together."""
        scale = MATCHED_ADAMW * max(matrices[0].shape) ** 0.5
        averages = [self.state[weight].setdefault("exp_avg", torch.zeros_like(weight)) for weight in matrices]
        gradients = torch.stack([weight.grad for weight in matrices if weight.grad is not None]) / self.grad_scale
        mean = torch.stack(averages).lerp_(gradients, 1 - MOMENTUM)  # [K, m, n]
        updates = orthogonalized(gradients.lerp_(mean, MOMENTUM)).to(mean.dtype)
        for weight, average, new, update in zip(matrices, averages, mean, updates, strict=True):
            change = -group["lr"] * (scale * update + group["weight_decay"] * weight)
            change = torch.where(self.found_inf > 0, 0.0, change)
            average.copy_(torch.where(self.found_inf > 0, average, new))
            weight.add_(change)
            if self.change is not None:
                self.change += change.double().square().sum()

    def _step_others(self, group: dict[str, Any], weights: Sequence[nn.Parameter]) -> None:
        """Step by torch's fused AdamW."""
        before = [] if self.change is None else [weight.detach().clone() for weight in weights]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] |= {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self.state[weight] for weight in weights]
        adamw(
            list[Tensor](weights),
            [weight.grad for weight in weights if weight.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for weight, old in zip(weights, before, strict=bool(before)):
            assert self.change is not None
            self.change += (weight - old).double().square().sum()


def _pieces(matrices: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield matrices of one shape together, as many as are taken at once."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for weight in matrices:
        by_shape.setdefault(weight.shape, []).append(weight)
    for shape, alike in by_shape.items():
        size = max(1, TAKEN_AT_ONCE // shape.numel())
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


class MuonOfBlocks:
    """The rule of it."""

    def make(self, weights: Mapping[str, nn.Parameter], settings: StageTraining) -> Optimizer:
        """Return the optimizer."""
        return Muon(weights, settings)

    def prepare(self, optimizer: Optimizer) -> None:
        """Do nothing: all state is in the precision of the masters."""

    def first_moment(self, optimizer: Optimizer, weight: Tensor) -> Tensor:
        """Return the state itself."""
        return optimizer.state.get(weight, {}).get("exp_avg", torch.zeros_like(weight))

    def measure(self, optimizer: Optimizer, change: Tensor, *, is_compiled: bool) -> Callable[[], None]:
        """Let steps add to `change` as they go."""
        assert isinstance(optimizer, Muon)
        optimizer.change = change

        def end() -> None:
            optimizer.change = None

        return end
