"""A training stage, resolved and checked before anything heavy is imported: settings, features, where it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.weights import resolve_model
from pipelines.command import Command
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint
from pixart.processes.specs import ddpm_spec
from training.config import SCRATCH, ModelConfig, StageTraining, stage_training
from training.data.features import StageFeatures, open_features
from training.stages.checkpoint import MODEL, STATE, TRAINER, Checkpoint, find_checkpoint, open_checkpoint

SURVEY = "survey.json"
# Settings that may change between a run and its resume: they move no sample and no weight beyond rounding.
FREE_SETTINGS = {
    "datasets",  # their features identify them, wherever they lie
    "objective",  # there is one
    "num_steps",
    "init_from",
    "num_processes",
    "hostfile",
    "remote_shell",
    "compile",
    "threads_per_process",
    "gradient_accumulation_steps",
    "keep_activations",
    "validate_every",
    "num_validation_samples",
    "prefetch_batches",
    "check_payloads",
    "cache_dir",
    "cache_gigabytes",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "device_peak_teraflops",
    "dollars_per_device_hour",
    "watts_per_device",
    "co2_kilograms_per_kilowatt_hour",
}


@dataclass(frozen=True)
class StartingPoint:
    """Weights a stage starts from: a diffusers folder or original file, or None for fresh ones, and their `identity`.

    `checkpoint` is the training checkpoint they are of, if they are of one.
    """

    path: Path | None
    identity: str
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One `python -m training`: everything that is decided before the ranks start.

    `resume` is the newest checkpoint of the stage itself when the job was opened: the one it continues from.
    """

    command: Command
    stage: int
    settings: StageTraining
    model: ModelConfig
    features: StageFeatures
    start: StartingPoint
    directory: Path
    fingerprint: Fingerprint
    resume: Checkpoint | None

    @property
    def process(self) -> dict[str, Any]:
        """Spec of the process that the stage trains."""
        return ddpm_spec(min_snr_gamma=self.settings.min_snr_gamma)


def open_stage(command: Command) -> TrainingJob:
    """Resolve a command and check it against what is on disk.

    Raises:
        FileNotFoundError: features or the former stage's checkpoint are missing; says which command makes them.
        ValueError: the recipe is wrong, or differs from what the features or the checkpoint to resume were made with.
    """
    assert command.stage is not None
    settings = stage_training(command.recipe, command.stage)
    model = command.recipe.table("model", ModelConfig)
    features = open_features(command, settings)
    directory = command.run / "training" / command.stage_name
    resume = find_checkpoint(directory)
    start = _start_or_recorded(command, settings, directory, resume=resume)
    job = TrainingJob(
        command=command,
        stage=command.stage,
        settings=settings,
        model=model,
        features=features,
        start=start,
        directory=directory,
        fingerprint=_fingerprint(command.stage, settings, model=model, features=features, start=start),
        resume=resume,
    )
    if resume is not None:
        _require_same_job(job, resume)
    return job


def _fingerprint(
    stage: int, settings: StageTraining, *, model: ModelConfig, features: StageFeatures, start: StartingPoint
) -> Fingerprint:
    fields: dict[str, Any] = {"stage": stage, "training.init_from": start.identity, **features.fingerprint_fields()}
    # A DiT's is its own; unnamed where it is the paper's, as in checkpoints made before there was a choice.
    is_implied = stage == 1 or model.adaln == "single"
    shape = model.model_dump(mode="json", exclude={"adaln"} if is_implied else None)
    fields |= {f"model.{name}": value for name, value in shape.items()}
    chosen = settings.model_dump(mode="json", exclude=FREE_SETTINGS)
    return Fingerprint.of(fields | {f"training.{name}": value for name, value in chosen.items()})


