"""What weights of a network that an objective does not train, such as a teacher, must be like."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from errors import UserError
from pixart.dit import DiT
from pixart.model import PixArt
from pixart.processes.specs import predicts_alike, process_title
from training.config import StageTraining
from training.stages.agreement import require_own_schedule


def require_own_process(process: Mapping[str, Any], settings: StageTraining, *, key: str) -> None:
    """Refuse weights that say something else than the stage's network; `process` is their spec.

    Raises:
        UserError: they are of a process that predicts something else, or of another noise schedule; names their `key`
            and both.
    """
    own = settings.process_spec
    if not predicts_alike(process, own):
        raise UserError(f"{key} was trained with process {process_title(process)}, not {process_title(own)}")
    require_own_schedule(process, own, key=key)


def require_alike(network: DiT | PixArt, trained: DiT | PixArt, *, in_channels: int, key: str) -> None:
    """Refuse a network that cannot be asked what the one that trains is asked, of latents of so many channels.

    Raises:
        UserError: it is of another kind or size, or is told its guidance, as students are alone; names its `key`.
    """
    if type(network) is not type(trained):
        raise UserError(f"{key} is a {type(network).__name__}, but the stage trains a {type(trained).__name__}")
    found, wanted = dataclasses.asdict(network.config), dataclasses.asdict(trained.config)
    wanted["in_channels"] = in_channels
    for field in {"in_channels", "sample_size", "caption_channels", "num_classes"} & found.keys():
        if found[field] != (value := wanted[field]):
            raise UserError(f"{key} has {field} {found[field]}, but the network that is trained has {value}")
    if found.get("has_guidance_condition"):
        raise UserError(
            f"{key} is told its guidance, as students alone are: name the weights that it was distilled from"
        )
