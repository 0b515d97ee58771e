"""Power averages: how they weigh steps, and one of any length made of two that were kept on the way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sound_run import require_sound
from training_run import make_run, train

from errors import UserError
from pipelines.recipe import load_recipe
from pipelines.store.checkpoints import DamagedCheckpointError, require_whole
from pixart.convert import load_diffusers
from training.config import StageTraining, stage_training
from training.convert import main as convert
from training.launch.disk_needs import checkpoint_bytes
from training.launch.reckoning import rank_bytes
from training.loop.kept_averages import drop_averages, make_average, path_of, write_averages
from training.loop.power_average import combination, decay_at, exponent_of
from training.stages.weights import WeightCounts

LENGTHS = (0.05, 0.1)


def averaged(values: np.ndarray, length: float) -> np.ndarray:
    """The power average after each step, one step behind the other."""
    average, found = np.zeros_like(values[0]), []
    for step, value in enumerate(values):
        decay = decay_at(length, step)
        average = decay * average + (1 - decay) * value
        found.append(average)
    return np.stack(found)


def walk(num_steps: int, num_weights: int = 50) -> np.ndarray:
    """Weights that begin far from where they come to, and are drawn there while they shake."""
    generator = np.random.default_rng(0)
    return 3 * np.exp(-np.arange(num_steps) / 100)[:, None] + generator.normal(size=(num_steps, num_weights)).cumsum(0)


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.1, 6.94), (0.25, 0.72)])
def test_the_exponents_are_the_papers_and_lengths_are_deviations_of_places(length: float, exponent: float) -> None:
    """Of 0.05 and 0.1 the paper says them in section 3.2; 0.25 is solved by hand."""
    assert exponent_of(length) == pytest.approx(exponent, abs=0.02)
    weights = averaged(np.eye(400), length)[-1]
    assert weights.sum() == pytest.approx(1)
    places = np.arange(1, 401) / 400
    deviation = (weights @ places**2 - (weights @ places) ** 2) ** 0.5
    assert deviation == pytest.approx(length, rel=0.02)


def test_the_first_step_leaves_nothing_of_before() -> None:
    assert decay_at(0.05, 0) == 0 and 0.8 < decay_at(0.05, 99) < 0.84


@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.15, 0.25])
def test_an_average_of_any_length_is_made_of_two_that_were_kept(tmp_path: Path, length: float) -> None:
    values = walk(1200)
    kept = {each: averaged(values, each) for each in LENGTHS}
    for step in range(50, 1201, 50):
        write_averages(
            path_of(tmp_path, step), {each: {"a.weight": torch.tensor(kept[each][step - 1])} for each in LENGTHS}
        )
    direct = averaged(values, length)
    made = make_average(tmp_path, length=length, last=1200)
    spread = np.linalg.norm(values[-1] - direct[-1])
    assert (made.step, made.num_kept) == (1200, 48)
    assert made.weights["a.weight"].dtype == torch.float32
    error = np.linalg.norm(made.weights["a.weight"].numpy() - direct[-1]) / spread
    assert error < (0.003 if 0.05 <= length <= 0.1 else 0.02)
    assert made.error < (0.003 if 0.05 <= length <= 0.1 else 0.06)
    # Of an earlier moment, and of what was kept by then alone.
    early = make_average(tmp_path, length=length, last=449)
    assert (early.step, early.num_kept) == (400, 16)
    assert np.linalg.norm(early.weights["a.weight"].numpy() - direct[399]) < 0.1 * np.linalg.norm(values[399])


def papers_product(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The inner product of two profiles as integrals over time, steps and exponent of each (algorithm 3)."""
    (t, g), (u, h) = one, other
    ratio = (t / u) ** (h if t < u else -g)
    return (g + 1) * (h + 1) * ratio / ((g + h + 1) * max(t, u))


def test_the_factors_are_those_of_the_papers_integrals_but_for_steps_being_whole() -> None:
    kept = [(step, each) for step in (4000, 8000) for each in LENGTHS]
    factors, error = combination(kept, step=8000, length=0.08)
    profiles = [(step, exponent_of(each)) for step, each in kept]
    gram = np.array([[papers_product(one, other) for other in profiles] for one in profiles])
    wanted = (8000, exponent_of(0.08))
    expected = np.linalg.solve(gram, [papers_product(one, wanted) for one in profiles])
    assert factors == pytest.approx(expected, abs=2e-3)
    assert 0 < error < 0.1
    assert combination(kept, step=8000, length=0.1)[0] == pytest.approx([0, 0, 0, 1], abs=1e-6)
    early = [(step, each) for step in (100, 500_000) for each in (0.02, 0.1)]
    factors, error = combination(early, step=500_000, length=0.05)
    assert factors[0] == 0, "an average after step 100 of length 0.02 has no part that fp64 could tell"
    assert factors.sum() == pytest.approx(1, abs=0.2) and error < 0.7


