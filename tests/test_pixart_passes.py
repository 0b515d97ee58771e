"""What the passes of a network compute."""

from pixart.drawing.passes import Pass, num_block_evaluations, plan_passes

TIMES = [0.999, 0.9, 0.8, 0.6, 0.4, 0.2, 0.05]


def marks(passes: list[Pass]) -> str:
    """G guided, c conditional alone; a small letter after it where blocks are left out."""
    return " ".join(("G" if item.is_guided else "c") + ("" if item.is_fresh else "-") for item in passes)


def test_guidance_is_inside_the_interval_with_its_ends():
    assert marks(plan_passes(TIMES, guidance_scale=3.0)) == "G G G G G G G"
    assert marks(plan_passes(TIMES, guidance_scale=3.0, guidance_interval=(0.2, 0.8))) == "c c G G G G c"
    assert marks(plan_passes(TIMES, guidance_scale=1.0, guidance_interval=(0.2, 0.8))) == "c c c c c c c"


def test_all_blocks_are_computed_at_every_nth_pass():
    assert marks(plan_passes(TIMES, guidance_scale=3.0, num_passes_per_refresh=2)) == "G G- G G- G G- G"
    assert marks(plan_passes(TIMES, guidance_scale=1.0, num_passes_per_refresh=3)) == "c c- c- c c- c- c"


def test_a_guided_pass_takes_from_a_guided_one():
    plan = plan_passes(TIMES, guidance_scale=3.0, guidance_interval=(0.2, 0.9), num_passes_per_refresh=3)
    assert marks(plan) == "c G G- G- G G- c-"


def test_block_evaluations_are_counted_for_both_halves_of_guidance():
    passes = plan_passes(TIMES, guidance_scale=3.0, guidance_interval=(0.2, 0.9), num_passes_per_refresh=3)
    assert num_block_evaluations(passes, num_blocks=28, num_first_blocks=1) == 28 + 2 * (28 + 1 + 1 + 28 + 1) + 1
