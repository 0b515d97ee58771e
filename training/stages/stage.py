"""A training stage, resolved and checked before anything heavy is imported: settings, features, where it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from encoders.weights import cached_hub_file, fetch_files, identity_of, of_transformer, require_model, resolve_model
from errors import MissingFileError, UserError
from pipelines.as_typed import typed_command, typed_path
from pipelines.command import Command
from pipelines.recipe import ModelConfig
from pipelines.store.bases import base_of
from pipelines.store.checkpoints import (
    ADAPTER,
    TRAINER,
    Checkpoint,
    DamagedCheckpointError,
    find_checkpoint,
    named_checkpoint,
    open_checkpoint,
    read_trainer,
    require_whole,
)
from pipelines.store.deepspeed_files import STATE
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint
from pixart.evidence import PIPELINE_FILE, origins_of_trainer
from pixart.origins import ORIGINS_FILE, Origins
from pixart.processes.scheduler_configs import spec_beside
from pixart.processes.specs import ddpm_spec, predicts_alike, spec_of_trainer, student_of
from pixart.weight_files import is_original_name
from training.codec_keys import CODEC
from training.config import SCRATCH, StageTraining, random_stream, stage_names, stage_training
from training.data.features import StageFeatures, open_features
from training.stages.agreement import (
    describe_positions,
    describe_schedule,
    origins_of_weights,
    require_agreement,
    require_process,
    with_positions,
)
from training.stages.beside import require_base, require_many_steps, require_pixart
from training.stages.branches import branch_identity, require_no_branch, starting_branch
from training.stages.resume import require_same_job, weights_identity
from training.stages.shape import stage_shape

SURVEY = "survey.json"
STAGE_FOLDER = "{run}/training/"
MODEL_FILES = ("*.json", "*.safetensors")


@dataclass(frozen=True)
class StartingPoint:
    """Weights a stage starts from: a diffusers folder or original file, or None for fresh ones, and their `identity`.

    `checkpoint` is the training checkpoint they are of, if they are of one; `process` what they were trained with,
    the paper's where nothing says so; `location` what named them. `adapters` are merged into the weights, in this
    order; then `shape` is what the config of the network was that they were trained in.
    """

    path: Path | None
    identity: str
    checkpoint: Checkpoint | None = None
    process: dict[str, Any] = field(default_factory=ddpm_spec)
    location: str = ""
    adapters: tuple[Path, ...] = ()
    shape: Mapping[str, Any] | None = None

    @property
    def origins(self) -> Origins:
        """What is known of what they were trained with; raises as opening them does."""
        if self.adapters:  # what was true of their training holds for both
            folder = self.adapters[-1].parent
            return origins_of_trainer(read_trainer(folder), source=str(folder / TRAINER))
        return Origins() if self.path is None else origins_of_weights(self.path, location=self.location)

    def with_process_of(self, origins: Origins) -> "StartingPoint":
        """Return it with the process that its `origins` name, as those of an original file of ours may."""
        return self if origins.process is None else replace(self, process=origins.process.value)


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One `python -m training`: everything that is decided before the ranks start.

    `networks` are the weights of networks beside the one that is trained, and `control` is the branch that a stage of
    one goes on from. `resume` is the stage's own newest checkpoint
    when the job was opened: the one it continues from. `origins` is what the weights it starts from were trained with,
    and `departures` what is to be said of what it has otherwise; of a stage that has begun neither counts any more.
    """

    command: Command
    settings: StageTraining
    model: ModelConfig
    features: StageFeatures
    start: StartingPoint
    networks: Mapping[str, StartingPoint]
    control: Path | None
    directory: Path
    fingerprint: Fingerprint
    resume: Checkpoint | None
    origins: Origins
    departures: Sequence[str]

    @property
    def begins_output_anew(self) -> bool:
        """Whether the weights that the stage starts from were trained to predict something else."""
        has_weights = self.resume is None and self.start.path is not None
        return has_weights and not predicts_alike(self.start.process, self.settings.process_spec)


