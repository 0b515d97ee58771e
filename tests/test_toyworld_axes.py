"""The judge's axes: what each counts as right, and over which pictures."""

from toyworld.axes import AXES, AxisScore, score_axes
from toyworld.judge import ObjectHit, Verdict
from toyworld.scenes import SceneObject

WANTED = {"left": ("circle", "red"), "right": ("star", "blue"), "top": ("square", "green")}


def verdict(wanted, seen) -> Verdict:
    hits = []
    for position, (shape, colour) in wanted.items():
        found = seen.get(position, (None, None))
        item = SceneObject(shape, colour, "large", position)
        hits.append(ObjectHit(item, position in seen, found[1] == colour, found[0] == shape))
    return Verdict(tuple(hits), num_extra=len(seen.keys() - wanted.keys()), seen=seen)


def scores(wanted, seen) -> dict[str, float]:
    return {name: axis.score for name, axis in score_axes([verdict(wanted, seen)]).items()}


def test_a_right_picture_is_right_on_every_axis():
    assert scores(WANTED, WANTED) == dict.fromkeys(AXES, 1.0)


def test_colours_swapped_between_shapes_break_the_binding_of_colours_alone():
    seen = WANTED | {"left": ("circle", "blue"), "right": ("star", "red")}
    assert scores(WANTED, seen) == dict.fromkeys(AXES, 1.0) | {"colour_binding": 0.0, "complex": 0.0}


def test_objects_that_changed_places_are_bound_but_not_placed():
    seen = WANTED | {"left": WANTED["right"], "right": WANTED["left"]}
    assert scores(WANTED, seen) == dict.fromkeys(AXES, 1.0) | {"spatial": 0.0, "complex": 0.0}


def test_a_pair_named_twice_must_be_there_twice():
    twice = {"left": ("circle", "red"), "right": ("circle", "red")}
    once = scores(twice, {"left": ("circle", "red"), "right": ("circle", "blue")})
    assert (once["colour_binding"], once["shape_binding"], once["spatial"]) == (0.0, 1.0, 1.0)


def test_something_besides_breaks_count_and_complex_alone():
    seen = WANTED | {"bottom": ("star", "red")}
    assert scores(WANTED, seen) == dict.fromkeys(AXES, 1.0) | {"count": 0.0, "complex": 0.0}


def test_an_axis_is_a_mean_over_the_pictures_it_is_about():
    one = {"left": WANTED["left"]}
    two = {position: WANTED[position] for position in ("left", "right")}
    axes = score_axes([verdict(one, {}), verdict(two, two), verdict(WANTED, two)])
    assert axes["spatial"] == AxisScore(0.5, 2) and axes["complex"] == AxisScore(0.0, 1)
    assert axes["count"] == AxisScore(1 / 3, 3)
    assert score_axes([verdict(one, one)])["spatial"] == AxisScore(0.0, 0)
