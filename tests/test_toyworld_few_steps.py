"""What is said of few steps: their curve beside the weights a student began from, and how it follows the guidance."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from errors import MissingFileError
from toyworld.few_steps import few_steps, guidance_change, score_few_steps
from toyworld.score_curves import score_curves

SCORES = {"teacher": 0.9, "student-1": 0.2, "student-2": 0.85, "student-4": 0.9, "student-8": 0.88}
CONTROL = {"untrained-1": 0.1, "untrained-2": 0.8, "untrained-4": 0.9, "untrained-8": 0.9}
LATE = {"student-from-599": 0.87, "untrained-from-599": 0.86}


def judged(*scores):
    return {name: {"all": share} for each in scores for name, share in each.items()}


def write_samples(folder, levels):
    """Samples of two prompts, each of one level of gray."""
    folder.mkdir(parents=True)
    rows = [{"key": f"p{number}", "file": f"{number}.png", "prompt": "a"} for number in range(len(levels))]
    for row, level in zip(rows, levels, strict=True):
        Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(folder / row["file"])
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")


def test_steps_of_drawing_are_in_the_summary_beside_the_teacher_and_the_control(tmp_path):
    score_few_steps(tmp_path, judged(SCORES, CONTROL, LATE))
    table = json.loads((tmp_path / "summary.json").read_text())["lcm"]
    assert table == {
        **{name.removeprefix("student-"): share for name, share in SCORES.items()},
        **{name.replace("-", "_"): share for name, share in CONTROL.items()},
        "from_599": 0.87,
        "untrained_from_599": 0.86,
    }


def test_a_run_without_a_student_has_no_such_table(tmp_path):
    assert score_few_steps(tmp_path, judged(CONTROL, {"teacher": 0.9})) == {}
    assert few_steps(judged(CONTROL, {"stage2": 0.9, "student-2": 0.1})) is None, "nor one without a teacher"
    assert not (tmp_path / "summary.json").exists()


def test_the_reaction_is_how_far_pictures_move_with_the_guidance_as_a_part_of_the_teachers(tmp_path):
    for name, levels in {"teacher-least": (10, 20), "teacher-most": (50, 80), "student-least": (0, 0)}.items():
        write_samples(tmp_path / "samples" / name, levels)
    assert guidance_change(tmp_path, "teacher") == 50.0
    assert guidance_change(tmp_path, "student") is None and "reaction" not in score_few_steps(tmp_path, judged(SCORES))
    write_samples(tmp_path / "samples" / "student-most", (10, 0))
    assert score_few_steps(tmp_path, judged(SCORES))["reaction"] == pytest.approx(0.1)
    (tmp_path / "samples" / "student-most" / "0.png").unlink()
    with pytest.raises(MissingFileError, match=r"student-most/0\.png does not exist"):
        score_few_steps(tmp_path, judged(SCORES))


def test_the_curve_has_both_lines_and_the_teachers_level_in_scale():
    scores = few_steps(judged(SCORES, CONTROL, LATE))
    assert scores is not None and scores.student == [(1, 0.2), (2, 0.85), (4, 0.9), (8, 0.88)]
    chart = scores.chart
    assert "90.0% by its teacher" in chart and chart.count("<circle") == 8
    of_student = re.findall(r'class="smooth" cx="([^"]*)" cy="([^"]*)"', chart)
    columns, rows = ([float(pair[axis]) for pair in of_student] for axis in (0, 1))
    gaps = np.diff(columns)
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2), "each doubling is as wide"
    level = re.search(r'class="level" points="[^,]*,([^ ]*) ', chart)
    assert level is not None and float(level[1]) == rows[2] < rows[1] < rows[0]


def test_steps_of_drawing_are_no_steps_of_training():
    assert score_curves(judged(SCORES, CONTROL, LATE), stages=["lcm"]) == []
