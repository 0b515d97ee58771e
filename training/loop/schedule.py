"""How the learning rate goes over the steps of a stage, and what else happens after some of them."""

import math

from training.config import StageTraining
from training.optimizer_keys import DecayShape


def learning_rate_at(settings: StageTraining, step: int) -> float:
    """Return the learning rate of `step`, counted from 0: linear warm-up, constant, and an end if one is set."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    num_decay_steps = settings.decay_fraction * settings.num_steps
    remaining = min(1.0, (settings.num_steps - step) / (num_decay_steps + 1))
    return settings.learning_rate * warmup * _factor(settings.decay_shape, remaining)


def _factor(shape: DecayShape, remaining: float) -> float:
    """Return the part of the rate that is left where `remaining`, from 1 to 0, of its decay is to come."""
    match shape:
        case "linear":
            return remaining
        case "cosine":  # Loshchilov and Hutter 2017, equation 5
            return (1 - math.cos(math.pi * remaining)) / 2
        case "sqrt":  # Hägele et al. 2024, "1-sqrt"
            return 1 - math.sqrt(1 - remaining)


def is_due(step: int, *, every: int, last: int) -> bool:
    """Whether something happens after `step` steps that happens `every` so many, and after the last."""
    return step % every == 0 or step == last
