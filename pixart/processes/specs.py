"""Processes as they stand in files: the spec in `trainer.json`, and the scheduler's config of a diffusers folder.

Nothing here needs torch; `make.py` makes a process of its spec.
"""

from collections.abc import Mapping
from typing import Any

# The noise schedule of DiT and PixArt, in the words of diffusers' schedulers.
DDPM_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
# Solvers of each process; the first goes with all of them.
SOLVERS = {"ddpm": ("dpm-solver++", "iddpm", "sa-solver")}


def ddpm_spec(schedule: Mapping[str, Any] = DDPM_SCHEDULE, *, min_snr_gamma: float | None = None) -> dict[str, Any]:
    """Return the spec of PixArt's own process: the network predicts the noise and, beside it, a variance."""
    spec = {"name": "ddpm", "prediction": "noise", "schedule": dict(schedule)}
    return spec if min_snr_gamma is None else spec | {"min_snr_gamma": min_snr_gamma}


def spec_of_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the process of a `trainer.json`; those written when there was but one name its schedule alone."""
    return trainer["process"] if "process" in trainer else ddpm_spec(trainer.get("schedule", DDPM_SCHEDULE))


def spec_of_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the process that a `scheduler_config.json` of diffusers draws with; what it leaves out is PixArt's.

    Raises:
        ValueError: the network predicts something else; names it.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(f"prediction_type {prediction}, only epsilon is supported")
    return ddpm_spec({name: config.get(name, value) for name, value in DDPM_SCHEDULE.items()})


def require_solver(spec: Mapping[str, Any], solver: str, *, num_steps: int) -> None:
    """Refuse a solver of another process, and a number of steps that it cannot take.

    Raises:
        ValueError: the process has other solvers; iddpm is asked for a single step, which would begin and end at
            timestep 0; another one for all timesteps, of which diffusers would then take one twice and divide by
            nothing.
    """
    solvers = SOLVERS[spec["name"]]
    if solver not in solvers:
        raise ValueError(f"sampling.solver {solver} does not go with process {spec['name']}: {', '.join(solvers)} do")
    if solver == "iddpm" and num_steps == 1:
        raise ValueError("sampling.num_steps 1: iddpm needs at least 2 steps")
    num_timesteps = spec["schedule"]["num_train_timesteps"]
    if solver != "iddpm" and num_steps >= num_timesteps:
        raise ValueError(f"sampling.num_steps {num_steps}: {solver} takes fewer than the schedule's {num_timesteps}")