def open_stage(command: Command, *, checks_files: bool = True) -> TrainingJob:
    """Resolve a command and check it against what is on disk.

    `checks_files` looks at the files of checkpoints, too; with many ranks one does it for all.

    Raises:
        MissingFileError: features or the checkpoint it starts from are missing; says which command makes them.
        UserError: the recipe is wrong, or differs from what the features or the checkpoint to resume were made with.
    """
    settings = stage_training(command.recipe, command.stage_name)
    require_pixart(command, settings)
    features = open_features(command, settings)
    directory = command.run / "training" / command.stage_name
    _require_own_folders(command, settings)
    resume = find_checkpoint(directory, checks_files=checks_files)
    # A finished stage needs no state any more, only weights.
    if resume is not None and resume.step < settings.num_steps and checks_files:
        require_whole(resume.path)
    start = _start_or_recorded(command, settings, directory, resume=resume, checks_files=checks_files)
    # Of a stage that has begun none of it counts any more.
    is_codec = settings.network == CODEC
    origins = Origins() if resume is not None or is_codec else start.origins
    start = start.with_process_of(origins)
    if settings.keeps_base:
        process = start.process if resume is None else None
        require_base(command, settings, start.path, process=process)
        require_many_steps(command, settings, student_of(start.process) if resume is None else None)
    model = stage_shape(
        command.recipe,
        command.stage_name,
        network=settings.network,
        start=start.path,
        former=start.checkpoint,
        resume=resume,
    )
    networks = _networks(command, settings, directory, checks_files=checks_files)
    control, of_control = starting_branch(command, settings, directory)
    if resume is None and settings.control_starts_from is not None:
        key = f"training.{command.stage_name}.control_starts_from"
        _require_finished(command, settings.control_starts_from, of_control, key=key)
    settings = with_positions(settings, origins, features=features, resume=resume)
    departures = []
    if resume is None and checks_files and not is_codec:
        departures = _departures(command, settings, features, start=start, origins=origins, networks=networks)
    identities = {"training.starts_from": start.identity}
    identities |= {f"training.networks.{name}": weights.identity for name, weights in networks.items()}
    identities |= {} if control is None else {"training.control_starts_from": branch_identity(control)}
    fingerprint = _fingerprint(command.stage_name, settings, model=model, features=features, identities=identities)
    if resume is not None:
        require_same_job(fingerprint, resume, features=features, checks_files=checks_files)
        # Later stages know its weights by this digest, which may be that of a former version.
        fingerprint = Fingerprint(fingerprint.fields, resume.trainer["plan_fingerprint"])
    return TrainingJob(
        command=command,
        settings=settings,
        model=model,
        features=features,
        start=start,
        networks=networks,
        control=control,
        directory=directory,
        fingerprint=fingerprint,
        resume=resume,
        origins=origins,
        departures=departures,
    )


def _departures(
    command: Command,
    settings: StageTraining,
    features: StageFeatures,
    *,
    start: StartingPoint,
    origins: Origins,
    networks: Mapping[str, StartingPoint],
) -> list[str]:
    """Compare all weights that a stage begins with, with what it reads; returns what is to be said of that."""
    said = []
    if start.path is not None:
        key = _starts_from(command)
        require_process(command, settings, start.process, key=f"{key} ({start.path})")
        said += require_agreement(command, settings, features, origins=origins, path=start.path, key=key)
        changes = describe_positions(settings, origins, features=features), describe_schedule(settings, start.process)
        said += [change for change in changes if change is not None]
        said += _describe_student(settings, start, key=key)
    for name, weights in networks.items():
        key = f"training.{command.stage_name}.networks.{name}"
        assert weights.path is not None, "only a stage starts from nothing"
        said += require_agreement(command, settings, features, origins=weights.origins, path=weights.path, key=key)
    return said


def _require_own_folders(command: Command, settings: StageTraining) -> None:
    """Refuse a stage of the recipe whose folder is where the chosen one keeps copies, which it may delete."""
    cache = typed_path(settings.cache_dir.replace("{run}", str(command.run)))
    for name in stage_names(command.recipe):
        if command.run / "training" / name in (cache, *cache.parents):
            raise UserError(
                f"{command.recipe.path}: [training.{name}] has the folder of training.cache_dir = "
                f"{settings.cache_dir!r}; give either another name"
            )


