"""Differences of two arms with what they are uncertain by, and what can be said of them.

Both arms draw the same prompts from the same noise, so a difference is one of pairs, and its standard error that of a
ratio over prompts, of objects gained by objects named; all seeds draw the same prompts, so that more of them make it no
smaller than their mean has it. That says nothing of the training: another seed gives other weights. With two seeds or
more the spread of the seeds' differences counts; of one alone `TRAINING_ERROR` is added for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toyworld.paper.readings import Hits

# Standard error of a difference of two trainings that differ in their seed alone, where one seed is all there is.
TRAINING_ERROR = 0.02
# Factor of a standard error that gives 95%: Student's t by degrees of freedom, the seeds less one.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
NORMAL = 1.96
NOT_RUN = "not run yet"
LABELS = {True: "holds", False: "does not hold", None: "cannot be told"}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with the half width of its 95% interval, and the figure of each seed."""

    value: float
    half_width: float
    by_seed: Mapping[int, float]

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half_width

    def figures(self) -> dict[str, float | int]:
        """Return it as `summary.json` has it."""
        return {
            "value": round(self.value, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "seeds": len(self.by_seed),
        }


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, None where that cannot be told, and why."""

    holds: bool | None
    why: str

    @property
    def label(self) -> str:
        """It in two or three words: one of `LABELS`."""
        return NOT_RUN if self.why == NOT_RUN else LABELS[self.holds]


def share_of(hits: Mapping[int, Hits]) -> Estimate | None:
    """Return the share of objects that are all right, over the seeds there are; None of none."""
    if not hits:
        return None
    return over_seeds(
        {seed: one.share for seed, one in hits.items()},
        error=_error_over_prompts([one.by_prompt for one in hits.values()]),
        training_error=TRAINING_ERROR / math.sqrt(2),
    )


def difference_of(
    first: Mapping[int, Hits], second: Mapping[int, Hits], *, is_one_training: bool = False
) -> Estimate | None:
    """Return how much larger the first arm's share is, over the seeds that both have and prompts that both drew.

    Args:
        first: by seed.
        second: by seed.
        is_one_training: whether both are drawn from the same weights, so that no training's luck is in the difference.
    """
    gains = {}
    for seed in sorted(first.keys() & second.keys()):
        one, other = first[seed].by_prompt, second[seed].by_prompt
        gained = {key: (one[key][0] - other[key][0], one[key][1]) for key in sorted(one.keys() & other.keys())}
        if gained:
            gains[seed] = Hits(by_prompt=gained)
    if not gains:
        return None
    return over_seeds(
        {seed: gained.share for seed, gained in gains.items()},
        error=_error_over_prompts([gained.by_prompt for gained in gains.values()]),
        training_error=0.0 if is_one_training else TRAINING_ERROR,
    )


def over_seeds(values: Mapping[int, float], *, error: float, training_error: float) -> Estimate:
    """Return the mean over seeds, of which the standard `error` over pictures is known, too."""
    count = len(values)
    mean = sum(values.values()) / count
    if count == 1:
        return Estimate(value=mean, half_width=NORMAL * math.hypot(error, training_error), by_seed=values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values.values()) / (count - 1))
    of_seeds = STUDENT[min(count - 1, max(STUDENT))] * deviation / math.sqrt(count)
    return Estimate(value=mean, half_width=max(of_seeds, NORMAL * error), by_seed=values)


def _error_over_prompts(of_seeds: Sequence[Mapping[str, tuple[float, int]]]) -> float:
    """Standard error over prompts of objects gained by objects named, both by prompt and seed (Cochran 1977, 6.4).

    A prompt counts once, with the mean of its seeds.
    """
    prompts: dict[str, list[tuple[float, int]]] = {}
    for by_prompt in of_seeds:
        for key, pair in by_prompt.items():
            prompts.setdefault(key, []).append(pair)
    means = [tuple(sum(part) / len(pairs) for part in zip(*pairs, strict=True)) for pairs in prompts.values()]
    num_named = sum(named for _, named in means)
    ratio = sum(gained for gained, _ in means) / num_named
    squares = sum((gained - ratio * named) ** 2 for gained, named in means)
    return math.sqrt(squares * len(means) / max(len(means) - 1, 1)) / num_named


def is_more(difference: Estimate | None, what: str) -> Verdict:
    """Return whether a difference is above 0: it holds, or fails, where the whole interval is on that side."""
    if difference is None:
        return Verdict(None, NOT_RUN)
    said = f"{what}: {points(difference)}"
    if difference.low > 0:
        return Verdict(True, f"{said}, all of the interval above 0")
    if difference.high < 0:
        return Verdict(False, f"{said}, all of the interval below 0")
    return Verdict(None, f"{said}, and the interval has 0 in it")


def is_alike(difference: Estimate | None, what: str, *, margin: float) -> Verdict:
    """Return whether a difference is at most `margin` either way, with the whole interval, or beyond it."""
    if difference is None:
        return Verdict(None, NOT_RUN)
    said = f"{what}: {points(difference)}"
    if -margin < difference.low and difference.high < margin:
        return Verdict(True, f"{said}, all of the interval within {100 * margin:g} points")
    if difference.low > margin or difference.high < -margin:
        return Verdict(False, f"{said}, all of the interval beyond {100 * margin:g} points")
    return Verdict(None, f"{said}, and the interval reaches across {100 * margin:g} points")


def all_of(*verdicts: Verdict) -> Verdict:
    """Return the verdict of a claim that has several sides: it fails with one, and holds with all."""
    values = [verdict.holds for verdict in verdicts]
    holds = False if False in values else None if None in values else True
    return Verdict(holds, "; ".join(dict.fromkeys(verdict.why for verdict in verdicts)))


def points(difference: Estimate) -> str:
    """Return a difference of shares in points, with its interval."""
    return f"{100 * difference.value:+.1f} points ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def percent(share: Estimate) -> str:
    """Return a share in percent, with its half width."""
    return f"{100 * share.value:.1f} ± {100 * share.half_width:.1f}%"
