"""The sampler's benchmark on its smallest case gives the pipeline's images."""

from diffusers import AutoencoderKL

from benchmarks.sample import WEIGHTS, Case, measure, toy_model


def test_both_sides_draw_the_same_images():
    cases = [Case(pixels=64, batch_size=2), Case(pixels=64, batch_size=1)]
    figures = measure(toy_model(), AutoencoderKL.from_pretrained(WEIGHTS / "vae"), cases, num_steps=2, num_rounds=1)
    assert list(figures) == ["64px, batch 2", "64px, batch 1"]
    for values in figures.values():
        assert values["max_difference"] <= 2
        assert values["ratio"] > 0
