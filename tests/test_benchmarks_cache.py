"""`make bench-cache`: paired differences as they are, and one setting after another on the same noise."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from sampling_run import make_run

from benchmarks import cache
from sampling.trained_model import open_run_model


def test_single_objects_have_the_interval_of_paired_differences():
    rng = np.random.default_rng(0)
    before, after = rng.random(500) < 0.9, rng.random(500) < 0.8
    difference = before.astype(float) - after
    points, half = cache.paired_loss([[x] for x in before.tolist()], [[x] for x in after.tolist()])
    assert points == pytest.approx(100 * difference.mean())
    assert half == pytest.approx(196 * difference.std(ddof=1) / math.sqrt(500))


def test_objects_of_an_image_that_fail_together_count_once():
    before, after = [[True], [True], [False], [True]], [[False], [True], [False], [True]]
    once = cache.paired_loss(before, after)
    thrice = cache.paired_loss([3 * image for image in before], [3 * image for image in after])
    assert once == pytest.approx(thrice) and once[1] > 0


def test_lost_and_gained_objects_are_told_apart():
    off = cache.Drawn(right=[[True, False], [True], [False]], num_blocks=20, cpu_seconds=3.0)
    on = cache.Drawn(right=[[False, True], [True], [True]], num_blocks=8, cpu_seconds=2.0)
    figures = cache.compare(off, on)
    assert (figures["num_lost"], figures["num_gained"], figures["points_lost"]) == (1, 2, -25.0)
    assert (figures["ratio_blocks"], figures["ratio_cpu_seconds"]) == (2.5, 1.5)


def test_all_settings_are_measured_on_one_checkpoint(tmp_path: Path, capsys):
    run = make_run(tmp_path)
    figures = cache.measure(open_run_model(run, "stage2"), num_prompts=5, num_steps=10)
    cache.print_table(figures)
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row for row in rows if row] == ["cache = 2", "cache = 3", "cache = 2, interval = (0.2, 0.9)"]
    # two blocks, both halves of guidance: 10 passes of 4, against 5 of 4 and 5 of 2, and 4 of 4 and 6 of 2
    assert (figures["ratio_blocks"], figures["ratio_blocks_cache_3"]) == (1.33, 1.43)
    assert figures["ratio_blocks_cache_2_interval"] > 1.33
    assert figures["num_objects"] >= 5


def test_without_a_demo_it_says_what_it_needs(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cache", "--run", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"stage 2 of a finished `make demo`: .* has no checkpoint"):
        cache.main()
