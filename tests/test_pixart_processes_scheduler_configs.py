"""Processes of diffusers' scheduler configs: every key is honoured, left to the solver, or refused by name."""

import inspect
import json
import math
from pathlib import Path

import diffusers
import pytest

from errors import UserError
from pixart.processes.make import process_of
from pixart.processes.scheduler_configs import (
    DISTILLED,
    DPM_SOLVER,
    FLOW_CLASSES,
    LCM_DEFAULTS,
    LCM_OFF,
    LCM_SCHEDULER,
    OTHER_SAMPLER_KEYS,
    PROCESS_DEFAULTS,
    READ_KEYS,
    SAMPLER_DEFAULTS,
    SCHEDULES,
    describe_replaced_sampler,
    spec_beside,
    spec_of_scheduler,
)
from pixart.processes.specs import DDPM_SCHEDULE, ddpm_spec, describe_unused_settings, flow_spec, lcm_student


def defaults(class_name: str) -> dict[str, object]:
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def test_the_table_has_every_key_and_default_of_diffusers() -> None:
    solver = defaults(DPM_SOLVER)
    assert {name: solver[name] for name in SAMPLER_DEFAULTS} == SAMPLER_DEFAULTS
    assert SAMPLER_DEFAULTS.keys() == solver.keys() - READ_KEYS - PROCESS_DEFAULTS.keys() - OTHER_SAMPLER_KEYS
    known = READ_KEYS | PROCESS_DEFAULTS.keys() | SAMPLER_DEFAULTS.keys() | OTHER_SAMPLER_KEYS
    for class_name in (*SCHEDULES, *FLOW_CLASSES):
        theirs = defaults(class_name)
        if class_name == LCM_SCHEDULER:
            assert {name: theirs.pop(name) for name in LCM_DEFAULTS} == LCM_DEFAULTS
            assert not any(theirs[name] for name in LCM_OFF)
        assert theirs.keys() <= known, class_name
        assert {
            name: theirs[name] for name in PROCESS_DEFAULTS.keys() & theirs.keys()
        }.items() <= PROCESS_DEFAULTS.items()
        if class_name in SCHEDULES:
            assert {name: theirs[name] for name in DDPM_SCHEDULE} == SCHEDULES[class_name], class_name


@pytest.mark.parametrize("class_name", [*SCHEDULES, *FLOW_CLASSES])
def test_what_a_scheduler_of_diffusers_saves_opens(tmp_path: Path, class_name: str) -> None:
    getattr(diffusers, class_name)().save_pretrained(tmp_path / "scheduler")
    student = lcm_student(guidance=None) if class_name == LCM_SCHEDULER else None
    expected = flow_spec() if class_name in FLOW_CLASSES else ddpm_spec(SCHEDULES[class_name], student=student)
    assert spec_beside(tmp_path / "transformer") == expected
    replaced = describe_replaced_sampler(tmp_path / "transformer")
    if class_name in (DPM_SOLVER, LCM_SCHEDULER):
        assert replaced is None
    else:
        assert f"scheduler_config.json is of {class_name}" in str(replaced)
    assert spec_beside(tmp_path / "somebody-elses") is None


SETTINGS = {
    "use_karras_sigmas": True,
    "solver_order": 3,
    "algorithm_type": "sde-dpmsolver++",
    "timestep_spacing": "trailing",
    "thresholding": True,
}


