"""What a stage needs that trains beside weights, which stay as they are: adapters and control branches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.command import Command
from pixart.processes.specs import predicts_alike, process_title
from training.config import StageTraining


def require_pixart(command: Command, settings: StageTraining) -> None:
    """Refuse what trains beside weights of another network than a PixArt."""
    if settings.keeps_base and settings.network != "pixart":
        key = f"training.{command.stage_name}"
        raise UserError(
            f"{key}.trains = {settings.trains!r} is for a PixArt, but {key}.network is {settings.network!r}"
        )


def require_base(
    command: Command, settings: StageTraining, start: Path | None, *, process: Mapping[str, Any] | None
) -> None:
    """Refuse what trains beside weights where there are none that it could be put beside, and stay beside.

    Args:
        command, settings: of the stage.
        start: the weights that it starts from.
        process: spec of the one that those were trained with; None of a stage that has begun, for which it does not
            count any more.
    """
    key = f"training.{command.stage_name}"
    trains = f"{key}.trains = {settings.trains!r}"
    if start is None:
        raise UserError(
            f"{trains} trains beside weights, which stay as they are, but {key}.starts_from names none "
            f"({settings.starts_from!r}): name a stage, folder, file or hub id"
        )
    if process is not None and not predicts_alike(process, own := settings.process_spec):
        way = f": flow_prediction = {process['prediction']!r} goes on with them" if own["name"] == "flow" else ""
        raise UserError(
            f"{trains} keeps the weights' own output layer, but they ({start}) were trained with process "
            f"{process_title(process)}, and {key}.process is {process_title(own)!r}{way}"
        )


def require_many_steps(command: Command, settings: StageTraining, student: Mapping[str, Any] | None) -> None:
    """Refuse a control branch beside weights that were distilled to few steps: it is trained to be drawn in many.

    `student` is what their process says of that, None of others.
    """
    if settings.has_control and student is not None:
        key = f"training.{command.stage_name}"
        raise UserError(
            f"{key}.trains = 'control' trains a branch for many steps beside weights that stay as they are, but "
            f"{key}.starts_from = {settings.starts_from!r} was distilled by {student['method']} to few: train it "
            "beside the weights that it was distilled from, and name it as sampling.control_branch to draw with these"
        )
