"""How the learning rate goes over the steps of a stage, and what else happens after some of them."""

from training.config import StageTraining


def learning_rate_at(settings: StageTraining, step: int) -> float:
    """Return the learning rate of `step`, counted from 0: linear warm-up, constant, and a linear end if one is set."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    num_decay_steps = settings.decay_fraction * settings.num_steps
    remaining = min(1.0, (settings.num_steps - step) / (num_decay_steps + 1))
    return settings.learning_rate * warmup * remaining


def is_due(step: int, *, every: int, last: int) -> bool:
    """Whether something happens after `step` steps that happens `every` so many, and after the last."""
    return step % every == 0 or step == last
