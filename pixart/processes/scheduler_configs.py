"""Processes as diffusers' pipelines tell of them, in `scheduler/scheduler_config.json`.

Every key of such a file is one of four: it defines the process, and is honoured or refused; it sets DPM-Solver++, and
is handed on where the file is of that class; it belongs to a sampler that `sampling.solver` takes the place of; or it
is unknown, and refused unless it is off. Nothing here needs torch.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from pixart.processes.specs import (
    DDPM_SCHEDULE,
    FLOW_LCM_SAMPLER,
    FLOW_NUM_TIMES,
    LCM_TEACHER_STEPS,
    LCM_TIMESTEP_SCALING,
    SCHEDULER_FILE,
    SCHEDULER_FOLDER,
    WEIGHT_FOLDERS,
    ddpm_spec,
    flow_spec,
    flow_student,
    lcm_student,
)
from pixart.weight_files import read_json

DPM_SOLVER = "DPMSolverMultistepScheduler"
# A network that this draws from has been distilled to few steps.
LCM_SCHEDULER = "LCMScheduler"
# Classes of diffusers by what they take for a schedule that a config leaves out.
KARRAS_SCHEDULE = {**DDPM_SCHEDULE, "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES: dict[str, dict[str, Any]] = {
    DPM_SOLVER: DDPM_SCHEDULE,
    "DPMSolverSinglestepScheduler": DDPM_SCHEDULE,
    "DDPMScheduler": DDPM_SCHEDULE,
    "DDIMScheduler": DDPM_SCHEDULE,
    "DEISMultistepScheduler": DDPM_SCHEDULE,
    "EulerAncestralDiscreteScheduler": DDPM_SCHEDULE,
    "EulerDiscreteScheduler": DDPM_SCHEDULE,
    "LMSDiscreteScheduler": DDPM_SCHEDULE,
    "PNDMScheduler": DDPM_SCHEDULE,
    "SASolverScheduler": DDPM_SCHEDULE,
    "UniPCMultistepScheduler": DDPM_SCHEDULE,
    "HeunDiscreteScheduler": KARRAS_SCHEDULE,
    "KDPM2AncestralDiscreteScheduler": KARRAS_SCHEDULE,
    "KDPM2DiscreteScheduler": KARRAS_SCHEDULE,
    LCM_SCHEDULER: {**KARRAS_SCHEDULE, "beta_schedule": "scaled_linear"},
}
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# The same, but no solver of ours draws what it was made for.
DISTILLED = ("TCDScheduler",)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# What would make it another process than ours, and the value at which it does not.
PROCESS_DEFAULTS: dict[str, Any] = {
    "trained_betas": None,
    "predict_epsilon": True,  # the name of `prediction_type` before diffusers 0.10
    "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
}
# What diffusers' DPM-Solver++ is set by, with its defaults; other classes have some of these, too.
SAMPLER_DEFAULTS: dict[str, Any] = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
# Of samplers of other classes, which DPM-Solver++ does not have; and how a learned variance is drawn from, which the
# number of channels of the network says.
OTHER_SAMPLER_KEYS = {
    "base_image_seq_len",
    "base_shift",
    "clip_sample",
    "clip_sample_range",
    "corrector_order",
    "disable_corrector",
    "interpolation_type",
    "max_image_seq_len",
    "max_shift",
    "predict_x0",
    "predictor_order",
    "set_alpha_to_one",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_p",
    "stochastic_sampling",
    "tau_func",
    "time_shift_type",
    "timestep_type",
    "variance_type",
}
# Of LCM, with its defaults; what would change its estimates, which are not clipped here, is off.
LCM_DEFAULTS: dict[str, Any] = {
    "original_inference_steps": LCM_TEACHER_STEPS,
    "timestep_scaling": LCM_TIMESTEP_SCALING,
}
LCM_OFF = ("clip_sample", "thresholding")
SOLVER_ORDERS = (1, 2, 3)
READ_KEYS = {*DDPM_SCHEDULE, "prediction_type", "use_flow_sigmas", "flow_shift", "shift"}


def spec_of_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the process that a `scheduler_config.json` of diffusers draws with; what it leaves out is its class's.

    Of flow it has the shift alone: nobody draws with the times that it was trained at. Of a student of LCM it does not
    say which guidance is inside; one of flow is known by a sampler that adds as much noise as LCM does.

    Raises:
        UserError: it is of another process, class or network, or has a setting that is not known; names key and value.
    """
    class_name = config.get("_class_name", DPM_SOLVER)
    _require_known(class_name, config)
    prediction = config.get("prediction_type", "epsilon")
    uses_flow_sigmas = bool(config.get("use_flow_sigmas", class_name in FLOW_CLASSES))
    if class_name in FLOW_CLASSES:
        prediction = "flow_prediction"
    if prediction not in ("epsilon", "flow_prediction"):
        raise UserError(f"prediction_type {prediction}, only epsilon and flow_prediction are supported")
    if uses_flow_sigmas != (prediction == "flow_prediction"):
        raise UserError(
            f"prediction_type {prediction} with use_flow_sigmas {uses_flow_sigmas} is no process known here"
        )
    sampler = _sampler(config) if class_name == DPM_SOLVER else {}
    if uses_flow_sigmas:
        _require_flow_times(config)
        shift = _number(config, "shift" if class_name in FLOW_CLASSES else "flow_shift", 1.0)
        if sampler == FLOW_LCM_SAMPLER:
            return flow_spec(shift=shift, student=flow_student(guidance=None))
        return flow_spec(shift=shift, sampler=sampler)
    student = _student(config) if class_name == LCM_SCHEDULER else None
    return ddpm_spec(_schedule(config, SCHEDULES[class_name]), sampler=sampler, student=student)


