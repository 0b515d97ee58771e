"""The gate between stages: each condition holds, fails, or is left to a person, by what lies in the run."""

import json
import os
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

from pipelines.store.checkpoints import Checkpoint, open_checkpoint
from pixart.processes.specs import ddpm_spec, lcm_student
from training.previews.page import write_page
from training.stages.gate import Check, samples_of, stage_gate


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A finished stage whose losses fell."""
    folder = tmp_path / "training" / "stage2" / "step-100"
    write_checkpoint(folder.parent, 100, trainer={"num_steps": 100, "skipped_steps": 0})
    write_metrics(folder.parent, losses=[1.0 - i / 40 for i in range(20)], validation=[1.0, 0.7, 0.69])
    return open_checkpoint(folder)


def write_metrics(stage: Path, *, losses: list[float], validation: list[float]) -> None:
    lines: list[dict] = [{"step": 5 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    lines += [{"step": i, "validation_loss": loss} for i, loss in enumerate(validation)]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def verdicts(checkpoint: Checkpoint) -> dict[str, bool | None]:
    return {check.name: check.holds for check in stage_gate(checkpoint, samples=samples_of(checkpoint))}


def loss_check(checkpoint: Checkpoint) -> Check:
    (found,) = (check for check in stage_gate(checkpoint, samples=Path("none")) if check.name == "loss")
    return found


def draw_samples(checkpoint: Checkpoint, *, seconds_later: float) -> None:
    grid = samples_of(checkpoint) / "grid.png"
    grid.parent.mkdir(parents=True)
    grid.touch()
    written = (checkpoint.path / "trainer.json").stat().st_mtime
    os.utime(grid, (written + seconds_later, written + seconds_later))


def test_a_healthy_stage_leaves_only_its_samples_to_be_looked_at(checkpoint: Checkpoint) -> None:
    draw_samples(checkpoint, seconds_later=10)
    expected = {"steps": True, "loss": True, "validation": True, "health": True, "samples": None}
    assert verdicts(checkpoint) == expected


def test_previews_that_are_there_are_to_be_looked_at(checkpoint: Checkpoint) -> None:
    page = write_page(checkpoint.path.parent)
    (found,) = (check for check in stage_gate(checkpoint, samples=Path("none")) if check.name == "previews")
    assert found.holds is None and found.finding == f"look at {page}"


def test_samples_of_an_earlier_checkpoint_do_not_count(checkpoint: Checkpoint) -> None:
    draw_samples(checkpoint, seconds_later=-10)
    assert verdicts(checkpoint)["samples"] is False


def test_samples_of_one_prompt_count_too(checkpoint: Checkpoint) -> None:
    draw_samples(checkpoint, seconds_later=-10)
    samples = samples_of(checkpoint)
    samples.with_name("stage2-prompt").mkdir()
    (samples.with_name("stage2-prompt") / "grid.png").touch()
    (found,) = (check for check in stage_gate(checkpoint, samples=samples) if check.name == "samples")
    assert found.holds is None and found.finding == f"look at {samples.with_name('stage2-prompt') / 'grid.png'}"


def test_a_loss_that_rose_fails(checkpoint: Checkpoint) -> None:
    write_metrics(checkpoint.path.parent, losses=[0.5 + i / 40 for i in range(20)], validation=[1.0, 0.7, 0.73])
    assert verdicts(checkpoint)["loss"] is False
    assert verdicts(checkpoint)["validation"] is False, "4% over its lowest: it overfits"


@pytest.mark.parametrize(("num_lines", "num_at_ends"), [(9, 1), (20, 2), (80, 8)])
@pytest.mark.parametrize(("standard_errors", "holds"), [(-2.7, True), (-2.3, None), (2.3, None), (2.7, False)])
def test_a_change_of_the_loss_counts_beyond_what_lines_scatter(
    checkpoint: Checkpoint, num_lines: int, num_at_ends: int, standard_errors: float, holds: bool | None
) -> None:
    """A stage that starts from trained weights falls by little, and its last line may well be over its first."""
    scatter = 2 / (0.6745 * 2**0.5)  # of a normal distribution whose neighbours differ by a median of 2
    change = standard_errors * scatter * (2 / num_at_ends) ** 0.5
    losses = [9 + (-1) ** i + change * (i > num_lines // 2) for i in range(num_lines)]
    write_metrics(checkpoint.path.parent, losses=losses, validation=[])
    assert loss_check(checkpoint).holds is holds


def test_a_spike_hides_no_rise(checkpoint: Checkpoint) -> None:
    losses = [0.1 + (i > 10) * 0.05 + (-1) ** i * 0.001 for i in range(20)]
    write_metrics(checkpoint.path.parent, losses=[*losses[:5], 9.0, *losses[6:]], validation=[])
    assert loss_check(checkpoint).holds is False


@pytest.mark.parametrize(("num_lines", "holds"), [(0, None), (7, None), (8, False)])
def test_few_lines_tell_nothing_of_the_loss(checkpoint: Checkpoint, num_lines: int, holds: bool | None) -> None:
    write_metrics(checkpoint.path.parent, losses=[0.5 + i / 40 for i in range(num_lines)], validation=[])
    assert loss_check(checkpoint).holds is holds
    assert ("too few lines" in loss_check(checkpoint).finding) is (holds is None)


def test_the_loss_of_a_student_tells_little(checkpoint: Checkpoint) -> None:
    """It begins at nothing, as the teacher's, and rises while the target runs away from it."""
    path = checkpoint.path / "trainer.json"
    process = ddpm_spec(student=lcm_student(guidance=5.5))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"process": process}))
    write_metrics(checkpoint.path.parent, losses=[0.5 + i / 40 for i in range(20)], validation=[0.7, 1.0])
    found = {check.name: check for check in stage_gate(open_checkpoint(checkpoint.path), samples=Path("none"))}
    for name in ("loss", "validation"):
        assert found[name].holds is None and "of a student it tells little" in found[name].finding


def test_what_was_not_measured_is_not_passed(checkpoint: Checkpoint) -> None:
    (checkpoint.path.parent / "metrics.jsonl").unlink()
    assert verdicts(checkpoint)["loss"] is None
    assert verdicts(checkpoint)["validation"] is None


@pytest.mark.parametrize(("num_skipped", "holds"), [(0, True), (1, False)])
def test_skipped_updates_count(checkpoint: Checkpoint, num_skipped: int, holds: bool) -> None:
    path = checkpoint.path / "trainer.json"
    path.write_text(json.dumps(checkpoint.trainer | {"skipped_steps": num_skipped}))
    assert verdicts(open_checkpoint(checkpoint.path))["health"] is holds


def test_an_unfinished_stage_and_a_dump_fail(checkpoint: Checkpoint) -> None:
    path = checkpoint.path / "trainer.json"
    path.write_text(json.dumps(checkpoint.trainer | {"step": 60}))
    (checkpoint.path.parent / "non-finite-step-61.json").touch()
    found = {check.name: check for check in stage_gate(open_checkpoint(checkpoint.path), samples=Path("none"))}
    assert found["steps"].holds is False
    assert found["health"].holds is False
    assert "non-finite-step-61.json" in found["health"].finding


def test_of_a_codec_the_squared_error_counts_and_nothing_is_drawn(checkpoint: Checkpoint) -> None:
    lines = [{"step": i, "loss": 0.5 + i / 9, "mse": 1 - i / 20, "validation_mse": 1 - i / 20} for i in range(20)]
    (checkpoint.path.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint.trainer["kind"] = "vae"
    assert verdicts(checkpoint) == {"steps": True, "loss": True, "validation": True, "health": True}
