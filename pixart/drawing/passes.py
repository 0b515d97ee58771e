"""What each pass of a network computes while an image is drawn: with or without guidance, all blocks or the first.

It follows from the timesteps and settings alone, so that an image does not depend on those beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of the network: whether the null half of guidance is in it, and whether all blocks are computed."""

    is_guided: bool
    is_fresh: bool = True


def plan_passes(
    times: Sequence[float],
    *,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None = None,
    num_passes_per_refresh: int = 1,
) -> list[Pass]:
    """Return what the passes at these times compute; times are fractions of the way to noise, in [0, 1].

    Guidance is in the passes at times inside the interval, ends included (Kynkaanniemi et al. 2024, arXiv 2404.07724);
    None is everywhere. Of `num_passes_per_refresh` passes the first computes all blocks, and the others take what the
    later blocks gave in it. A guided pass without a guided one to take from computes all as well.
    """
    low, high = guidance_interval or (0.0, 1.0)
    passes: list[Pass] = []
    since_fresh, is_null_kept = num_passes_per_refresh, False
    for time in times:
        is_guided = guidance_scale != 1 and low <= time <= high
        is_fresh = since_fresh >= num_passes_per_refresh or (is_guided and not is_null_kept)
        if is_fresh:
            since_fresh, is_null_kept = 0, is_guided
        since_fresh += 1
        passes.append(Pass(is_guided=is_guided, is_fresh=is_fresh))
    return passes


def num_block_evaluations(passes: Sequence[Pass], *, num_blocks: int, num_first_blocks: int) -> int:
    """Return how often a block is computed for one image in these passes."""
    return sum((2 if item.is_guided else 1) * (num_blocks if item.is_fresh else num_first_blocks) for item in passes)
