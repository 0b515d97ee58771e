"""A process made of its spec."""

from collections.abc import Mapping
from typing import Any

import torch

from errors import UserError
from pixart.processes.ddpm import DDPM
from pixart.processes.flow import Flow
from pixart.processes.noise_flow import NoiseFlow
from pixart.processes.process import Process
from pixart.processes.specs import SOLVERS, is_spec

# What a spec may have beside its name, prediction and schedule.
FLOW_SETTINGS = {"sampler", "student"}
DDPM_SETTINGS = {"sampler", "min_snr_gamma", "times_density", "student"}


def process_of(spec: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Process:
    """Make the process that a spec describes, its tables on `device`.

    Raises:
        UserError: the spec is of no process known here, or one of its values is; says which.
    """
    match dict(spec):
        case {"name": "ddpm", "prediction": "noise", "schedule": schedule, **settings} if (
            settings.keys() <= DDPM_SETTINGS and is_spec(spec)
        ):
            return DDPM(schedule, **settings, device=device)
        case {
            "name": "flow",
            "prediction": "velocity",
            "schedule": {"shift": shift, "logit_mean": logit_mean, "logit_std": logit_std, **unknown},
            **settings,
        } if not unknown and settings.keys() <= FLOW_SETTINGS and is_spec(spec):
            return Flow(shift=shift, logit_mean=logit_mean, logit_std=logit_std, **settings)
        case {
            "name": "flow",
            "prediction": "noise",
            "schedule": {"shift": shift, "logit_mean": logit_mean, "logit_std": logit_std, **unknown},
            "network_schedule": network_schedule,
            **settings,
        } if not unknown and not settings and is_spec(spec):
            return NoiseFlow(
                shift=shift,
                logit_mean=logit_mean,
                logit_std=logit_std,
                network_schedule=network_schedule,
                device=device,
            )
        case {"name": name, **others} if name in SOLVERS:
            raise UserError(f"process {name} with {others} is none that this version knows")
        case _:
            raise UserError(f"process {spec.get('name')!r} is none of {', '.join(SOLVERS)}")