def test_settings_of_dpm_solver_go_through_file_spec_and_scheduler() -> None:
    config = {"_class_name": DPM_SOLVER, "beta_schedule": "scaled_linear", **SETTINGS, "lower_order_final": True}
    spec = spec_of_scheduler(config)
    assert spec == ddpm_spec({**DDPM_SCHEDULE, "beta_schedule": "scaled_linear"}, sampler=SETTINGS)
    process = process_of(json.loads(json.dumps(spec)))
    assert process.spec == spec == spec_of_scheduler(process.scheduler_config())
    drawn = process.scheduler("dpm-solver++", 5)
    theirs = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", **SETTINGS)
    theirs.set_timesteps(5)
    assert drawn.timesteps.tolist() == theirs.timesteps.tolist()
    settings = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    assert {name: drawn.config[name] for name in settings} == settings
    flow = spec_of_scheduler({**process_of(flow_spec(shift=3.0)).scheduler_config(), "solver_order": 1})
    assert flow == flow_spec(shift=3.0, sampler={"solver_order": 1})
    assert process_of(flow).scheduler("dpm-solver++", 5).config.solver_order == 1
    assert describe_unused_settings(spec, "dpm-solver++") is describe_unused_settings(ddpm_spec(), "iddpm") is None
    assert describe_unused_settings(flow, "euler") == (
        "its scheduler sets dpm-solver++ to solver_order 1: sampling.solver euler takes none of that"
    )
    # of another class they belong to a sampler that ours takes the place of
    assert spec_of_scheduler({"_class_name": "DDIMScheduler", **SETTINGS}) == ddpm_spec()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"trained_betas": [0.1] * 7},
            "trained_betas is a list of 7, but only None is supported: images would be drawn",
        ),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, but only False is supported: images would"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is True, but only False is supported"),
        ({"_class_name": FLOW_CLASSES[0], "invert_sigmas": True}, "invert_sigmas is True, but only False"),
        ({"_class_name": FLOW_CLASSES[0], "shift_terminal": 0.1}, "shift_terminal is 0.1, but only None"),
        ({"_class_name": FLOW_CLASSES[0], "num_train_timesteps": 500}, "num_train_timesteps is 500, but networks of"),
        ({"_class_name": FLOW_CLASSES[0], "shift": 0}, "shift is 0, not a positive number"),
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction, only epsilon and flow_prediction are"),
        ({"prediction_type": "sample"}, "prediction_type sample, only epsilon and flow_prediction are"),
        ({"use_flow_sigmas": True}, "prediction_type epsilon with use_flow_sigmas True is no process known here"),
        ({"prediction_type": "flow_prediction"}, "prediction_type flow_prediction with use_flow_sigmas False is no"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule sigmoid is none of linear, scaled_linear, squaredcos_cap_v2"),
        ({"beta_end": "0.02"}, "beta_end is '0.02', not a positive number"),
        ({"beta_end": 2.0}, "beta_end is 2.0, not a number between 0 and 1"),
        ({"beta_start": math.nan}, "beta_start is nan, not a finite number"),
        ({"sample_max_value": math.nan}, "sample_max_value is nan, not a finite number"),
        ({"lambda_min_clipped": math.inf}, "lambda_min_clipped is inf, not a finite number"),
        ({"_class_name": "DDIMScheduler", "clip_sample_range": math.inf}, "clip_sample_range is inf, not a finite"),
        ({"solver_order": 0}, "solver_order is 0, not one of 1, 2, 3"),
        ({"solver_order": True}, "solver_order is True, not a number"),
        ({"steps_offset": "1"}, "steps_offset is '1', not a number"),
        ({"_class_name": ["x"]}, "_class_name is ['x'], not the name of a class"),
        ({"predict_epsilon": False}, "predict_epsilon is False, but only True is supported: images would be drawn"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, not a whole number from 2 on"),
        (
            {"_class_name": "EDMEulerScheduler"},
            "_class_name EDMEulerScheduler is none of DPMSolverMultistepScheduler, ",
        ),
        ({"_class_name": DISTILLED[0]}, "_class_name TCDScheduler: the network is distilled to few steps"),
        ({"sigma_warp": 0.3}, "sigma_warp is 0.3, a setting that is not known here: without it images may be wrong"),
    ],
)
def test_another_process_is_refused_by_key_and_value(tmp_path: Path, config: dict, message: str) -> None:
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        spec_beside(tmp_path / "transformer")
    assert str(caught.value).startswith(f"{path}: {message}")


def test_what_is_off_or_of_nobody_is_no_setting() -> None:
    off = {
        "predict_epsilon": True,
        "lambda_min_clipped": -math.inf,
        "sigma_warp": None,
        "skip_prk_steps": True,
        "new_trick": False,
    }
    assert spec_of_scheduler(off) == ddpm_spec()


def test_a_setting_that_diffusers_refuses_is_named() -> None:
    process = process_of(spec_of_scheduler({"solver_type": "newton"}))
    with pytest.raises(UserError, match=r"DPM-Solver\+\+ cannot be set to .*'solver_type': 'newton'.*not implemented"):
        process.scheduler("dpm-solver++", 4)


# What stands beside PixArt-LCM-XL-2-1024-MS.
PUBLISHED_LCM = {
    "_class_name": "LCMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


def test_a_published_student_is_known_by_its_scheduler() -> None:
    spec = spec_of_scheduler(PUBLISHED_LCM)
    assert spec == ddpm_spec(student=lcm_student(guidance=None)), "which guidance is inside nobody says"
    assert process_of(spec).scheduler_config().items() <= PUBLISHED_LCM.items()
    other = spec_of_scheduler(PUBLISHED_LCM | {"original_inference_steps": 100, "timestep_scaling": 5.0})
    assert other["student"] == lcm_student(guidance=None, num_teacher_steps=100, timestep_scaling=5.0)
    scheduler = process_of(other).scheduler("lcm", 4)
    assert scheduler.config.original_inference_steps == 100 and scheduler.config.timestep_scaling == 5.0
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip_sample": True}, "clip_sample is True, but LCM's estimates of the clean latents are kept whole"),
        ({"thresholding": True}, "thresholding is True, but LCM's"),
        ({"original_inference_steps": 1001}, "original_inference_steps is 1001, not a whole number from 1 to 1000"),
        ({"original_inference_steps": 2.5}, r"original_inference_steps is 2\.5, not a whole number"),
        ({"timestep_scaling": 0}, "timestep_scaling is 0, not a positive number"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, but only False"),
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction, only epsilon"),
        ({"_class_name": "DDIMScheduler"}, "original_inference_steps is 50, a setting that is not known here"),
    ],
)
def test_a_student_of_another_kind_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_of_scheduler(PUBLISHED_LCM | changed)