def spec_beside(weights: Path) -> dict[str, Any] | None:
    """Return the process that `scheduler/` beside a folder of weights tells of, None if there is none.

    Beside a folder of any other name than `WEIGHT_FOLDERS` it is somebody else's.

    Raises:
        UserError: it is of a process that is not supported, or damaged; names the file.
    """
    path = _scheduler_file(weights)
    if path is None:
        return None
    try:
        return spec_of_scheduler(read_json(path))
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def describe_replaced_sampler(weights: Path) -> str | None:
    """Return which sampler of the folder `sampling.solver` takes the place of; None if there is none, or the same."""
    path = _scheduler_file(weights)
    class_name = DPM_SOLVER if path is None else read_json(path).get("_class_name", DPM_SOLVER)
    if class_name in (DPM_SOLVER, LCM_SCHEDULER):
        return None
    return f"{path} is of {class_name}: its noise schedule is kept, but sampling.solver says how images are drawn"


def _scheduler_file(weights: Path) -> Path | None:
    path = weights.parent / SCHEDULER_FOLDER / SCHEDULER_FILE
    return path if weights.name in WEIGHT_FOLDERS and path.is_file() else None


def _require_known(class_name: str, config: Mapping[str, Any]) -> None:
    if class_name in DISTILLED:
        raise UserError(
            f"_class_name {class_name}: the network is distilled to few steps, and no solver here draws those"
        )
    if not isinstance(class_name, str):
        raise UserError(f"_class_name is {class_name!r}, not the name of a class")
    if class_name not in SCHEDULES and class_name not in FLOW_CLASSES:
        raise UserError(f"_class_name {class_name} is none of {', '.join([*SCHEDULES, *FLOW_CLASSES])}")
    for key, value in config.items():
        # as diffusers saves lambda_min_clipped where nothing is clipped
        if isinstance(value, float) and not math.isfinite(value) and (key, value) != ("lambda_min_clipped", -math.inf):
            raise UserError(f"{key} is {value}, not a finite number")
        if key in PROCESS_DEFAULTS and value not in (None, PROCESS_DEFAULTS[key]):
            said = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
            raise UserError(
                f"{key} is {said}, but only {PROCESS_DEFAULTS[key]!r} is supported: images would be drawn under "
                "another process than the network was trained with"
            )
        is_known = key in READ_KEYS | PROCESS_DEFAULTS.keys() | SAMPLER_DEFAULTS.keys() | OTHER_SAMPLER_KEYS
        is_known |= class_name == LCM_SCHEDULER and key in LCM_DEFAULTS
        if not is_known and not key.startswith("_") and value not in (None, False):
            raise UserError(f"{key} is {value!r}, a setting that is not known here: without it images may be wrong")


def _sampler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config of DPM-Solver++ sets otherwise than diffusers does by itself."""
    for key, default in SAMPLER_DEFAULTS.items():
        value, is_number = config.get(key, default), type(default) in (int, float)
        if is_number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{key} is {value!r}, not a number")
    if (order := config.get("solver_order", 2)) not in SOLVER_ORDERS:
        raise UserError(f"solver_order is {order!r}, not one of {', '.join(map(str, SOLVER_ORDERS))}")
    return {key: config[key] for key, value in SAMPLER_DEFAULTS.items() if config.get(key, value) != value}


def _student(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config of LCM says of the network that it draws from."""
    if is_on := [key for key in LCM_OFF if config.get(key)]:
        raise UserError(f"{is_on[0]} is {config[is_on[0]]!r}, but LCM's estimates of the clean latents are kept whole")
    num_steps = config.get("original_inference_steps", LCM_TEACHER_STEPS)
    num_times = config.get("num_train_timesteps", DDPM_SCHEDULE["num_train_timesteps"])
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or not 0 < num_steps <= num_times:
        raise UserError(f"original_inference_steps is {num_steps!r}, not a whole number from 1 to {num_times}")
    scaling = _number(config, "timestep_scaling", LCM_TIMESTEP_SCALING)
    return lcm_student(guidance=None, num_teacher_steps=num_steps, timestep_scaling=scaling)


def _schedule(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    schedule = {name: config.get(name, value) for name, value in defaults.items()}
    if schedule["beta_schedule"] not in BETA_SCHEDULES:
        raise UserError(f"beta_schedule {schedule['beta_schedule']} is none of {', '.join(BETA_SCHEDULES)}")
    num_times = schedule["num_train_timesteps"]
    if not isinstance(num_times, int) or num_times < 2:
        raise UserError(f"num_train_timesteps is {num_times!r}, not a whole number from 2 on")
    for name in ("beta_start", "beta_end"):
        if _number(schedule, name, None) >= 1:
            raise UserError(f"{name} is {schedule[name]!r}, not a number between 0 and 1")
    return schedule


def _require_flow_times(config: Mapping[str, Any]) -> None:
    num_times = config.get("num_train_timesteps", FLOW_NUM_TIMES)
    if num_times != FLOW_NUM_TIMES:
        raise UserError(f"num_train_timesteps is {num_times!r}, but networks of flow are told {FLOW_NUM_TIMES} times")


def _number(config: Mapping[str, Any], key: str, default: float | None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise UserError(f"{key} is {value!r}, not a positive number")
    return value
