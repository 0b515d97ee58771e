"""Weights distilled to few steps: how they are drawn where nobody says it, what is warned of, and what is refused."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from PIL import Image
from sampling_run import PIXART, make_run, randomised, save_adapter, save_checkpoint, write_recipe

from encoders.weights import identity_of
from errors import UserError
from pipelines.command import parse_command
from pipelines.engine.run import EngineConfig
from pipelines.recipe import load_recipe
from pipelines.store.bases import describe_base
from pixart.convert import load_diffusers, save_diffusers
from pixart.guidance_condition import fold_guidance, with_guidance_condition
from pixart.model import PixArt
from pixart.processes.specs import ddpm_spec, lcm_student
from sampling.__main__ import main
from sampling.adapters import add_adapters
from sampling.app_studio import Studio, wish_of
from sampling.config import EncoderConfig, SamplingConfig
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.contestants import find_contestants
from sampling.foreign_weights import open_trained_model
from sampling.students import describe_oddities, follow_weights
from sampling.trained_model import TrainedModel, open_run_model

RANGE = (4.0, 16.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def save_student(run: Path, guidance: Any, *, network: PixArt | None = None, times: Any = None) -> PixArt:
    """Make stage 2's checkpoint one of a student, with `times` of its own; returns its network."""
    if network is None:
        network = PixArt(PIXART) if not isinstance(guidance, tuple) else with_guidance_condition(PixArt(PIXART))
        network = randomised(network)
    assert isinstance(network, PixArt)
    folder = save_checkpoint(run, 2, network)
    trainer = json.loads((folder / "trainer.json").read_text())
    trainer["process"]["student"] = lcm_student(guidance=guidance, times=times)
    (folder / "trainer.json").write_text(json.dumps(trainer))
    return network


def followed(run: Path, **typed: Any) -> tuple[SamplingConfig, TrainedModel, list[str]]:
    config, trained = follow_weights(SamplingConfig(**typed), open_run_model(run, "stage2"))
    return config, trained, list(describe_oddities(config, trained))


def drawn(run: Path, **table: object) -> tuple[np.ndarray, dict[str, Any]]:
    """The picture that `make sample` leaves of a prompt, and the settings in it."""
    path = write_recipe(run, prompt="a star", max_images_in_process=8, **table)
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if line != "num_steps = 3"))
    main(["--recipe", str(path), "--run", str(run), "--stage", "2"])
    (image,) = (path for path in (run / "samples" / "stage2-prompt").glob("*.png") if path.name != "grid.png")
    with Image.open(image) as opened:
        return np.asarray(opened.convert("RGB")).astype(int), json.loads(opened.info["settings"])


@pytest.mark.parametrize(
    ("guidance", "typed", "expected", "passes", "inner"),
    [
        (RANGE, {}, ("lcm", 4, 4.5), 1.0, 4.5),
        ((6.0, 16.0), {}, ("lcm", 4, 6.0), 1.0, 6.0),
        ((1.5, 3.0), {}, ("lcm", 4, 3.0), 1.0, 3.0),
        (RANGE, {"guidance_scale": 9.0, "num_steps": 2}, ("lcm", 2, 9.0), 1.0, 9.0),
        (5.5, {}, ("lcm", 4, 5.5), 1.0, 5.5),
        (5.5, {"guidance_scale": 1.0}, ("lcm", 4, 5.5), 1.0, 5.5),
        (5.5, {"guidance_scale": 5.5, "solver": "lcm", "num_steps": 8}, ("lcm", 8, 5.5), 1.0, 5.5),
        (None, {}, ("lcm", 4, 1.0), 1.0, None),
    ],
)
def test_what_is_not_typed_is_as_the_student_was_made_for(
    run: Path, guidance: Any, typed: Any, expected: Any, passes: float, inner: float | None
) -> None:
    save_student(run, guidance)
    config, trained, odd = followed(run, **typed)
    assert (config.solver, config.num_steps, config.guidance_scale) == expected
    assert trained.pass_guidance(config.guidance_scale) == passes and trained.inner_guidance == inner
    assert odd == []
    again, same = follow_weights(config, trained)
    assert (again, same) == (config, trained), "following twice is following once"


