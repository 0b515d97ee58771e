"""All prompts or classes of a recipe, in every style, each with the image that leads it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from errors import UserError
from pipelines.as_typed import ANY, typed_flag, typed_path
from pipelines.engine.progress import get_logger
from sampling.config import SamplingConfig
from sampling.control_images import KEY
from sampling.prompts import Prompt, class_prompts, read_prompts, single_prompt
from sampling.styles import in_styles, read_styles
from sampling.trained_model import TrainedModel

log = get_logger("sampling")


def list_prompts(config: SamplingConfig, trained: TrainedModel, *, run: Path) -> list[Prompt]:
    """Return what is drawn, one after another; no prompt has a control image that nothing would look at.

    Raises:
        MissingFileError: the prompt file or a control image does not exist.
        UserError: prompts, classes, styles or control images are not what the weights can draw.
    """
    if trained.num_classes is not None:
        return _class_prompts(config, trained, num_classes=trained.num_classes)
    if config.prompt is not None:
        prompts = [single_prompt(config.prompt, seed=config.seed)]
    elif config.prompts is not None:
        path = typed_path(config.prompts.replace("{run}", str(run)))
        prompts = read_prompts(path, seed=config.seed, column=config.prompt_column)[: config.max_prompts]
    else:
        raise UserError(
            f"neither sampling.prompts nor sampling.prompt is set: type {typed_flag('prompts', ANY)} or "
            f"{typed_flag('prompt', ANY)}"
        )
    prompts = in_styles(prompts, read_styles(config.styles, run=run) if config.styles else [])
    return _with_control(prompts, config, trained, run=run)


def control_path(control: str, trained: TrainedModel, *, run: Path) -> Path:
    """Return the path of `sampling.control`, which leads all prompts; `{run}` is the run's folder.

    Raises:
        UserError: the weights have no branch that it could lead.
    """
    if trained.branch is None:
        raise UserError(
            f"{KEY} is set, but {trained.name} has no control branch: name one as sampling.control_branch "
            f"({typed_flag('branch', ANY)}), or draw from a checkpoint that trained one"
        )
    return typed_path(control.replace("{run}", str(run)))


def _class_prompts(config: SamplingConfig, trained: TrainedModel, *, num_classes: int) -> list[Prompt]:
    for key in ("prompt", "control", "styles"):
        if getattr(config, key) is not None:
            raise UserError(f"sampling.{key} is set, but {trained.name} knows classes, not text")
    classes = config.classes or range(num_classes)
    for label in classes:
        if not 0 <= label < num_classes:
            raise UserError(f"sampling.classes {label}: {trained.name} has {num_classes} classes")
    return class_prompts(list(classes), seed=config.seed)[: config.max_prompts]


def _with_control(
    prompts: Sequence[Prompt], config: SamplingConfig, trained: TrainedModel, *, run: Path
) -> list[Prompt]:
    """Give each prompt the image that leads it; what is of no use is refused, or of a prompt file left out and said."""
    num_led = sum(prompt.control is not None for prompt in prompts)
    if config.control is not None:
        if num_led:
            raise UserError(
                f"{KEY} is set, and {num_led:,} of the prompts have a control image of their own: leave one out"
            )
        path = control_path(config.control, trained, run=run)
        return [replace(prompt, control=path) for prompt in prompts]
    if not num_led:
        for key in ("control_strength", "control_is", "control_kind"):
            if getattr(config, key) != SamplingConfig.model_fields[key].default:
                raise UserError(
                    f"sampling.{key} is {getattr(config, key)!r}, but nothing leads what is drawn: type "
                    f"{typed_flag('control', ANY)}, or give prompts a column `control`"
                )
        if trained.branch is not None:
            log.info(f"{trained.name}: nothing leads what is drawn, so its control branch adds nothing")
        return list(prompts)
    if trained.branch is None:
        log.warning(
            f"{trained.name} has no control branch: the control images of {num_led:,} prompts are not looked at "
            f"({typed_flag('branch', ANY)} names a branch)"
        )
        return [replace(prompt, control=None) for prompt in prompts]
    if num_led < len(prompts):
        num_others = len(prompts) - num_led
        log.info(f"{num_others:,} of {len(prompts):,} prompts have no control image and are drawn without")
    return list(prompts)
