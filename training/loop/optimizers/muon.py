"""Muon (Jordan et al., 2024) for the matrices of blocks, and AdamW for all else.

A matrix is moved by the average of its gradients with all singular values made about one, so that directions which few
gradients have in common count as much as others. Rates are AdamW's: an update is as large as its would be (Liu et al.,
2025, "Muon is scalable for LLM training"). Averages lie where the masters do, whatever ZeRO shares out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from training.config import StageTraining
from training.loop.layout import Layout, only_of, whole_layout
from training.loop.optimizers.rule import let_zero_shard
from training.loop.optimizers.turns import turns_of
from training.loop.sizes import TAKEN_AT_ONCE

MOMENTUM = 0.95  # as torch.optim.Muon's


def is_matrix_of_block(name: str, weight: Tensor) -> bool:
    """Whether Muon takes a weight: the matrix of a linear layer of a block, also of an adapter beside one.

    And of a codec each convolution, [m, k, height, width]: of all that one output reads, a row.
    """
    if name.startswith(("encoder.", "decoder.")):
        return name.endswith(".weight") and weight.ndim >= 2
    return "blocks." in name and name.endswith(".weight") and weight.ndim == 2 and "modulation" not in name


def _as_matrices(layout: Layout) -> Layout:
    """Return a layout in which a convolution [m, k, height, width] is the matrix [m, k height width]."""
    weights = [replace(each, shape=torch.Size((each.shape[0], each.shape[1:].numel()))) for each in layout.weights]
    return replace(layout, weights=weights)


class Muon(Optimizer):
    """Keeps `exp_avg` of each matrix of a block, and AdamW's state of all other weights.

    Where ZeRO shares out what is stepped, matrices are a group of their own, and a master has no other weights in it.

    Attributes:
        grad_scale, found_inf: scalars beside the weights, as `Rule` says.
        change: scalar that steps add the sum of squares of what they change to, if there is one.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, weights: Mapping[str, nn.Parameter], settings: StageTraining) -> None:
        matrices = [weight for name, weight in weights.items() if is_matrix_of_block(name, weight)]
        self._matrices = {id(weight) for weight in matrices}
        others = [weight for weight in weights.values() if id(weight) not in self._matrices]
        # Where all is whole, the order of weights is that of the network: as states are saved.
        groups = [others, matrices] if settings.zero_stage else [list(weights.values())]
        super().__init__(
            [{"params": group} for group in groups if group],
            {
                "lr": settings.learning_rate,
                "betas": settings.adam_betas,
                "eps": settings.adam_epsilon,
                "weight_decay": settings.weight_decay,
            },
        )
        self._rate_factor = (settings.muon_learning_rate or settings.learning_rate) / settings.learning_rate
        self.change: Tensor | None = None
        whole = list(weights.values())
        self.place([whole_layout(whole, whole)], device=whole[0].device)

    def place(self, layouts: Sequence[Layout], *, device: torch.device) -> None:
        """Take note where weights lie in masters, which are stepped layout by layout, and where products are fast."""
        self._device = device
        self._layouts = [_as_matrices(only_of(layout, self._matrices)) for layout in layouts]
        self._turns = [turns_of(layout) for layout in self._layouts]
        self._is_of_matrices = {id(master) for layout in self._layouts for master in layout.masters}

    def prepare(self) -> None:
        """Let go of second moments of matrices, which DeepSpeed has given them where a state came from other ranks."""
        for master in self.state:
            self._state(master)

    def _state(self, master: Tensor) -> dict[str, Any]:
        """Return the state of a master, with what is not there made."""
        state, zero = self.state[master], torch.zeros((), device=master.device)
        state.setdefault("step", zero.clone())
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(master)
        if id(master) in self._is_of_matrices:
            # It takes no room, and is there as DeepSpeed makes no state for other ranks without it.
            state["exp_avg_sq"] = zero.expand(master.shape)
        elif "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(master)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step all masters that have a gradient."""
        for group in self.param_groups:
            stepped = {id(master): master for master in group["params"] if master.grad is not None}
            self._step_others(group, [each for key, each in stepped.items() if key not in self._is_of_matrices])
            for number, layout in enumerate(self._layouts):
                if layout.masters and id(layout.masters[0]) in stepped:
                    self._step_matrices(group, number)

    def _step_matrices(self, group: dict[str, Any], number: int) -> None:
        """Step the matrices of a layout; all ranks must call it."""
        masters = self._layouts[number].masters
        gradients = [master.grad.view(-1) for master in masters if master.grad is not None]
        for master, gradient in zip(masters, gradients, strict=True):
            self._average(self._state(master), gradient)
        for turn in self._turns[number]:
            turn.orthogonalize(gradients, device=self._device)
        for master, update in zip(masters, gradients, strict=True):
            self._move(group, master.view(-1), update)

    def _average(self, state: dict[str, Any], gradient: Tensor) -> None:
        """Move a master's average towards its gradient, and leave in the gradient's place Nesterov's look ahead."""
        state["step"] += 1 - self.found_inf
        pieces = (tensor.split(TAKEN_AT_ONCE) for tensor in (state["exp_avg"].view(-1), gradient))
        for average, ahead in zip(*pieces, strict=True):
            ahead /= self.grad_scale
            new = average.lerp(ahead, 1 - MOMENTUM)
            ahead.lerp_(new, MOMENTUM)
            average.copy_(torch.where(self.found_inf > 0, average, new))

    def _move(self, group: dict[str, Any], master: Tensor, update: Tensor) -> None:
        for weight, direction in zip(master.split(TAKEN_AT_ONCE), update.split(TAKEN_AT_ONCE), strict=True):
            change = -group["lr"] * self._rate_factor * (direction + group["weight_decay"] * weight)
            change = torch.where(self.found_inf > 0, 0.0, change)
            weight.add_(change)
            if self.change is not None:
                self.change += change.double().square().sum()

    def _step_others(self, group: dict[str, Any], weights: Sequence[Tensor]) -> None:
        """Step by torch's fused AdamW."""
        if not weights:
            return
        before = [] if self.change is None else [weight.detach().clone() for weight in weights]
        states = [self._state(weight) for weight in weights]
        adamw(
            list(weights),
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


class MuonOfBlocks:
    """The rule of it."""

    def make(self, weights: Mapping[str, nn.Parameter], settings: StageTraining) -> Optimizer:
        """Return the optimizer."""
        let_zero_shard(Muon)
        return Muon(weights, settings)

    def place(self, optimizer: Optimizer, layouts: Sequence[Layout], *, device: torch.device) -> None:
        """Tell it where matrices lie, to be put together."""
        assert isinstance(optimizer, Muon)
        optimizer.place(layouts, device=device)

    def prepare(self, optimizer: Optimizer) -> None:
        """Let state take no more room than it needs; what is not there yet is in the precision of the masters."""
        assert isinstance(optimizer, Muon)
        optimizer.prepare()

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
