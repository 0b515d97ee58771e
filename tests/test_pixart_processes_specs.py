"""Processes as files have them: specs go there and back, and what is unknown is refused in one line."""

import json

import pytest

from pixart.processes.make import process_of
from pixart.processes.specs import ddpm_spec, require_solver, spec_of_scheduler, spec_of_trainer

SPECS = [ddpm_spec(), ddpm_spec({**ddpm_spec()["schedule"], "beta_end": 0.03}, min_snr_gamma=5.0)]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_makes_the_process_that_has_it(spec):
    assert process_of(json.loads(json.dumps(spec))).spec == spec


@pytest.mark.parametrize("spec", SPECS)
def test_a_scheduler_config_makes_the_process_that_wrote_it(spec):
    found = spec_of_scheduler(process_of(spec).scheduler_config())
    assert (found["name"], found["prediction"]) == (spec["name"], spec["prediction"])
    assert found["schedule"] == spec["schedule"]


def test_a_trainer_of_an_earlier_version_is_of_ddpm():
    schedule = {**ddpm_spec()["schedule"], "beta_end": 0.03}
    assert spec_of_trainer({"schedule": schedule}) == ddpm_spec(schedule)
    assert spec_of_trainer({"process": SPECS[1], "schedule": schedule}) == SPECS[1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "edm"}, "process 'edm' is none of ddpm"),
        ({}, "process None is none of ddpm"),
        (ddpm_spec() | {"prediction": "v"}, "process ddpm with .*'prediction': 'v'.* is none that this version knows"),
        (ddpm_spec() | {"other": 1}, "process ddpm with .*'other': 1"),
    ],
)
def test_unknown_processes_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        process_of(spec)


def test_a_solver_of_another_process_is_refused():
    with pytest.raises(ValueError, match=r"sampling\.solver heun does not go with process ddpm: dpm-solver\+\+, iddpm"):
        require_solver(ddpm_spec(), "heun", num_steps=20)