@pytest.mark.parametrize(
    ("guidance", "typed", "said", "passes"),
    [
        (
            RANGE,
            {"solver": "dpm-solver++", "num_steps": 20, "guidance_scale": 7.0},
            "guidance 4 to 16, and is drawn with dpm-solver++, 20 steps, guidance 7",
            1.0,
        ),
        (RANGE, {"num_steps": 20}, "guidance 4 to 16, and is drawn with lcm, 20 steps, guidance 4.5", 1.0),
        (RANGE, {"guidance_scale": 2.0}, "guidance 4 to 16, and is drawn with lcm, 4 steps, guidance 2", 1.0),
        (
            5.5,
            {"solver": "dpm-solver++"},
            "guidance 5.5 inside, and is drawn with dpm-solver++, 20 steps, guidance 5.5",
            1,
        ),
        (5.5, {"guidance_scale": 7.0}, "guidance 5.5 inside, and is drawn with lcm, 4 steps, guidance 7", 7.0),
        (None, {"guidance_scale": 7.0}, "guidance inside, and is drawn with lcm, 4 steps, guidance 7", 7.0),
    ],
)
def test_what_is_typed_otherwise_is_honoured_and_said(
    run: Path, guidance: Any, typed: Any, said: str, passes: float
) -> None:
    save_student(run, guidance)
    config, trained, odd = followed(run, **typed)
    assert {name: getattr(config, name) for name in typed} == typed
    assert odd == [f"stage 2, step 7 was trained for lcm with 1 to 8 steps and {said}"]
    assert trained.pass_guidance(config.guidance_scale) == passes


@pytest.mark.parametrize(
    ("typed", "drawn_with"),
    [
        ({"num_steps": 1}, None),
        ({"num_steps": 2}, None),
        ({"times": [899, 499]}, None),
        ({"num_steps": 4}, "lcm, 4 steps, guidance 1.5"),
        ({"times": [399]}, "lcm, 1 steps at 399, guidance 1.5"),
        ({"solver": "dpm-solver++"}, "dpm-solver++, 20 steps, guidance 1.5"),
        ({"num_steps": 1, "guidance_scale": 7.0}, "lcm, 1 steps at 599, guidance 7"),
    ],
)
def test_a_student_with_times_of_its_own_was_trained_for_those_alone(
    run: Path, typed: dict[str, Any], drawn_with: str | None
) -> None:
    save_student(run, 1.5, times=[[899, 499], [599]])
    _, _, odd = followed(run, **typed)
    made_for = "lcm with 1 step at 599 or 2 steps at 899, 499 and guidance 1.5 inside"
    said = f"stage 2, step 7 was trained for {made_for}, and is drawn with {drawn_with}"
    assert odd == ([] if drawn_with is None else [said])


def test_settings_that_do_nothing_or_harm_are_said(run: Path) -> None:
    save_student(run, RANGE)
    _, _, odd = followed(run, guidance_interval=(0.1, 0.8), negative_prompt="blurred", cache=2)
    assert [line.partition(" ")[0] for line in odd] == [
        *("sampling.guidance_interval", "sampling.negative_prompt", "sampling.cache"),
    ]


def test_others_are_drawn_as_before_and_lcm_of_them_is_said(run: Path) -> None:
    config, trained = SamplingConfig(), open_run_model(run, "stage2")
    assert follow_weights(config, trained) == (config, trained)
    assert list(describe_oddities(config, trained)) == []
    config, trained, odd = followed(run, solver="lcm")
    assert (config.num_steps, config.guidance_scale, trained.inner_guidance) == (4, 1.0, None)
    assert odd == [
        "nothing says that stage 2, step 7 was distilled to few steps, and solver lcm draws such weights alone: of "
        "others images are blurred"
    ]