def _require_same_job(job: TrainingJob, checkpoint: Checkpoint) -> None:
    made_with, wanted = checkpoint.trainer["fingerprint"], job.fingerprint.fields
    # A setting says more than the hash of the files it changed.
    for name in sorted(made_with.keys() | wanted.keys(), key=lambda name: (name.endswith(".files"), name)):
        if made_with.get(name) != wanted.get(name):
            raise ValueError(
                f"{checkpoint.path} was trained with {name} {made_with.get(name)!r}, "
                f"but it is {wanted.get(name)!r} now; remove {job.directory} to train anew, or choose another RUN"
            )


def _start_or_recorded(
    command: Command, settings: StageTraining, directory: Path, *, resume: Checkpoint | None
) -> StartingPoint:
    """Return where the stage starts; one that has begun can go on when that is gone: its checkpoint has all of it."""
    try:
        start = _starting_point(command, settings, directory)
    except FileNotFoundError:
        if resume is None or resume.trainer.get("init_from", settings.init_from) != settings.init_from:
            raise
        return StartingPoint(None, resume.trainer["fingerprint"]["training.init_from"])
    if resume is None and start.checkpoint is not None:
        _require_finished(command, settings, start.checkpoint)
    return start


def _require_finished(command: Command, settings: StageTraining, checkpoint: Checkpoint) -> None:
    """Refuse weights of a stage that is neither at the end it was given nor at the one the recipe gives it now."""
    num_steps = checkpoint.trainer["num_steps"]
    if settings.init_from is None:
        assert command.stage is not None
        num_steps = min(num_steps, stage_training(command.recipe, command.stage - 1).num_steps)
    if checkpoint.step < num_steps:
        key = f"training.{command.stage_name}.init_from"
        raise ValueError(
            f"{checkpoint.path.parent} has done {checkpoint.step} of {num_steps} steps; "
            f"finish that stage first, or set {key} = {str(checkpoint.path / MODEL)!r} to start from it as it is"
        )


def _starting_point(command: Command, settings: StageTraining, directory: Path) -> StartingPoint:
    key = f"training.{command.stage_name}.init_from"
    if settings.init_from == SCRATCH or (settings.init_from is None and command.stage == 1):
        return StartingPoint(None, SCRATCH)
    if settings.init_from is None:
        assert command.stage is not None
        former = command.run / "training" / f"stage{command.stage - 1}"
        checkpoint = find_checkpoint(former)
        if checkpoint is None:
            raise FileNotFoundError(
                f"{former} has no checkpoint: stage {command.stage} starts from the weights of stage "
                f"{command.stage - 1}; run `make train STAGE={command.stage - 1} RUN={command.run}` first or set {key}"
            )
        return _from_checkpoint(checkpoint)
    path = Path(settings.init_from.replace("{run}", str(command.run)))
    if directory in (path, *path.parents):
        raise ValueError(
            f"{key} = {settings.init_from!r} is this stage's own folder; resuming is automatic and needs no key"
        )
    checkpoint = open_checkpoint(path) if (path / TRAINER).is_file() else find_checkpoint(path)
    if checkpoint is not None:
        return _from_checkpoint(checkpoint)
    if (path / STATE).is_dir():
        raise ValueError(f"{key} = {settings.init_from!r} is a checkpoint without {TRAINER}: it was not written whole")
    return find_weights(settings.init_from.replace("{run}", str(command.run)))


def _from_checkpoint(checkpoint: Checkpoint) -> StartingPoint:
    identity = f"{checkpoint.trainer['plan_fingerprint']}@{checkpoint.step}"
    return StartingPoint(checkpoint.path / MODEL, identity, checkpoint)


def find_weights(model_id: str) -> StartingPoint:
    """Find an original file by path, or a diffusers folder by path or hub id (of a pipeline its `transformer`).

    Raises:
        FileNotFoundError: it looks like a path, and there is nothing.
    """
    if Path(model_id).is_file():
        return StartingPoint(Path(model_id), f"sha256:{sha256_file(Path(model_id))}")
    source = resolve_model(model_id)
    folder = Path(source.location)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=["transformer/*"]))
    return StartingPoint(folder / "transformer" if (folder / "transformer").is_dir() else folder, source.identity)