def test_what_is_kept_is_small_and_says_of_what_lengths_it_is(tmp_path: Path) -> None:
    path = path_of(tmp_path, 7)
    write_averages(path, {0.05: {"a": torch.ones(1000)}, 0.1: {"a": torch.zeros(1000)}})
    assert path.stat().st_size < 2 * 2 * 1000 + 500
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["lengths"]) == [0.05, 0.1]


def test_averages_of_a_training_that_is_not_gone_on_with_go_and_so_does_what_killed_writers_left(
    tmp_path: Path,
) -> None:
    for step in (2, 4, 9):
        write_averages(path_of(tmp_path, step), {0.05: {"a": torch.ones(4)}})
    folder = path_of(tmp_path, 2).parent
    (folder / ".step-11.safetensors.0123abcd.tmp").touch()
    (folder / "step-9-of-mine.safetensors").touch()
    drop_averages(tmp_path, after_step=4)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("step-2.safetensors", "step-4.safetensors", "step-9-of-mine.safetensors")
    ]
    drop_averages(tmp_path, after_step=0)
    assert [path.name for path in folder.iterdir()] == ["step-9-of-mine.safetensors"]
    drop_averages(tmp_path / "none", after_step=0)


POWER: dict[str, Any] = {"ema": "power", "ema_snapshot_every": 2, "starts_from": "scratch", "checkpoint_every": 100}


def test_a_stage_resumes_on_other_ranks_and_is_exported_at_any_length(tmp_path: Path) -> None:
    straight, moved = make_run(tmp_path / "straight"), make_run(tmp_path / "moved")
    train(straight, 2, num_steps=9, num_processes=1, **POWER)
    for num_steps, num_processes in ((4, 2), (9, 1)):
        train(moved, 2, num_steps=num_steps, num_processes=num_processes, zero_stage=2, **POWER)
    ours, theirs = (run / "training" / "stage2" for run in (straight, moved))
    assert sorted(path.name for path in (ours / "averages").iterdir()) == [
        f"step-{n}.safetensors" for n in (2, 4, 6, 8, 9)
    ]
    for name in ("model/diffusion_pytorch_model.safetensors", "second_average.safetensors"):
        a, b = (load_file(stage / "step-9" / name) for stage in (ours, theirs))
        assert a.keys() == b.keys() and len(a) > 20
        assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-4) for key in a)
    assert json.loads((ours / "step-9" / "trainer.json").read_text())["average_length"] == 0.05
    convert([str(ours), str(tmp_path / "long"), "--ema", "0.1"])
    network = load_diffusers(tmp_path / "long" / "transformer").state_dict()
    second = load_file(ours / "step-9" / "second_average.safetensors")
    exported = load_diffusers(ours / "step-9" / "model").state_dict()
    assert all(torch.allclose(network[name], second[name], rtol=1e-3, atol=1e-5) for name in second)
    assert any(not torch.allclose(network[name], exported[name], rtol=1e-3, atol=1e-5) for name in second)
    assert "| `average_length` | 0.1 |" in (tmp_path / "long" / "README.md").read_text()
    require_sound(straight, room="training")
    said = train(straight, 2, status=2, num_steps=9, starts_from="scratch")
    assert "trained with training.stage2.ema 'power', but it is 'exponential' now" in said
    (ours / "step-9" / "second_average.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"step-9 is damaged: second_average\.safetensors does not exist"):
        require_whole(ours / "step-9")
    recipe = load_recipe(straight.parent / "recipe.toml", ["training.ema=power", "training.stage2.ema_decay=0.5"])
    with pytest.raises(UserError, match=r"ema_decay = 0\.5 is for ema exponential, but the stage's is 'power'"):
        stage_training(recipe, "stage2")


@pytest.mark.parametrize("typed", ["0.5", "0.01", "short"])
def test_lengths_that_no_average_has_are_refused(typed: str) -> None:
    with pytest.raises(UserError, match=rf"EMA is '{typed}': type a relative length from 0\.02 to 0\.28"):
        convert(["x", "y", "--ema", typed])


def test_two_averages_of_one_length_are_refused_and_memory_counts_both() -> None:
    with pytest.raises(ValueError, match="two averages of nearly one length are one"):
        StageTraining(network="dit", ema="power", ema_lengths=(0.1, 0.101))
    one, two = StageTraining(network="dit"), StageTraining(network="dit", ema="power")
    weights = WeightCounts(trained=1000)
    assert rank_bytes(two, weights, num_ranks=1) - rank_bytes(one, weights, num_ranks=1) == 4 * 1000
    assert checkpoint_bytes(two, weights) - checkpoint_bytes(one, weights) == 4 * 1000
    assert "ema" not in one.fingerprint_fields() and "ema_decay" not in two.fingerprint_fields()


def test_without_averages_or_with_a_damaged_one_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no averages of steps up to 9: .* training\.ema = 'power'"):
        make_average(tmp_path, length=0.1, last=9)
    path_of(tmp_path, 3).parent.mkdir()
    path_of(tmp_path, 3).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"step-3\.safetensors cannot be read .*: `rm "):
        make_average(tmp_path, length=0.1, last=9)
