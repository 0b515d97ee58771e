"""The family of features that leads a stage's control branch."""

from errors import UserError
from pipelines.command import Command
from training.config import StageTraining
from training.data.datasets import Dataset

PREFIX = "control-"


def control_family(command: Command, settings: StageTraining, dataset: Dataset) -> str:
    """Return the name of the family that leads: the one that the recipe names, else the only one there is.

    Raises:
        UserError: the features have none, not that one, or several of which none is named; names the recipe's keys.
    """
    table = settings.features or command.stage_name
    key = f"training.{command.stage_name}.control_family"
    found = [each.family.name for each in dataset.directories if each.family.name.startswith(PREFIX)]
    wanted = settings.control_family
    if not found or (wanted is not None and wanted not in found):
        has = f"has {', '.join(found)}" if found else "has none"
        name = wanted or f"{PREFIX}canny"
        raise UserError(
            f"{command.recipe.path}: training.{command.stage_name}.trains = 'control' reads control images "
            f"({key} = {wanted!r}), and of such families [features.{table}] {has}: add "
            f"[features.{table}.families.{name}]"
        )
    if wanted is None and len(found) > 1:
        raise UserError(f"{command.recipe.path}: [features.{table}] has {', '.join(found)}: say which leads in {key}")
    return wanted or found[0]
