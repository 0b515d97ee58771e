"""When a claim of the paper holds, when it fails and when it cannot be told, by figures that are planted."""

import random

import pytest

from toyworld.paper.estimates import Verdict, all_of, difference_of, is_alike, is_more, over_seeds, share_of
from toyworld.paper.readings import Hits


def drawn(rights: list[int], named: int = 2) -> Hits:
    return Hits(by_prompt={f"p{number}": (float(right), named) for number, right in enumerate(rights)})


GOOD, LESS, POOR = drawn([2, 2, 1, 2] * 100), drawn([2, 2, 1, 2] * 92 + [1, 1, 1, 1] * 8), drawn([1, 0, 1, 0] * 100)


def test_a_share_and_its_interval_are_of_prompts_and_not_of_objects() -> None:
    """Objects of a picture are right or wrong together: 200 of both or none tell as much as 200 objects do."""
    together, apart = share_of({0: drawn([2, 0] * 100)}), share_of({0: drawn([1, 0] * 100, named=1)})
    assert together is not None and apart is not None
    assert together.value == apart.value == 0.5
    assert together.half_width == pytest.approx(apart.half_width)
    assert share_of({}) is None


def test_a_difference_is_of_pairs_and_holds_only_beyond_what_one_seed_may_differ_by() -> None:
    large = difference_of({0: GOOD}, {0: POOR})
    small = difference_of({0: GOOD}, {0: LESS})
    assert large is not None and small is not None
    assert large.value == pytest.approx(0.625) and small.value == pytest.approx(0.03)
    # Nearly all pairs are alike, so that the pictures tell it; the luck of one training may be as large.
    of_pictures = difference_of({0: GOOD}, {0: LESS}, is_one_training=True)
    assert of_pictures is not None and of_pictures.half_width < 0.02 < small.half_width
    assert is_more(large, "x").holds is True
    assert is_more(difference_of({0: POOR}, {0: GOOD}), "x").holds is False
    assert is_more(small, "x").holds is None and is_more(of_pictures, "x").holds is True
    assert is_more(None, "x") == Verdict(None, "not run yet")


def test_only_seeds_and_prompts_that_both_arms_have_count() -> None:
    fewer = drawn([0, 0])
    difference = difference_of({0: GOOD, 1: POOR}, {0: fewer, 2: GOOD})
    assert difference is not None and list(difference.by_seed) == [0]
    assert difference.value == 1.0, "of the two prompts that both drew, all four objects"
    assert difference_of({1: GOOD}, {0: GOOD}) is None


def test_of_several_seeds_their_spread_counts_by_students_t() -> None:
    """Three seeds: 4.30 standard errors of the mean; two: 12.71."""
    three = over_seeds({0: 0.02, 1: 0.04, 2: 0.06}, error=0.001, training_error=0.02)
    assert three.value == pytest.approx(0.04)
    assert three.half_width == pytest.approx(4.30 * 0.02 / 3**0.5)
    two = over_seeds({0: 0.03, 1: 0.05}, error=0.001, training_error=0.02)
    assert two.half_width == pytest.approx(12.71 * 0.01, rel=1e-3)
    # Seeds that agree by chance do not make the pictures surer than they are.
    alike = over_seeds({0: 0.04, 1: 0.04, 2: 0.04}, error=0.03, training_error=0.02)
    assert alike.half_width == pytest.approx(1.96 * 0.03)


def test_more_seeds_of_the_same_prompts_make_pictures_no_surer() -> None:
    one = difference_of({0: GOOD}, {0: LESS}, is_one_training=True)
    nine = difference_of(dict.fromkeys(range(9), GOOD), dict.fromkeys(range(9), LESS), is_one_training=True)
    assert one is not None and nine is not None
    assert nine.half_width == pytest.approx(one.half_width)


def test_how_many_objects_prompts_name_is_no_error() -> None:
    """All right: nothing is uncertain over prompts. Of independent objects it is what those alone would give."""
    generator = random.Random(0)
    named = [1, 2, 3] * 200
    right = Hits(by_prompt={f"p{number}": (float(count), count) for number, count in enumerate(named)})
    whole = over_pictures({0: right})
    assert whole == 0
    by_prompt = {
        f"p{number}": (float(sum(generator.random() < 0.93 for _ in range(count))), count)
        for number, count in enumerate(named)
    }
    share = Hits(by_prompt=by_prompt).share
    expected = 1.96 * (share * (1 - share) / sum(named)) ** 0.5
    assert over_pictures({0: Hits(by_prompt=by_prompt)}) == pytest.approx(expected, rel=0.1)


def over_pictures(hits: dict[int, Hits]) -> float:
    """The half width of a share, less what the luck of a training adds to it."""
    share = share_of(hits)
    assert share is not None
    return (max(share.half_width**2 - (1.96 * 0.02) ** 2 / 2, 0.0)) ** 0.5


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(-0.02, 0.03, True), (-0.02, 0.06, None), (0.06, 0.10, False), (-0.10, -0.06, False), (-0.07, 0.07, None)],
)
def test_alike_is_a_whole_interval_within_the_margin(low, high, holds) -> None:
    estimate = over_seeds({0: (low + high) / 2}, error=(high - low) / 2 / 1.96, training_error=0.0)
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
    assert is_alike(estimate, "x", margin=0.05).holds is holds


@pytest.mark.parametrize(
    ("sides", "holds"),
    [((True, True), True), ((True, None), None), ((None, False), False), ((True, False), False)],
)
def test_a_claim_of_several_sides_fails_with_one_and_holds_with_all(sides, holds) -> None:
    verdict = all_of(*(Verdict(side, f"side {number}") for number, side in enumerate(sides)))
    assert verdict.holds is holds and verdict.why == "side 0; side 1"