def _fingerprint(
    stage: str, settings: StageTraining, *, model: ModelConfig, features: StageFeatures, identities: dict[str, str]
) -> Fingerprint:
    fields = {"random_stream": random_stream(stage), **identities}
    shape = model.fingerprint_fields()
    if settings.network == CODEC:
        shape = {}
    if settings.network == "dit":
        # Its adaLN is its own, and it is told no size.
        shape = {key: value for key, value in shape.items() if key not in ("adaln", "size_condition")}
    return Fingerprint.of(
        fields
        | features.fingerprint_fields()
        | {f"model.{name}": value for name, value in shape.items()}
        | {f"training.{name}": value for name, value in settings.fingerprint_fields().items()}
    )


def _start_or_recorded(
    command: Command, settings: StageTraining, directory: Path, *, resume: Checkpoint | None, checks_files: bool
) -> StartingPoint:
    """Return where the stage starts; one that has begun can go on without that: its own checkpoint has all of it."""
    try:
        start = _starting_point(command, settings, directory, checks_files=checks_files)
    except (MissingFileError, DamagedCheckpointError):
        # Checkpoints of before stages had names may not say where they started; what trains beside it needs it.
        if resume is None or "starts_from" not in resume.trainer or settings.keeps_base:
            raise
        if not _is_same_start(resume.trainer["starts_from"], settings.starts_from):
            raise
        return StartingPoint(None, resume.trainer["fingerprint"]["training.starts_from"])
    if resume is None and settings.starts_from is not None:
        _require_finished(command, settings.starts_from, start.checkpoint, key=_starts_from(command))
    return start


def _starts_from(command: Command) -> str:
    return f"training.{command.stage_name}.starts_from"


def _is_same_start(one: str | None, other: str | None) -> bool:
    return (one or SCRATCH).removeprefix(STAGE_FOLDER) == (other or SCRATCH).removeprefix(STAGE_FOLDER)


def _former_stage(command: Command, wanted: str) -> str | None:
    """Return the stage of this recipe whose weights are wanted, None if they are no stage's."""
    name = wanted.removeprefix(STAGE_FOLDER)
    return name if name in stage_names(command.recipe) else None


def _require_finished(command: Command, wanted: str, checkpoint: Checkpoint | None, *, key: str) -> None:
    """Refuse weights of a stage that is neither at the end it was given nor at the one the recipe gives it now."""
    if checkpoint is None:
        return
    num_steps = checkpoint.trainer["num_steps"]
    former = _former_stage(command, wanted)
    if former is not None:
        num_steps = min(num_steps, stage_training(command.recipe, former).num_steps)
    if checkpoint.step < num_steps:
        raise UserError(
            f"{checkpoint.path.parent} has done {checkpoint.step} of {num_steps} steps; "
            f"finish that stage first, or set {key} = {str(checkpoint.weights)!r} to take it as it is"
        )


def _starting_point(command: Command, settings: StageTraining, directory: Path, *, checks_files: bool) -> StartingPoint:
    if settings.starts_from is None or settings.starts_from == SCRATCH:
        return StartingPoint(None, SCRATCH)
    key = _starts_from(command)
    return _named_weights(command, settings.starts_from, directory, key=key, checks_files=checks_files)


def _networks(
    command: Command, settings: StageTraining, directory: Path, *, checks_files: bool
) -> dict[str, StartingPoint]:
    """Return the weights of networks beside the one that is trained, which a stage needs as long as it trains."""
    key = f"training.{command.stage_name}.networks"
    networks = {}
    for name, wanted in settings.networks.items():
        found = _named_weights(command, wanted, directory, key=f"{key}.{name}", checks_files=checks_files)
        _require_finished(command, wanted, found.checkpoint, key=f"{key}.{name}")
        networks[name] = found if settings.network == CODEC else found.with_process_of(found.origins)
        if (student := student_of(networks[name].process)) is not None:
            raise UserError(
                f"{key}.{name} = {wanted!r} ({found.path}) is itself a student, distilled by {student['method']} to "
                "few steps: name the weights that it was distilled from"
            )
    return networks


def _describe_student(settings: StageTraining, start: StartingPoint, *, key: str) -> list[str]:
    """Return what to say of weights that were distilled to few steps, where the stage trains for many."""
    student = student_of(start.process)
    if student is None or student_of(settings.process_spec) is not None:
        return []
    return [
        f"the weights of {key} ({start.path}) were distilled by {student['method']} to few steps, and objective "
        f"{settings.objective!r} takes them on for many: few will not do any more"
    ]


