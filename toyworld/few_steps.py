"""What a student draws in few steps: beside the weights that it began from, drawn alike, and beside its teacher.

Samples are known by their names, as `make demo-lcm` gives them: `teacher`; `student-4` and `untrained-4` in 4 steps;
`student-from-599` and `untrained-from-599` in one step from time 599 on; and, of the same prompts, noise and steps with
the least guidance and the most, `teacher-least`, `teacher-most`, `student-least`, `student-most`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from errors import MissingFileError
from pipelines.as_typed import typed_command
from pipelines.engine.progress import get_logger
from pipelines.store.png_files import read_picture
from pipelines.store.summary import update_summary
from toyworld.charts import few_steps_chart
from toyworld.mending import mend_sample
from toyworld.scoring import SAMPLES_TABLE, read_samples

log = get_logger("toyworld")

TEACHER = "teacher"
STEPS_NAMED = re.compile(r"(student|untrained)-([1-9][0-9]*)")
LATE_NAMED = re.compile(r"(student|untrained)-from-([0-9]+)")
LEAST, MOST = "least", "most"


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """Shares of objects that are all right, by the number of steps, and the teacher's, which has many."""

    teacher: float
    student: list[tuple[int, float]]
    untrained: list[tuple[int, float]]

    @property
    def chart(self) -> Markup:
        """It as an SVG."""
        lines = {"student": self.student, "untrained, drawn alike": self.untrained}
        steps, share = self.student[-1]
        label = f"Objects all right: {share:.1%} by a student in {steps} steps, {self.teacher:.1%} by its teacher"
        drawn = {name: points for name, points in lines.items() if points}
        return few_steps_chart(drawn, level=self.teacher, level_name="teacher, all steps", label=label)


def few_steps(judged: Mapping[str, Mapping[str, Any]]) -> FewSteps | None:
    """Return the scores by steps of a run whose teacher and student were judged, else None."""
    found: dict[str, list[tuple[int, float]]] = {"student": [], "untrained": []}
    for name, figures in judged.items():
        if match := STEPS_NAMED.fullmatch(name):
            found[match[1]].append((int(match[2]), figures["all"]))
    if TEACHER not in judged or not found["student"]:
        return None
    ordered = {name: sorted(points) for name, points in found.items()}
    return FewSteps(teacher=judged[TEACHER]["all"], **ordered)


def score_few_steps(run: Path, judged: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Write the table `lcm` of the summary of a run that has a student, and return it.

    `teacher`, a student's by the number of its steps alone, `untrained_<steps>`, and of both those `from_<time>`. Where
    both drew at the ends of the guidance, `reaction` is the difference of the student's pictures, by the teacher's.

    Raises:
        MissingFileError: a picture is gone.
    """
    scores = few_steps(judged)
    if scores is None:
        return {}
    figures = {"teacher": scores.teacher}
    figures |= {str(steps): share for steps, share in scores.student}
    figures |= {f"untrained_{steps}": share for steps, share in scores.untrained}
    for name, of_samples in sorted(judged.items()):
        if match := LATE_NAMED.fullmatch(name):
            prefix = "" if match[1] == "student" else f"{match[1]}_"
            figures[f"{prefix}from_{match[2]}"] = of_samples["all"]
    changes = {name: guidance_change(run, name) for name in (TEACHER, "student")}
    teacher, student = changes[TEACHER], changes["student"]
    if teacher and student is not None:
        figures["reaction"] = student / teacher
    for name, value in figures.items():
        update_summary(run, f"lcm.{name}", round(value, 4))
    log.info("lcm: " + ", ".join(f"{name} {value:.1%}" for name, value in figures.items()))
    return figures


def guidance_change(run: Path, name: str) -> float | None:
    """Return the mean difference, in levels of 255, of pictures with the least guidance and with the most, if drawn."""
    folders = [run / "samples" / f"{name}-{end}" for end in (LEAST, MOST)]
    if not all((folder / SAMPLES_TABLE).is_file() for folder in folders):
        return None
    least, most = ({row["key"]: folder / row["file"] for row in read_samples(folder)} for folder in folders)
    keys = least.keys() & most.keys()
    return float(np.mean([_difference(least[key], most[key]) for key in sorted(keys)])) if keys else None


def _difference(first: Path, second: Path) -> float:
    if missing := [path for path in (first, second) if not path.is_file()]:
        raise MissingFileError(
            f"{missing[0]} does not exist, though samples.parquet has it; `{typed_command('sample')}` draws it anew"
        )
    one, other = (np.asarray(read_picture(path, mend=mend_sample()), dtype=float) for path in (first, second))
    return float(np.abs(one - other).mean())
