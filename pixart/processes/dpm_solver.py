"""DPM-Solver++ (Lu et al. 2022), the solver that goes with every process: diffusers' class."""

from collections.abc import Mapping, Sequence
from typing import Any

from errors import UserError


def dpm_solver(settings: Mapping[str, Any], num_steps: int, *, times: Sequence[int] | None = None) -> Any:
    """Return diffusers' scheduler with these settings, its timesteps set, or set to `times` where they are given.

    Raises:
        UserError: diffusers refuses one of the settings, which come from a checkpoint's scheduler config.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    try:
        scheduler = DPMSolverMultistepScheduler(**settings)
        if times is None:
            scheduler.set_timesteps(num_steps)
        else:
            scheduler.set_timesteps(timesteps=list(times))
    except (ImportError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"DPM-Solver++ cannot be set to {dict(settings)}: {str(error).splitlines()[0]}") from None
    return scheduler
