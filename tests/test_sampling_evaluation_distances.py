"""The mathematics of the scores against closed forms and against scipy."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling.evaluation.distances import (
    CMMD_SCALE,
    Gaussian,
    Moments,
    cmmd,
    frechet_distance,
    squared_mmd,
    wilson_interval,
)


def gaussian(mean, covariance) -> Gaussian:
    return Gaussian(np.asarray(mean, dtype=float), np.asarray(covariance, dtype=float), 100)


def random_covariance(rng: np.random.Generator, width: int, *, rank: int | None = None) -> np.ndarray:
    factor = rng.normal(size=(width, rank or width))
    return factor @ factor.T / width


def test_one_dimension_has_a_closed_form():
    # |3 - 1|² + (2 - 5)²
    assert frechet_distance(gaussian([3], [[4]]), gaussian([1], [[25]])) == pytest.approx(4 + 9)


def test_diagonal_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    first, second, shift = rng.uniform(0.1, 3, 40), rng.uniform(0.1, 3, 40), rng.normal(size=40)
    expected = (shift**2).sum() + ((first - second) ** 2).sum()
    distance = frechet_distance(gaussian(shift, np.diag(first**2)), gaussian(np.zeros(40), np.diag(second**2)))
    assert distance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("width", "rank"), [(5, None), (64, None), (64, 20)])
def test_frechet_distance_is_scipys(width, rank):
    rng = np.random.default_rng(width)
    first, second = random_covariance(rng, width), random_covariance(rng, width, rank=rank)
    mean = rng.normal(size=width)
    # The usual formula, which needs the root of a product that is not symmetric.
    root = scipy.linalg.sqrtm(first @ second)
    expected = mean @ mean + np.trace(first) + np.trace(second) - 2 * np.trace(root).real
    distance = frechet_distance(gaussian(mean, first), gaussian(np.zeros(width), second))
    assert distance == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(gaussian(np.zeros(width), second), gaussian(mean, first)) == pytest.approx(distance)


def test_a_set_has_no_distance_to_itself_also_with_fewer_images_than_dimensions():
    rng = np.random.default_rng(1)
    few = Moments(100).add(rng.normal(size=(30, 100)) * 5).gaussian()
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)


def test_widths_must_agree():
    with pytest.raises(ValueError, match="width 1 and 2"):
        frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_moments_do_not_depend_on_the_batches(sizes, seed):
    rng = np.random.default_rng(seed)
    # far from zero, where sums of squares in float32 would lose everything
    features = (rng.normal(size=(sum(sizes) + 2, 4)) + 1e4).astype(np.float32)
    moments = Moments(4)
    for batch in np.split(features, np.cumsum(sizes)):
        moments.add(batch)
    found = moments.gaussian()
    exact = features.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-6, atol=1e-9)
    assert found.num_images == len(features)


def test_a_covariance_needs_two_images():
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        Moments(3).add(np.ones((1, 3))).gaussian()


def test_mmd_of_two_points_has_a_closed_form():
    # kernels of a point with itself are 1, between the points exp(-|x-y|²/(2 sigma²))
    expected = 2 - 2 * np.exp(-25 / (2 * 9))
    assert squared_mmd(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]]), sigma=3) == pytest.approx(expected)


def test_mmd_is_the_mean_of_kernels_over_more_than_one_block():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(1500, 3)), rng.normal(size=(1100, 3)) + 0.5

    def mean_kernel(x, y):
        return np.exp(-scipy.spatial.distance.cdist(x, y, "sqeuclidean") / (2 * 1.5**2)).mean()

    expected = mean_kernel(first, first) + mean_kernel(second, second) - 2 * mean_kernel(first, second)
    assert squared_mmd(first, second, sigma=1.5) == pytest.approx(expected, rel=1e-9)
    assert squared_mmd(first, first, sigma=1.5) == 0


def test_mmd_of_gaussians_converges_to_its_closed_form():
    # For N(a, 1) and N(b, 1) in one dimension: E k = s / sqrt(s² + 2) exp(-(difference)² / (2 (s² + 2))).
    rng = np.random.default_rng(3)
    sigma, shift = 1.0, 1.0
    scale = sigma / np.sqrt(sigma**2 + 2)
    expected = 2 * scale * (1 - np.exp(-(shift**2) / (2 * (sigma**2 + 2))))
    found = squared_mmd(rng.normal(size=(6000, 1)), rng.normal(size=(6000, 1)) + shift, sigma=sigma)
    assert found == pytest.approx(expected, rel=0.1)


def test_cmmd_is_a_thousand_times_the_mmd_of_sigma_ten():
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert cmmd(x, y) == pytest.approx(CMMD_SCALE * (2 - 2 * np.exp(-2 / 200)))


@pytest.mark.parametrize(("wins", "votes"), [(0, 10), (10, 10), (7, 10), (500, 1000), (1, 1)])
def test_wilsons_interval_is_scipys(wins, votes):
    expected = scipy.stats.binomtest(wins, votes).proportion_ci(method="wilson")
    assert wilson_interval(wins, votes) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_votes_say_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
