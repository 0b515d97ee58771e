"""The patches that a stage's network will cut latents into: features need their size, and open no weights for it."""

from pathlib import Path
from typing import Any

from errors import MissingFileError
from pipelines.command import Command
from pipelines.recipe import ModelConfig
from pipelines.store.state_files import read_state

# Where a folder that a stage starts from may have its transformer: itself, of a pipeline, of a checkpoint of training.
PLACES = (".", "transformer", "model")
STAGE_FOLDER = "{run}/training/"


def patch_size(command: Command, table: str) -> int:
    """Return the side of a patch in latents: `model.patch_size`, else that of the weights a stage starts from.

    Weights that are no folder on this machine, which only training opens, are taken to have the default: every
    published one has.

    Args:
        command: has the recipe and the run.
        table: named table of `[features]`, which stages of training read.

    Raises:
        UserError: `[model]` is wrong, or a config.json is damaged.
    """
    recipe = command.recipe
    model = recipe.table("model", ModelConfig)
    if "patch_size" in recipe.tables.get("model", {}):
        return model.patch_size
    for stage in recipe.names("training"):
        settings = recipe.laid_over("training", stage)
        if (settings.get("features") or stage) == table:
            found = _starting_patch(command, stage, settings, seen=())
            if found is not None:
                return found
    return model.patch_size


def _starting_patch(command: Command, stage: str, settings: dict[str, Any], *, seen: tuple[str, ...]) -> int | None:
    """Return the patch of what a stage starts from, through the stages before it; None where no folder tells."""
    wanted = settings.get("starts_from")
    if not isinstance(wanted, str) or stage in seen:
        return None
    name = wanted.removeprefix(STAGE_FOLDER)
    if name in command.recipe.names("training"):
        return _starting_patch(command, name, command.recipe.laid_over("training", name), seen=(*seen, stage))
    for place in PLACES:
        try:
            folder = Path(wanted.replace("{run}", str(command.run))) / place
            stored = read_state(folder / "config.json", mend="fetch it again")
        except (MissingFileError, NotADirectoryError):
            continue
        # Diffusers' default of either network.
        return stored.get("patch_size", 2)
    return None
