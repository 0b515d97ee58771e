"""Power averages of weights, and any other of them after the fact (Karras et al. 2024, section 3 and appendix C).

The power average of exponent g after t steps weighs what the weights were after step s = 1 ... t with
(s^(g+1) - (s-1)^(g+1)) / t^(g+1): it forgets the beginning, however long a stage is. Its length is the deviation of
these places over t. Of averages of two lengths, kept at some steps, the sum that is nearest to another one is a problem
of least squares in their weights alone. We take inner products over steps, where the paper integrates over time.
"""

# T steps, K averages that were kept

from collections.abc import Sequence

import numpy as np

# Singular values below this part of the largest are noise of rounding.
SMALLEST_SINGULAR_VALUE = 1e-12
# Of all steps up to that of an average, in one after all steps: where it is less, products leave the range of fp64.
LEAST_WEIGHT = 1e-100


def exponent_of(length: float) -> float:
    """Return the exponent g of averages of a relative length: length^2 = (g + 1) / ((g + 2)^2 (g + 3)) (equation 3)."""
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real[np.isreal(roots)].max())


def decay_at(length: float, step: int) -> float:
    """Return the decay of `step`, counted from 0: after the first one the average is the weights (equation 2)."""
    return (1 - 1 / (step + 1)) ** (exponent_of(length) + 1)


def combination(kept: Sequence[tuple[int, float]], *, step: int, length: float) -> tuple[np.ndarray, float]:
    """Return what to multiply averages by to have another one as their sum (algorithm 3).

    Args:
        kept: steps done and relative length of each, K of them.
        step: steps done that the sum is to be after, none of them before that of one that is kept.
        length: of the sum.

    Returns:
        the factors, fp64 [K], and how far the sum's weighing of the steps is from the one that is wanted, as a part of
        that one's norm.
    """
    exponents = {each: exponent_of(each) for each in (*(its for _, its in kept), length)}
    usable = [number for number, (t, each) in enumerate(kept) if (t / step) ** (exponents[each] + 1) > LEAST_WEIGHT]
    profiles = [*(kept[number] for number in usable), (step, length)]
    places = np.arange(step + 1) / step
    weights = {each: np.diff(places ** (g + 1)) for each, g in exponents.items()}  # [T], but for t
    sums = {
        (one, other): np.concatenate([[0.0], np.cumsum(weights[one] * weights[other])])
        for one in exponents
        for other in exponents
    }

    def product(one: tuple[int, float], other: tuple[int, float]) -> float:
        (t, g), (u, h) = ((steps, exponents[each]) for steps, each in (one, other))
        return sums[one[1], other[1]][min(t, u)] / ((t / step) ** (g + 1) * (u / step) ** (h + 1))

    gram = np.array([[product(one, other) for other in profiles] for one in profiles])
    norms = np.sqrt(np.diag(gram))
    cosines = gram / np.outer(norms, norms)
    factors, *_ = np.linalg.lstsq(cosines[:-1, :-1], cosines[:-1, -1], rcond=SMALLEST_SINGULAR_VALUE)
    error = 1 - 2 * factors @ cosines[:-1, -1] + factors @ cosines[:-1, :-1] @ factors
    all_factors = np.zeros(len(kept))
    all_factors[usable] = factors * norms[-1] / norms[:-1]
    return all_factors, float(np.sqrt(max(0.0, error)))
