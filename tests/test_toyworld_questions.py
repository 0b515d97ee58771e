"""Claims about scenes with their truth, which the captioner is taught to answer by."""

import numpy as np
import pytest

from toyworld.questions import is_true, random_claims
from toyworld.scenes import Scene, SceneObject, random_scene

SCENE = Scene(
    (SceneObject("circle", "red", "small", "left"), SceneObject("star", "blue", "large", "top")), "pink", "plain"
)


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        ("a small red circle on the left", True),
        ("There is a blue star", True),
        ("a red circle at the top", False),
        ("a red star", False),
        ("a large red circle", False),
        ("The image shows a red circle on the left and a green star at the top", False),
        ("The background is plain pink", True),
        ("The background is solid cyan", False),
        ("a red circle, on a striped pink background.", False),
        ("The two shapes stand apart", None),
    ],
)
def test_a_claim_is_true_where_all_that_it_names_is_so(claim: str, truth: bool | None) -> None:
    assert is_true(SCENE, claim) is truth


def test_half_of_the_claims_are_true_and_false_ones_are_of_every_kind() -> None:
    rng = np.random.default_rng(41)
    scenes = [random_scene(rng) for _ in range(200)]
    claims = [(scene, found) for scene in scenes for found in random_claims(scene, rng, num=8)]
    assert sum(found.truth for _, found in claims) == len(claims) / 2
    parsed = [(found.truth, is_true(scene, found.claim)) for scene, found in claims]
    assert all(seen in (truth, None) for truth, seen in parsed)
    assert 0.03 < sum(seen is None for _, seen in parsed) / len(parsed) < 0.2
    false = [found.claim for _, found in claims if not found.truth]
    words = ("circle", "star", "red", "left", "large", "background")
    assert all(any(word in claim for claim in false) for word in words)
    assert len(set(false)) > 300


def test_an_answer_tells_what_is_at_the_place_of_the_claim() -> None:
    rng = np.random.default_rng(42)
    claims = random_claims(SCENE, rng, num=200)
    assert {found.there for found in claims} == {"", "nothing", "a small red circle", "a large blue star"}
    assert all(found.there != "nothing" for found in claims if found.truth)