def test_a_student_is_drawn_by_lcm_with_one_pass_a_step(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = save_student(run, RANGE)
    image, settings = drawn(run)
    assert "was trained for" not in caplog.text
    assert (settings["solver"], settings["num_steps"], settings["guidance_scale"]) == ("lcm", 4, 4.5)
    assert settings["student"] == {"num_teacher_steps": 50, "timestep_scaling": 10.0, "guidance": 4.5}
    folded = fold_guidance(network, 4.5)
    save_student(run, None, network=folded)
    same, _ = drawn(run)
    assert np.array_equal(same, image), "a folded guidance and one that nobody knows draw without a null half"
    other, settings = drawn(run, guidance_scale=1.5)
    assert settings["student"]["guidance"] is None and not np.array_equal(other, image)
    assert "was trained for lcm with 1 to 8 steps and guidance inside, and is drawn with lcm" in caplog.text


def test_times_of_steps_can_be_chosen(run: Path) -> None:
    network = save_student(run, 5.5)
    usual, _ = drawn(run, num_steps=1)
    image, settings = drawn(run, times=[599])
    assert settings["times"] == [599] and settings["num_steps"] == 1 and not np.array_equal(image, usual)
    assert np.array_equal(drawn(run, times=[999])[0], usual), "the time that one step has"
    two, _ = drawn(run, times=[999, 499])
    assert np.array_equal(two, drawn(run, num_steps=2)[0])
    config, trained, odd = followed(run, times=[899, 499])
    assert (config.solver, config.num_steps, odd) == ("lcm", 2, [])
    assert config.title == "lcm, 2 steps at 899, 499 · guidance 5.5"
    assert isinstance(network, PixArt) and trained.inner_guidance == 5.5
    for table, message in (
        ({"times": [499, 899]}, r"times fall from step to step, such as \[899, 499\]"),
        ({"times": [1000]}, r"sampling\.times \[1000\] are not all below the schedule's 1000"),
        ({"times": [599], "num_steps": 4}, r"sampling\.times \[599\] are 1 steps, but sampling\.num_steps is 4"),
        (
            {"times": [599], "solver": "dpm-solver++"},
            r"sampling\.times \[599\] are those of lcm's steps, but sampling\.so",
        ),
    ):
        with pytest.raises(UserError, match=message):
            drawn(run, **table)


def test_images_of_another_guidance_are_drawn_anew(run: Path) -> None:
    save_student(run, RANGE)
    (usual, _), (high, settings) = drawn(run), drawn(run, guidance_scale=12.0)
    assert settings["student"]["guidance"] == 12.0 and not np.array_equal(usual, high)
    assert np.array_equal(drawn(run)[0], usual)


def test_a_plan_counts_one_pass_a_step(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_student(run, RANGE)
    caplog.set_level(logging.INFO)
    path = write_recipe(run, num_steps=4, guidance_scale=7.0)
    main(["--recipe", str(path), "--run", str(run), "--stage", "2", "--plan"])
    assert "lcm, 4 steps · guidance 7: 12 passes of one image" in caplog.text


def test_an_adapter_of_few_steps_makes_a_student_of_its_base(run: Path, tmp_path: Path) -> None:
    weights = run / "training" / "stage2" / "step-7" / "model"
    belongs = describe_base(weights, (), run=run, identity=identity_of(weights), shape={})
    process = ddpm_spec(student=lcm_student(guidance=5.5))
    adapter = save_adapter(tmp_path / "lcm", base=belongs, process=process)
    base = open_run_model(run, "stage2")
    student = add_adapters(base, [str(adapter)], None, run=run)
    assert student.process == base.process | {"student": lcm_student(guidance=5.5)}
    config, student = follow_weights(SamplingConfig(), student)
    assert (config.solver, config.num_steps, config.guidance_scale) == ("lcm", 4, 5.5)
    assert student.pass_guidance(config.guidance_scale) == 1
    assert add_adapters(base, [str(adapter)], [0.0], run=run).process == base.process
    style = save_adapter(tmp_path / "style", base=belongs, process=ddpm_spec())
    both = add_adapters(base, [str(style), str(adapter)], None, run=run)
    assert both.process == student.process
    assert drawn(run, lora=[str(adapter)])[1]["solver"] == "lcm"


def test_a_curve_over_guidance_needs_a_student_that_is_told_it(run: Path) -> None:
    path = write_recipe(run)
    path.write_text(path.read_text().replace("num_steps = 3\n", ""))
    argv = ["--recipe", str(path), "--run", str(run), "--stage", "2"]
    command = parse_command("sampling.evaluation", "", argv=argv, has_stages=True)
    save_student(run, 5.5)
    with pytest.raises(UserError, match=r"evaluation\.guidance_scales: stage 2, step 7 was .* guidance 5\.5 inside"):
        find_contestants(command, EvaluationConfig(), guidance_scale=7.0)
    (contestant,) = find_contestants(command, EvaluationConfig())
    assert contestant.job.config.guidance_scale == 5.5 and contestant.trained.inner_guidance == 5.5
    save_student(run, RANGE)
    points = [find_contestants(command, EvaluationConfig(), guidance_scale=scale)[0] for scale in (4.0, 9.0)]
    assert [point.trained.inner_guidance for point in points] == [4.0, 9.0]
    assert points[0].inputs()["guidance_scale"] == 4.0 and points[0].inputs()["solver"] == "lcm"
    assert points[0].job.fingerprint != points[1].job.fingerprint


def test_the_app_draws_students_as_the_command_does(run: Path) -> None:
    save_student(run, RANGE)
    path = write_recipe(run)
    recipe = load_recipe(path)
    recipe.tables["sampling"].pop("num_steps")
    config, trained = recipe.table("sampling", SamplingConfig), open_run_model(run, "stage2")
    studio = Studio(config, trained, run=run, name="stage2-app", engine=recipe.table("engine", EngineConfig))
    wish = studio.first_wish()
    assert (wish.solver, wish.num_steps, wish.guidance_scale) == ("lcm", 4, 4.5)
    usual, other = (
        studio.draw(dataclasses.replace(wish, prompt="a star", guidance_scale=scale), on_step=lambda _: None)
        for scale in (4.5, 12.0)
    )
    ours, settings = drawn(run, seed=wish.seed)
    assert settings["guidance_scale"] == 4.5
    assert np.array_equal(np.asarray(Image.open(usual).convert("RGB")).astype(int), ours)
    assert wish_of(other).guidance_scale == 12.0
    assert not np.array_equal(np.asarray(Image.open(other)), np.asarray(Image.open(usual)))


def test_weights_that_are_told_a_guidance_which_nobody_knows_are_refused(run: Path, tmp_path: Path) -> None:
    network = with_guidance_condition(PixArt(PIXART))
    save_checkpoint(run, 2, randomised(network))
    with pytest.raises(UserError, match="is told the guidance of its images, and nothing says which"):
        open_run_model(run, "stage2").load()


def test_a_pipeline_with_lcms_scheduler_is_a_student(run: Path, tmp_path: Path) -> None:
    network = load_diffusers(run / "training" / "stage2" / "step-7" / "model")
    save_diffusers(network, tmp_path / "theirs" / "transformer")
    LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").save_pretrained(tmp_path / "theirs/scheduler")
    encoders = EncoderConfig(text_model=str(run / "t5"), vae_model=str(run / "vae"), max_tokens=40)
    trained = open_trained_model(str(tmp_path / "theirs"), encoders)
    assert trained.process == ddpm_spec(student=lcm_student(guidance=None))
    config, trained = follow_weights(SamplingConfig(), trained)
    assert (config.solver, config.num_steps, config.guidance_scale) == ("lcm", 4, 1.0)
    torch.testing.assert_close(trained.load().state_dict(), network.state_dict())
