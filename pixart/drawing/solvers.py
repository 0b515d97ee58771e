"""The paper's three sampling algorithms (A.5), as diffusers has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler

# zero to fp32; at zero itself SA-Solver's coefficients are not finite
LAST_SIGMA = 1e-8


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler with its timesteps set; good for one batch, since schedulers remember earlier steps."""

    scheduler: Any
    has_learned_variance: bool


def make_solver(name: str, schedule: Mapping[str, Any], *, num_steps: int) -> Solver:
    """Make a solver of `num_steps` steps for a model that predicts noise under `schedule`.

    "dpm-solver++" is second-order multistep DPM-Solver++ (Lu et al. 2022), "iddpm" the ancestral sampler with learned
    variance and respaced timesteps (Nichol & Dhariwal 2021), "sa-solver" stochastic Adams (Xue et al. 2023).

    Raises:
        ValueError: iddpm is asked for a single step, which would begin and end at timestep 0, or another one for all
            timesteps, of which diffusers would then take one twice and divide by nothing.
    """
    if name == "iddpm" and num_steps == 1:
        raise ValueError("sampling.num_steps 1: iddpm needs at least 2 steps")
    num_timesteps = schedule["num_train_timesteps"]
    if name != "iddpm" and num_steps >= num_timesteps:
        raise ValueError(f"sampling.num_steps {num_steps}: {name} takes fewer than the schedule's {num_timesteps}")
    match name:
        case "dpm-solver++":
            scheduler = DPMSolverMultistepScheduler(**schedule)
        case "iddpm":
            scheduler = DDPMScheduler(
                **schedule, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
            )
        case "sa-solver":
            scheduler = SASolverScheduler(**schedule)
        case _:
            raise ValueError(f"sampling.solver {name} is not dpm-solver++, iddpm or sa-solver")
    scheduler.set_timesteps(num_steps)
    if name == "sa-solver":
        scheduler.sigmas[-1] = LAST_SIGMA  # diffusers leaves in the noise of timestep 0
    return Solver(scheduler, has_learned_variance=name == "iddpm")
