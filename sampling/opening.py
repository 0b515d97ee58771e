"""The weights that a recipe draws from: those of its run, or those that `sampling.checkpoint` names."""

from errors import UserError
from pipelines.command import Command
from sampling.config import SamplingConfig, encoder_config
from sampling.foreign_weights import open_trained_model
from sampling.trained_model import TrainedModel, open_run_model


def find_trained_model(config: SamplingConfig, command: Command) -> TrainedModel:
    """Open `sampling.checkpoint`, or the checkpoint of the command's run and stage; raises as those two do."""
    if config.checkpoint is None:
        _require_stage(command)
        trained = open_run_model(command.run, command.stage_name)
        _require_same_process(trained, command)
        return trained
    return open_trained_model(
        config.checkpoint,
        encoder_config(command.recipe),
        revision=config.checkpoint_revision,
        resolution=config.checkpoint_resolution,
    )


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
