"""Processes as files have them: specs go there and back, and what is unknown is refused in one line."""

import json

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from errors import UserError
from pixart.processes.make import process_of
from pixart.processes.scheduler_configs import spec_of_scheduler
from pixart.processes.specs import (
    SOLVERS,
    ddpm_spec,
    flow_spec,
    flow_student,
    is_spec,
    lcm_student,
    noise_flow_spec,
    num_passes,
    require_solver,
    spec_of_trainer,
)

SPECS = [
    ddpm_spec(),
    ddpm_spec({**ddpm_spec()["schedule"], "beta_end": 0.03}, min_snr_gamma=5.0),
    ddpm_spec(student=lcm_student(guidance=(4.0, 16.0), num_teacher_steps=25)),
    ddpm_spec(student=lcm_student(guidance=5.5)),
    ddpm_spec(student=lcm_student(guidance=None)),
    flow_spec(shift=3.0),
    flow_spec(shift=3.0, student=flow_student(guidance=(4.0, 16.0))),
    flow_spec(student=flow_student(guidance=None)),
]
NOISE_FLOW = noise_flow_spec(shift=3.0, logit_mean=0.5, network_schedule={**ddpm_spec()["schedule"], "beta_end": 0.03})


@pytest.mark.parametrize("spec", [*SPECS, NOISE_FLOW])
def test_a_spec_makes_the_process_that_has_it(spec):
    process = process_of(json.loads(json.dumps(spec)))
    assert process.spec == spec
    assert process.out_channels(16) == {"noise": 32, "velocity": 16}[spec["prediction"]]


@pytest.mark.parametrize("spec", SPECS)
def test_a_scheduler_config_makes_the_process_that_wrote_it(spec):
    found = spec_of_scheduler(process_of(spec).scheduler_config())
    assert (found["name"], found["prediction"]) == (spec["name"], spec["prediction"])
    assert found["schedule"] == spec["schedule"]
    if "student" in spec:
        assert found["student"] == spec["student"] | {"guidance": None}, "diffusers has no key for it"


def test_a_trainer_of_an_earlier_version_is_of_ddpm():
    schedule = {**ddpm_spec()["schedule"], "beta_end": 0.03}
    assert spec_of_trainer({"schedule": schedule}) == ddpm_spec(schedule)
    assert spec_of_trainer({"process": SPECS[1], "schedule": schedule}) == SPECS[1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "edm"}, "process 'edm' is none of ddpm, flow"),
        ({}, "process None is none of ddpm, flow"),
        (flow_spec() | {"schedule": {"shift": 1.0}}, "process flow with .* is none that this version knows"),
        ({**flow_spec(), "schedule": {**flow_spec()["schedule"], "bend": 1}}, "process flow with .*'bend': 1"),
        (ddpm_spec() | {"prediction": "v"}, "process ddpm with .*'prediction': 'v'.* is none that this version knows"),
        (ddpm_spec() | {"other": 1}, "process ddpm with .*'other': 1"),
        (flow_spec() | {"prediction": "noise"}, "process flow with .* is none that this version knows"),
        (NOISE_FLOW | {"student": flow_student(guidance=None)}, "process flow with .* is none that this version"),
        (ddpm_spec() | {"student": {"method": "tcd"}}, "process ddpm with .*'tcd'.* is none that this version knows"),
    ],
)
def test_unknown_processes_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        process_of(spec)


def test_the_training_of_flow_is_not_in_a_scheduler_config():
    spec = flow_spec(shift=3.0, logit_mean=0.5, logit_std=2.0)
    assert process_of(json.loads(json.dumps(spec))).spec == spec
    assert spec_of_scheduler(process_of(spec).scheduler_config()) == flow_spec(shift=3.0)
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    assert spec_of_scheduler({**config, "_class_name": "FlowMatchEulerDiscreteScheduler"}) == flow_spec(shift=3.0)
    with pytest.raises(UserError, match="prediction_type v_prediction, only epsilon and flow_prediction are"):
        spec_of_scheduler({"prediction_type": "v_prediction"})


@pytest.mark.parametrize("solver", SOLVERS["flow"])
def test_passes_of_the_network_are_counted(solver):
    assert len(process_of(flow_spec()).scheduler(solver, 7).timesteps) == num_passes(solver, 7)


def test_a_solver_of_another_process_is_refused_naming_the_checkpoint():
    said = r"sampling\.solver = 'iddpm' does not go with x/model, which is of process flow: dpm-solver\+\+, eu"
    with pytest.raises(UserError, match=said):
        require_solver(flow_spec(), "iddpm", num_steps=20, checkpoint="x/model")
    said = (
        r"'heun' does not go with x/model, which is of process flow of networks that predict the noise: .*, euler, id"
    )
    with pytest.raises(UserError, match=said):
        require_solver(NOISE_FLOW, "heun", num_steps=20, checkpoint="x/model")
    said = r"sampling\.solver = 'heun' does not go with x/model, which is of process ddpm: dpm-solver\+\+, iddpm"
    with pytest.raises(UserError, match=said):
        require_solver(ddpm_spec(), "heun", num_steps=20, checkpoint="x/model")


@pytest.mark.parametrize(
    "changed",
    [
        {"guidance": [16.0, 4.0]},
        {"guidance": [4.0]},
        {"guidance": "4.5"},
        {"num_teacher_steps": 0},
        {"timestep_scaling": None},
        {"method": "tcd"},
        {"other": 1},
    ],
)
def test_what_says_nothing_sound_of_a_student_is_no_spec(changed):
    student = lcm_student(guidance=(4.0, 16.0))
    assert is_spec(ddpm_spec(student=student))
    assert not is_spec(ddpm_spec(student=student | changed))
    assert not is_spec(flow_spec() | {"student": student}), "its estimates have no scalings"
    assert is_spec(flow_spec(student=flow_student(guidance=(4.0, 16.0))))
    assert not is_spec(ddpm_spec(student=flow_student(guidance=(4.0, 16.0))))


def test_steps_of_lcm_are_those_of_the_students_teacher():
    require_solver(ddpm_spec(), "lcm", num_steps=50)
    require_solver(ddpm_spec(student=lcm_student(guidance=None, num_teacher_steps=100)), "lcm", num_steps=51)
    with pytest.raises(UserError, match=r"sampling\.num_steps 51: lcm draws in 1 to 50 steps"):
        require_solver(ddpm_spec(), "lcm", num_steps=51)
    require_solver(flow_spec(), "lcm", num_steps=51)
