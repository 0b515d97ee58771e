"""Part `muon_256`: an update of XL/2's weights by Muon (Jordan et al. 2024) against one by AdamW, and against the step.

Muon takes the matrices of blocks, AdamW the rest. Matrices of one shape are orthogonalised together, in one batched
product after the other. Shared out over eight cards each would orthogonalise some of the matrices and pass them on;
measured is what the card with the largest share computes, on this one card: what passing on costs is not in it.
`training.optimizer = "muon"` steps by the same products: all on each card under ZeRO 0, shared out under 1 to 3.
"""

# pyright: reportPrivateImportUsage=false
# K matrices of one shape, m x n

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import (
    Tensor,
    nn,
)
from torch import (
    _foreach_add_ as foreach_add_,
)
from torch import (
    _foreach_lerp as foreach_lerp,
)
from torch import (
    _foreach_lerp_ as foreach_lerp_,
)
from torch import (
    _foreach_mul_ as foreach_mul_,
)

from benchmarks.gpu.parts import Figures, Size
from benchmarks.gpu.steps import fresh_memory, measure_step, our_step, random_network, time_steps
from benchmarks.gpu.training import TINY, XL_256
from benchmarks.train import LEARNING_RATE, WEIGHT_DECAY
from pixart.model import PixArt
from training.loop.optimizers.muon import MOMENTUM
from training.loop.optimizers.newton_schulz import NUM_ITERATIONS, matching_scale, num_multiplications, orthogonalized

NUM_CARDS = 8


class BatchedMuon:
    """Muon over matrices, those of one shape together: Nesterov momentum, decoupled weight decay."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for weight in weights:
            groups[weight.shape].append(weight)
        self._groups = [(group, [torch.zeros_like(weight) for weight in group]) for group in groups.values()]

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight by its gradient."""
        for weights, moments in self._groups:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            foreach_lerp_(moments, gradients, 1 - MOMENTUM)
            nesterov = foreach_lerp(gradients, moments, MOMENTUM)
            updates = orthogonalized(torch.stack(nesterov)).to(weights[0].dtype)  # [K, m, n]
            foreach_mul_(weights, 1 - LEARNING_RATE * WEIGHT_DECAY)
            foreach_add_(weights, list(updates), alpha=-LEARNING_RATE * matching_scale(weights[0].shape))


def cost(shape: torch.Size) -> int:
    """Return the multiplications of an orthogonalisation of an m x n matrix."""
    return NUM_ITERATIONS * num_multiplications(shape)


def largest_share(weights: Sequence[Tensor], *, num_cards: int) -> list[Tensor]:
    """Deal matrices out by cost, each to whom has least so far; returns what the one with most has got."""
    shares: list[list[Tensor]] = [[] for _ in range(num_cards)]
    loads = [0] * num_cards
    for weight in sorted(weights, key=lambda weight: cost(weight.shape), reverse=True):
        least = loads.index(min(loads))
        shares[least].append(weight)
        loads[least] += cost(weight.shape)
    return shares[loads.index(max(loads))]


def muon_256(size: Size) -> Figures:
    """Updates of fp32 weights, with the step of 256px, batch 176, beside them."""
    case, device = (TINY if size.is_tiny else XL_256), size.device
    with fresh_memory(device):
        seconds = _time_updates(random_network(case, device=device), device=device)
    size.keep({f"muon_256_{name}_milliseconds": round(1e3 * value, 2) for name, value in seconds.items()})
    step = measure_step(partial(our_step, case, device=device), device=device).seconds
    # The step has an AdamW over bf16 weights in it; it is left in, as it is small.
    return {
        "muon_256_step_milliseconds": round(1e3 * step, 2),
        "muon_256_share_of_step": round(seconds["update"] / step, 4),
        "muon_256_share_of_step_over_eight": round(seconds["largest_of_eight"] / step, 4),
    }


def _time_updates(network: PixArt, *, device: str) -> dict[str, float]:
    """Return the seconds of an update of all weights by each optimizer, and of the largest of eight shares."""
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight) * 1e-3
    matrices = [layer.weight for layer in network.blocks.modules() if isinstance(layer, nn.Linear)]
    in_blocks = {id(weight) for weight in matrices}
    rest = _adamw([weight for weight in network.parameters() if id(weight) not in in_blocks])
    by_matrix = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    batched = BatchedMuon(matrices)
    shared = BatchedMuon(largest_share(matrices, num_cards=NUM_CARDS))

    def both(muon: BatchedMuon | torch.optim.Optimizer) -> None:
        muon.step()
        rest.step()

    updates: dict[str, Callable[[], object]] = {
        "adamw": _adamw(list(network.parameters())).step,
        "update": partial(both, batched),
        "torch_update": partial(both, by_matrix),
        "largest_of_eight": shared.step,
    }
    seconds = {}
    for name, update in updates.items():
        update()  # the first makes the state
        seconds[name] = statistics.median(time_steps(update, device=device))
    return seconds


def _adamw(weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
