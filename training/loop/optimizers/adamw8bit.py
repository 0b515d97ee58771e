"""AdamW with moments in 8 bits: a code of a value's size relative to the largest of its block (Dettmers et al., 2022).

Codes are torchao's. Its own optimizer keeps moments in fp32, without a word, of weights whose number of elements is no
multiple of a block or under 4,096, as what ZeRO shards nearly always is; it would go on where a gradient is not finite;
and it compiles at its first step on any device. Here a last block is filled up, so that all moments are in 8 bits.
"""

# E elements of a weight, N blocks of them

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.config import StageTraining
from training.loop.compilation import is_step_compiled
from training.loop.layout import Layout
from training.loop.optimizers.rule import let_zero_shard, weight_groups
from training.loop.sizes import PIECE_SIZE

BLOCK_SIZE = 256
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(Optimizer):
    """Keeps of each moment `<name>` codes, uint8 [N * 256], and `<name>_scale`, fp32 [N].

    Attributes:
        grad_scale, found_inf: scalars beside the weights, as `Rule` says.
        change: scalar that steps add the sum of squares of what they change to, if there is one.
        is_compiled: whether a weight is one kernel, else it is stepped piece by piece.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, weights: Iterable[nn.Parameter] | Iterable[dict[str, Any]], settings: StageTraining) -> None:
        super().__init__(
            weights,
            {
                "lr": settings.learning_rate,
                "betas": settings.adam_betas,
                "eps": settings.adam_epsilon,
                "weight_decay": settings.weight_decay,
            },
        )
        self.change: Tensor | None = None
        self.is_compiled = is_step_compiled(settings)

    def prepare(self, weight: Tensor) -> dict[str, Any]:
        """Return the state of a weight; it is made where there is none."""
        state = self.state[weight]
        if not state:
            num_blocks = -(-weight.numel() // BLOCK_SIZE)
            state["step"] = torch.zeros((), device=weight.device)
            for name in MOMENTS:
                zero = _codes_of_values(weight.device)[name].abs().argmin()
                state[name] = zero.to(torch.uint8).expand(num_blocks * BLOCK_SIZE).clone()
                state[f"{name}_scale"] = torch.zeros(num_blocks, device=weight.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what was saved; torch casts all state to the precision of weights, and codes back are what they were."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = state[name].to(torch.uint8)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_weight(group, weight, weight.grad)

    def _step_weight(self, group: dict[str, Any], weight: Tensor, gradient: Tensor) -> None:
        state, values = self.prepare(weight), _codes_of_values(weight.device)
        state["step"] += 1 - self.found_inf
        (beta1, beta2), step = group["betas"], state["step"].clamp(min=1)
        # Numbers that differ from step to step are tensors: compiled code takes others without being compiled anew.
        numbers = (
            torch.full((), group["lr"], device=weight.device) / (1 - beta1**step),
            1 - beta2**step,
            torch.full((), 1 - group["lr"] * group["weight_decay"], device=weight.device),
            self.grad_scale,
            self.found_inf > 0,
        )
        update = _compiled_update() if self.is_compiled else _update
        size = weight.numel() if self.is_compiled else PIECE_SIZE
        size_in_blocks = -(-size // BLOCK_SIZE)
        codes = [state[name].split(size_in_blocks * BLOCK_SIZE) for name in MOMENTS]
        scales = [state[f"{name}_scale"].split(size_in_blocks) for name in MOMENTS]
        pieces = zip(weight.view(-1).split(size), gradient.view(-1).split(size), *codes, *scales, strict=True)
        for piece in pieces:
            tensors = (*piece, *values.values(), *numbers)
            change = update(*tensors, beta1=beta1, beta2=beta2, epsilon=group["eps"])
            if self.change is not None:
                self.change += change


def _update(
    weight: Tensor,
    gradient: Tensor,
    mean_codes: Tensor,
    square_codes: Tensor,
    mean_scale: Tensor,
    square_scale: Tensor,
    mean_values: Tensor,
    square_values: Tensor,
    rate: Tensor,
    correction: Tensor,
    kept: Tensor,
    grad_scale: Tensor,
    is_skipped: Tensor,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> Tensor:
    """Step a weight [E] and its moments in place, unless the step is skipped; returns its change's sum of squares."""
    num_elements, padding = weight.numel(), mean_codes.numel() - weight.numel()
    gradient = nn.functional.pad(gradient / grad_scale, (0, padding))
    mean = _decoded(mean_codes, mean_scale, mean_values).lerp(gradient, 1 - beta1)
    square = _decoded(square_codes, square_scale, square_values).lerp(gradient.square(), 1 - beta2)
    new = kept * weight - rate * (mean / ((square / correction).sqrt() + epsilon))[:num_elements]
    new = torch.where(is_skipped, weight, new)
    change = (new - weight).double().square().sum()
    weight.copy_(new)
    for codes, scale, values, moment in (
        (mean_codes, mean_scale, mean_values, mean),
        (square_codes, square_scale, square_values, square),
    ):
        new_codes, new_scale = _encoded(moment, values)
        codes.copy_(torch.where(is_skipped, codes, new_codes))
        scale.copy_(torch.where(is_skipped, scale, new_scale))
    return change