def _named_weights(command: Command, wanted: str, directory: Path, *, key: str, checks_files: bool) -> StartingPoint:
    """Return the weights that a recipe's `key` names: of a stage, a checkpoint, or others."""
    former = _former_stage(command, wanted)
    named = f"{key} = {wanted!r}"
    location = wanted.replace("{run}", str(command.run))
    path = typed_path(location) if former is None else command.run / "training" / former
    if directory in (path, *path.parents):
        raise UserError(f"{named} is this stage's own folder; resuming is automatic and needs no key")
    checkpoint = named_checkpoint(path, checks_files=checks_files)
    if checkpoint is not None:
        if checkpoint.has_control:
            require_no_branch(checkpoint, named=named)
        return from_checkpoint(checkpoint, checks_files=checks_files)
    if path.name == ADAPTER and (path.parent / TRAINER).is_file():
        # As `model/` of a checkpoint it is taken as it is, however far its stage is.
        checkpoint = open_checkpoint(path.parent, checks_files=checks_files)
        return replace(from_checkpoint(checkpoint, checks_files=checks_files), checkpoint=None)
    if former is not None:
        raise MissingFileError(
            f"{path} has no checkpoint, and {named} needs its weights; "
            f"run `{typed_command('train', {'stage': former, 'run': command.run})}` first, or name others"
        )
    if (path / STATE).is_dir():
        raise UserError(f"{named} is a checkpoint without {TRAINER}: it was not written whole")
    if "/" not in location and not path.exists():
        names = ", ".join(stage_names(command.recipe))
        raise MissingFileError(f"{named} is no stage of {command.recipe.path} ({names}), and no file or folder")
    reads_pixels = stage_training(command.recipe, command.stage_name).network == CODEC
    return (find_model if reads_pixels else find_weights)(location, key=key)


def from_checkpoint(checkpoint: Checkpoint, *, checks_files: bool = True) -> StartingPoint:
    """Return the average of a checkpoint: a whole network's, or the adapters' on the weights that they belong to.

    Raises:
        MissingFileError: those weights are not there any more.
        UserError: they are others now.
    """
    identity, process = weights_identity(checkpoint), spec_of_trainer(checkpoint.trainer)
    if not checkpoint.has_adapters:
        return StartingPoint(checkpoint.weights, identity, checkpoint, process)
    base = base_of(checkpoint, identify=identity_of if checks_files else None)
    adapters = (*base.adapters, checkpoint.weights)
    return StartingPoint(base.path, identity, checkpoint, process, adapters=adapters, shape=base.shape)


def find_model(model_id: str, *, key: str) -> StartingPoint:
    """Find the folder of a codec or a vision model, by path or as the hub calls it; raises as `require_model` does."""
    source = resolve_model(model_id)
    require_model(source, key=key)
    folder = Path(source.location)
    folder = folder if folder.is_dir() else fetch_files(source, MODEL_FILES, key=key)
    return StartingPoint(folder, source.identity, location=model_id)


def find_weights(model_id: str, *, key: str) -> StartingPoint:
    """Find an original file or a diffusers folder (of a pipeline its `transformer`), by path or as the hub calls it.

    Raises:
        MissingFileError: it looks like a path, and there is nothing.
        UserError: the hub has no such model, or the folder's process is not supported; the former names `key`.
    """
    path = typed_path(model_id)
    if is_original_name(model_id) and not path.exists():
        path = cached_hub_file(model_id, key=key)
    if path.is_file():
        return StartingPoint(path, f"sha256:{sha256_file(path)}", location=model_id)
    try:
        source = resolve_model(of_transformer(model_id))
    except MissingFileError as error:
        raise MissingFileError(f"{key}: {error}") from None
    folder = Path(source.location)
    if not folder.is_dir():
        require_model(source, key=key)
        from huggingface_hub import snapshot_download

        patterns = ["transformer/*", "scheduler/*", PIPELINE_FILE, ORIGINS_FILE, "text_encoder/*.json", "vae/*.json"]
        folder = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=patterns))
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    process = spec_beside(folder) or ddpm_spec()
    return StartingPoint(folder, source.identity, process=process, location=model_id)
