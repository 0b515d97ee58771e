"""DPM-Solver++ (Lu et al. 2022), the solver that goes with every process: diffusers' class."""

from collections.abc import Mapping
from typing import Any

from errors import UserError


def dpm_solver(settings: Mapping[str, Any], num_steps: int) -> Any:
    """Return diffusers' scheduler with these settings, its timesteps set.

    Raises:
        UserError: diffusers refuses one of the settings, which come from a checkpoint's scheduler config.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    try:
        scheduler = DPMSolverMultistepScheduler(**settings)
        scheduler.set_timesteps(num_steps)
    except (ImportError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"DPM-Solver++ cannot be set to {dict(settings)}: {str(error).splitlines()[0]}") from None
    return scheduler