def _decoded(codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """Return the values [N * 256] of codes."""
    return (values[codes.int()].view(-1, BLOCK_SIZE) * scale[:, None]).view(-1)


def _encoded(moment: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [N * 256] of what is nearest to each value, and the largest of each block [N]."""
    quantize, scale_tensor = _torchao()[1:]
    scaled, scale = scale_tensor(moment, BLOCK_SIZE)
    return quantize(scaled, values), scale


@cache
def _codes_of_values(device: torch.device) -> dict[str, Tensor]:
    """Return the value of each code, fp32 [256], of either moment."""
    dynamic_map = _torchao()[0]
    return {name: torch.tensor(dynamic_map(signed=name == "exp_avg"), device=device) for name in MOMENTS}


@cache
def _torchao() -> tuple[Callable[..., Any], ...]:
    """Import torchao's codes, without its words on the extensions it was not built with and we do not use."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap, scale_tensor

    return create_dynamic_map, quantize_8bit_with_qmap, scale_tensor


@cache
def _compiled_update() -> Callable[..., Tensor]:
    # One code for weights of all sizes.
    return torch.compile(_update, dynamic=True)


class BlockAdamW:
    """The rule of it."""

    def make(self, weights: Mapping[str, nn.Parameter], settings: StageTraining) -> Optimizer:
        """Return the optimizer, which DeepSpeed is told to shard like others: it is element by element."""
        let_zero_shard(AdamW8bit)
        return AdamW8bit(weight_groups(weights, settings), settings)

    def place(self, optimizer: Optimizer, layouts: Sequence[Layout], *, device: torch.device) -> None:
        """Do nothing: it is element by element."""

    def prepare(self, optimizer: Optimizer) -> None:
        """Make all state, so that what DeepSpeed loads finds its precision."""
        assert isinstance(optimizer, AdamW8bit)
        for group in optimizer.param_groups:
            for weight in group["params"]:
                optimizer.prepare(weight)

    def first_moment(self, optimizer: Optimizer, weight: Tensor) -> Tensor:
        """Return what the codes say."""
        state = optimizer.state.get(weight)
        if not state:
            return torch.zeros_like(weight)
        values = _codes_of_values(weight.device)["exp_avg"]
        return _decoded(state["exp_avg"], state["exp_avg_scale"], values)[: weight.numel()].view(weight.shape)

    def measure(self, optimizer: Optimizer, change: Tensor, *, is_compiled: bool) -> Callable[[], None]:
        """Let steps add to `change` as they go."""
        assert isinstance(optimizer, AdamW8bit)
        optimizer.change = change

        def end() -> None:
            optimizer.change = None

        return end
