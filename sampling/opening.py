"""The weights that a recipe draws from: those of its run, or those that `sampling.checkpoint` names."""

from errors import UserError
from pipelines.command import Command
from pipelines.engine.progress import get_logger
from pixart.processes.specs import describe_unused_settings
from sampling.adapters import add_adapters
from sampling.branches import add_branch
from sampling.config import SamplingConfig, encoder_config
from sampling.control_kind import with_maps
from sampling.foreign_weights import open_trained_model
from sampling.trained_model import TrainedModel, open_run_model

log = get_logger("sampling")


def find_trained_model(config: SamplingConfig, command: Command) -> TrainedModel:
    """Open `sampling.checkpoint`, or the checkpoint of the command's run and stage, and what to add to it: a control
    branch, and adapters.

    Raises as these do.
    """
    if config.checkpoint is None:
        _require_stage(command)
        trained = open_run_model(command.run, command.stage_name)
        _require_same_process(trained, command)
    else:
        trained = open_trained_model(
            config.checkpoint,
            encoder_config(command.recipe),
            revision=config.checkpoint_revision,
            resolution=config.checkpoint_resolution,
            departs_in=config.departs_in,
        )
        log.info(f"{trained.name}: {trained.origins.describe(reads_text=trained.kind == 'pixart')}")
    trained = with_maps(add_branch(trained, config.control_branch, run=command.run), config)
    trained = add_adapters(trained, config.lora, config.lora_weights, run=command.run)
    if (unused := describe_unused_settings(trained.process, config.solver)) is not None:
        log.info(f"{trained.name}: {unused}")
    return trained


def _require_stage(command: Command) -> None:
    """Refuse a stage that neither the recipe nor the run knows."""
    names = command.recipe.names("training")
    if command.stage not in names and not (command.run / "training" / command.stage_name).is_dir():
        known = ", ".join(names) or "none"
        raise UserError(f"{command.recipe.path}: there is no [training.{command.stage}]; its stages are: {known}")


def _require_same_process(trained: TrainedModel, command: Command) -> None:
    """Refuse a recipe that names another process for the stage: what it would draw is not what it asks for."""
    stage, actual = command.stage_name, trained.process["name"]
    settings = command.recipe.laid_over("training", stage) if stage in command.recipe.names("training") else {}
    if settings.get("process", actual) != actual:
        raise UserError(
            f"training.{stage}.process is {settings['process']!r} in the recipe, but {trained.model_path.parent} was "
            f"trained with {actual!r}; train the stage anew, or draw with the recipe it was trained by"
        )
