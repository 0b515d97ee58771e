"""Weights of a stage as an average of another length than it exported (Karras et al. 2024, post-hoc EMA)."""

from collections.abc import Callable

import torch

from errors import UserError
from pipelines.engine.progress import get_logger
from pixart.dit import DiT
from pixart.model import PixArt
from training.loop.kept_averages import make_average
from training.optimizer_keys import LONGEST_AVERAGE, SHORTEST_AVERAGE
from training.stages.critics import without_critic
from training.stages.stage import StartingPoint

FAR_OFF = 0.1

log = get_logger("convert")


def require_length(typed: str) -> float | None:
    """Return the length that EMA asks for, None where nothing is typed.

    Raises:
        UserError: it is no length that averages are made of.
    """
    if not typed:
        return None
    try:
        length = float(typed)
    except ValueError:
        length = 0.0
    if not SHORTEST_AVERAGE <= length <= LONGEST_AVERAGE:
        raise UserError(f"EMA is {typed!r}: type a relative length from {SHORTEST_AVERAGE} to {LONGEST_AVERAGE}")
    return length


@torch.no_grad()
def put_average(
    network: DiT | PixArt, start: StartingPoint, length: float, *, source: str, say: Callable[[str], None]
) -> None:
    """Set what a stage trained of its network to the average of a relative length, up to the step of its checkpoint.

    Raises:
        UserError: `source` is no checkpoint of a stage, it trained adapters, or has kept no averages.
    """
    checkpoint = start.checkpoint
    if checkpoint is None:
        raise UserError(f"SOURCE ({source}) is no stage of a run and no checkpoint, and EMA is for those alone")
    if checkpoint.has_adapters:
        raise UserError(f"SOURCE ({source}) is a stage that trained adapters, and EMA is for weights of networks")
    made = make_average(checkpoint.path.parent, length=length, last=checkpoint.step)
    for name, weight in without_critic(made.weights).items():
        network.get_parameter(name).copy_(weight)
    say(
        f"{source}: the average of length {length:g} after step {made.step:,}, of {made.num_kept} that were kept; its "
        f"weighing of the steps is {made.error:.2%} off"
    )
    if made.error > FAR_OFF:
        log.warning(
            f"EMA {length:g} is not what comes of the averages that were kept; take a length nearer to training."
            "ema_lengths, or keep more of them by training.ema_snapshot_every"
        )
