"""The checkpoints that are scored side by side, and the folder of samples of each."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.as_typed import ANY, typed_flag
from pipelines.command import Command, full_stage_name
from pipelines.engine.run import EngineConfig
from pipelines.store.checkpoints import read_trainer
from pipelines.store.files import sha256_text
from sampling.config import SamplingConfig, encoder_config
from sampling.control_kind import with_maps
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.prompt_sets import write_prompt_set
from sampling.foreign_weights import open_trained_model
from sampling.generate import SamplingJob, check_job, make_job, run_job
from sampling.opening import find_trained_model
from sampling.students import require_choosable_guidance
from sampling.trained_model import TrainedModel, open_run_model


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A checkpoint, what it is called in tables, and its samples, drawn or not."""

    title: str
    trained: TrainedModel
    job: SamplingJob

    @property
    def folder(self) -> Path:
        """Where the samples lie."""
        return self.job.directory.path

    def inputs(self) -> dict[str, Any]:
        """Return what decides the samples, to be printed beside the numbers."""
        config = self.job.config
        return {
            "checkpoint": self.trained.name,
            "weights": weights_kind(self.trained),
            "checkpoint_fingerprint": self.trained.identity,
            "model": str(self.trained.model_path),
            "samples": str(self.folder),
            "samples_fingerprint": self.job.fingerprint.digest,
            "prompts": config.prompts if self.trained.kind == "pixart" else "its classes",
            "requests": self.job.identity,
            "num_images": len(self.job.requests),
            "images_per_prompt": config.images_per_prompt,
            "seed": config.seed,
            "solver": config.solver,
            "num_steps": config.num_steps,
            **({} if config.times is None else {"times": config.times}),
            "guidance_scale": config.guidance_scale,
            "negative_prompt": config.negative_prompt,
            "size": config.size or "as trained",
            **({"adapters": [item.title for item in self.trained.adapters]} if self.trained.adapters else {}),
            **({"control_strength": config.control_strength} if self.job.controls else {}),
            **({} if config.weight_dtype is None else {"weight_dtype": config.weight_dtype}),
        }


def weights_kind(trained: TrainedModel) -> str:
    """Return `ema` for a run's export, as its trainer.json says; other folders do not say."""
    return "as saved in the folder" if trained.checkpoint is None else read_trainer(trained.checkpoint)["weights"]


def find_contestants(
    command: Command, config: EvaluationConfig, *, guidance_scale: float | None = None
) -> list[Contestant]:
    """Open the stage's checkpoint and those of evaluation.compare, and settle what each is to draw.

    The checkpoint of the stage with the recipe's own prompts uses `RUN/samples/<stage>`, what `make sample` draws;
    everything else lies in `RUN/evaluation/samples/`.

    Raises:
        MissingFileError, UserError: a checkpoint or prompt file is not there or not usable.
    """
    sampling = _sampling_config(command, guidance_scale=guidance_scale)
    prompts = write_prompt_set(config, run=command.run)
    if prompts is not None:
        sampling = sampling.model_copy(update={"prompts": str(prompts), "prompt_column": "prompt", "max_prompts": None})
    suffix = "" if prompts is None else f"-{config.prompt_set}"
    if guidance_scale is not None:
        suffix += f"-cfg{guidance_scale:g}"
    is_plain = not suffix
    own = find_trained_model(sampling, command)
    if own.num_classes is None and sampling.prompts is None:
        # `sampling.prompt` is one image's for `make sample`, and no set to measure.
        raise UserError(f"sampling.prompts is not set: type {typed_flag('prompts', ANY)}, or set evaluation.prompt_set")
    checkpoints = [(command.stage_name, own)]
    others = [_open_other(spec, command, departs_in=sampling.departs_in) for spec in config.compare]
    checkpoints += [(name, with_maps(trained, sampling)) for name, trained in others]
    contestants = []
    for number, (name, trained) in enumerate(checkpoints):
        if guidance_scale is not None:
            require_choosable_guidance(trained, key="evaluation.guidance_scales")
        is_own_folder = number == 0 and is_plain
        job = make_job(
            sampling,
            trained,
            run=command.run if is_own_folder else command.run / "evaluation",
            name=name if is_own_folder else f"{name}{suffix or '-scored'}",
            engine=command.recipe.table("engine", EngineConfig),
        )
        contestants.append(Contestant(title=trained.name, trained=job.trained, job=job))
    return _distinct(contestants)


def _distinct(contestants: list[Contestant]) -> list[Contestant]:
    identities = [item.trained.identity for item in contestants]
    for number, item in enumerate(contestants):
        first = identities.index(item.trained.identity)
        if first < number:
            raise UserError(
                f"evaluation.compare: {item.title} and {contestants[first].title} are the same weights "
                f"({item.trained.model_path})"
            )
    titles = [item.title for item in contestants]
    return [
        item
        if titles.count(item.title) == 1
        else Contestant(title=f"{item.title} ({item.trained.model_path})", trained=item.trained, job=item.job)
        for item in contestants
    ]


def check_samples(contestants: Sequence[Contestant]) -> list[dict[str, str]]:
    """Look at all that would stop the drawing of any contestant before the first image; gives what `check_job` does."""
    return [check_job(contestant.job) for contestant in contestants]


def draw_samples(contestants: Sequence[Contestant], *, run: Path) -> None:
    """Draw what is missing of all contestants' samples."""
    for contestant, lost in zip(contestants, check_samples(contestants), strict=True):
        run_job(contestant.job, run=run, lost=lost)


def _sampling_config(command: Command, *, guidance_scale: float | None) -> SamplingConfig:
    sampling = command.recipe.table("sampling", SamplingConfig)
    update: dict[str, Any] = {"prompt": None}
    # Below RUN/evaluation `{run}` stands for RUN all the same.
    for name in ("prompts", "text_embeddings", "control"):
        value = getattr(sampling, name)
        update[name] = value and value.replace("{run}", str(command.run))
    if sampling.styles is not None:
        update["styles"] = [style.replace("{run}", str(command.run)) for style in sampling.styles]
    if guidance_scale is not None:
        update["guidance_scale"] = guidance_scale
    return sampling.model_copy(update=update)


def _open_other(spec: str, command: Command, *, departs_in: Collection[str]) -> tuple[str, TrainedModel]:
    """Open `<run>:<stage>` or what sampling.checkpoint takes; samples are named after scored stage and weights."""
    run, separator, stage_name = spec.rpartition(":")
    if separator and "/" not in stage_name:
        trained = open_run_model(Path(run), full_stage_name(stage_name))
    else:
        trained = open_trained_model(spec, encoder_config(command.recipe), departs_in=departs_in)
    return f"{command.stage_name}-{sha256_text(trained.identity)[:8]}", trained
