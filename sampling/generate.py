"""Draw what is missing of `RUN/samples/<name>/`: images, `samples.parquet`, `grid.png` and the manifest."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.devices import require_device
from encoders.text import DEFAULT_CLEANING
from encoders.tokens import find_lost_words
from encoders.weights import require_model, resolve_model
from errors import UserError
from pipelines.engine.pieces import Source, forget_pieces
from pipelines.engine.preflight import require_packages, require_workers
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig, run_over_shards
from pipelines.recipe import DECIDES
from pipelines.store.files import atomic_file, exclusive, remove_temporary_files, sha256_text
from pipelines.store.manifest import MANIFEST_NAME, Fingerprint, ShardDirectory
from pipelines.store.summary import update_summary
from pixart.processes.specs import num_passes, require_solver
from sampling.config import ON_A_CPU, SamplingConfig
from sampling.control_images import ControlImage
from sampling.control_plan import check_control, describe_control
from sampling.grid import make_grid
from sampling.grid_cells import lay_out
from sampling.images import is_own, is_whole, is_written
from sampling.inputs import image_inputs
from sampling.precision import settle
from sampling.prompt_list import list_prompts
from sampling.requests import ImageRequest, make_requests, warn_of_untrained_size
from sampling.students import describe_oddities, follow_weights
from sampling.trained_model import TrainedModel, resolve_part

log = get_logger("sampling")

REPORT_NAME = "samples"
GRID_NAME = "grid.png"
MAX_LOST_SHOWN = 3
HIGH_GUIDANCE = 20.0
MAX_LOST_CHARACTERS = 200
# What decides no image that nothing leads.
WITHOUT_CONTROL = {"control_strength": 1.0, "control_is": "map"}


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """Everything that is to lie in one folder of samples, whether drawn already or not.

    No `auto` of a dtype is left in `config`; `note` says where it is not what this machine would have.
    """

    config: SamplingConfig
    trained: TrainedModel
    requests: list[ImageRequest]
    fingerprint: Fingerprint
    directory: ShardDirectory
    engine: EngineConfig
    note: str | None = None

    @property
    def in_order(self) -> list[ImageRequest]:
        """The images in the order of work, those of one size together.

        First images of all prompts come first, so that a larger N leaves their batches as they are.
        """
        each = self.config.images_per_prompt
        return sorted(self.requests, key=lambda item: (*item.shape, item.number % each, item.number))

    @property
    def identity(self) -> str:
        """Hash of what is requested."""
        return "sha256:" + sha256_text(json.dumps([request.outline() for request in self.requests]))

    @property
    def controls(self) -> list[ControlImage]:
        """The images that lead what is drawn, each once."""
        return list(dict.fromkeys(item.control for item in self.requests if item.control is not None))

    @property
    def title(self) -> str:
        """What pictures of the images say of weights and settings."""
        strength = f" · control at {self.config.control_strength:g}" if self.controls else ""
        return f"{self.trained.name} · {self.config.title}{strength}"

    def is_done(self) -> bool:
        """Whether this very job has been finished and all its files are still there, images to their end."""
        folder = self.directory.path
        return (
            self.directory.is_done(REPORT_NAME, self.identity, self.fingerprint)
            and (folder / MANIFEST_NAME).is_file()
            and all(map(is_whole, (folder / GRID_NAME, *_files(folder, self.requests))))
        )

    def changed_settings(self) -> list[str]:
        """Return `field: old -> new` of each setting by which what has been drawn differs from this job."""
        defaults = {**self.config.fingerprint_defaults(), **ON_A_CPU}
        changes = self.directory.changes(self.fingerprint, defaults=defaults)
        settings = tuple(f"{name}: " for name in self.config.noted_fields(DECIDES))
        return [change for change in changes if change.startswith(settings)]

    def pending(self) -> list[ImageRequest]:
        """Return the images that are not there yet."""
        folder = self.directory.path
        return [item for item in self.requests if not is_written(folder, item, fingerprint=self.fingerprint)]


def make_job(
    config: SamplingConfig, trained: TrainedModel, *, run: Path, name: str, engine: EngineConfig
) -> SamplingJob:
    """Read the prompts and settle size, seed and file of each image of `RUN/samples/<name>`.

    Raises:
        MissingFileError: the prompt file, a control image or an encoder's folder does not exist.
        UserError: prompts, classes, control images, size or solver are not what the checkpoint can draw.
    """
    config, trained = follow_weights(config, trained)
    checkpoint = f"{trained.name} ({trained.model_path})"
    require_solver(
        trained.process, config.solver, num_steps=config.num_steps, times=config.times, checkpoint=checkpoint
    )
    config = config.model_copy(update={"text_embeddings": config.text_embeddings.replace("{run}", str(run))})
    prompts = list_prompts(config, trained, run=run)
    directory = ShardDirectory(run / "samples" / name)
    requests = make_requests(prompts, config, trained)
    if all(request.control is None for request in requests):
        config = config.model_copy(update=WITHOUT_CONTROL)
    settled = settle(config, image_inputs(config, trained), directory=directory, requests=requests, engine=engine)
    return SamplingJob(
        config=settled.config,
        trained=trained,
        requests=requests,
        fingerprint=settled.fingerprint,
        directory=directory,
        engine=engine,
        note=settled.note,
    )


def describe_job(job: SamplingJob) -> list[str]:
    """Return what the job would do, line by line."""
    config, requests, pending = job.config, job.requests, job.pending()
    sizes = sorted({(item.width, item.height) for item in requests})
    shown = ", ".join(f"{width}x{height}" for width, height in sizes[:5]) + (", …" if len(sizes) > 5 else "")
    return [
        f"checkpoint: {job.trained.name} ({job.trained.model_path})",
        f"would draw {len(pending):,} of {len(requests):,} images ({shown} pixels) into {job.directory.path}",
        f"{config.title}: {len(pending) * _num_passes(job):,} passes of one image through the transformer",
        *describe_control(config, job.trained, requests),
    ]


def _num_passes(job: SamplingJob) -> int:
    """Return how often an image goes through the transformer, both halves of guidance counted."""
    config, scale = job.config, job.trained.pass_guidance(job.config.guidance_scale)
    if config.guidance_interval is None or scale == 1:
        return num_passes(config.solver, config.num_steps) * (1 if scale == 1 else 2)
    from pixart.processes.make import process_of  # which imports torch

    process = process_of(job.trained.process)
    timesteps = process.scheduler(config.solver, config.num_steps, times=config.times).timesteps
    return sum(2 if item.is_guided else 1 for item in config.passes(timesteps, process.num_times, scale=scale))


def check_job(job: SamplingJob) -> dict[str, str]:
    """Look at all that would stop the drawing before anything is loaded or drawn, for the run and for its plan.

    Returns what the model does not read of each prompt that is too long.

    Raises:
        UserError: something in the folder is in the way, a model is missing, or no device or worker fits.
    """
    if job.is_done():
        return {}
    pending = job.pending()
    _require_own(job.directory.path, pending)
    if not pending:
        return _lost_words(job)
    require_packages(*job.config.packages)
    require_device(job.config.device, key="sampling.device")
    require_workers(job.engine, num_pending=len(pending), few_samples=job.config.max_images_in_process)
    return check_inputs(job)


def run_job(job: SamplingJob, *, run: Path, lost: Mapping[str, str]) -> None:
    """Draw the images that are missing, then write table, grid and manifest; a finished job is left alone.

    `lost` is what `check_job` has given.

    Raises:
        UserError: model and VAE do not fit each other, or the model gives no finite latents.
    """
    folder = job.directory.path
    if job.is_done():
        log.info(f"nothing to do: {len(job.requests):,} images of {folder} are done")
        return
    start_seconds = time.monotonic()
    pending = job.pending()
    log.info(f"{job.trained.name}: {len(pending):,} of {len(job.requests):,} images to draw into {folder}")
    if job.note is not None:
        log.info(job.note)
    for change in job.changed_settings():
        log.info(f"{folder} was drawn with another setting: {change}")
    with exclusive(folder):
        remove_temporary_files(folder, is_held=True)
    prompts = {request.prompt for request in job.requests}
    lost = {prompt: words for prompt, words in lost.items() if prompt in prompts}  # the negative one is no sample's
    if pending:
        # What is drawn is what is missing now, whatever pieces of a table an interrupted run has left: images may have
        # been deleted since, or drawn over under other settings.
        job.directory.clear_marker(REPORT_NAME)
        forget_pieces(REPORT_NAME, job.directory)
    _draw(job, num_pending=len(pending), lost=lost)
    _write_grid(job, lost=lost)
    update_summary(run, f"seconds.sampling_{folder.name}", round(time.monotonic() - start_seconds, 1))
    counts: dict[str, Any] = {"read": len(job.requests), "kept": len(job.requests), "rejected": {}}
    if lost:
        counts["prompts_cut"] = len(lost)
    update_summary(run, f"counts.sampling_{folder.name}", counts)
    cut = f" ({_describe_cut(job, lost)})" if lost else ""
    log.info(f"drew {len(pending):,} of {len(job.requests):,} images{cut}, see {folder / GRID_NAME}")


def _require_own(folder: Path, pending: Sequence[ImageRequest]) -> None:
    """Refuse to draw over a picture that somebody else has put here, or has saved anew with changes of his own."""
    for path in _files(folder, pending):
        if path.is_file() and not is_own(path):
            raise UserError(f"{path} is in the way: it is no image that this command has drawn; move it away")


def _files(folder: Path, requests: Sequence[ImageRequest]) -> list[Path]:
    names = (name for request in requests for name in (request.file, request.control_map) if name is not None)
    return [folder / name for name in dict.fromkeys(names)]


def _describe_cut(job: SamplingJob, lost: Mapping[str, str]) -> str:
    assert job.trained.text is not None
    num_prompts = len({request.prompt for request in job.requests})
    return f"{len(lost):,} of {num_prompts:,} prompts cut at {job.trained.text['max_tokens']} tokens"


def check_inputs(job: SamplingJob) -> dict[str, str]:
    """Look at what would be wrong or odd before any model is loaded: encoders, sizes, prompts that are too long.

    Returns what the model does not read of each prompt that is too long.

    Raises:
        UserError: an encoder's model is neither in a folder nor in the hub's cache, and cannot be downloaded.
    """
    trained = job.trained
    require_model(resolve_part(trained, "VAE", trained.vae), key=f"VAE of {trained.name}")
    check_control(job.config, trained, job.requests)
    warn_of_untrained_size(job.config, trained)
    for oddity in describe_oddities(job.config, trained):
        log.warning(oddity)
    if job.config.guidance_scale > HIGH_GUIDANCE:
        log.warning(f"sampling.guidance_scale {job.config.guidance_scale:g} burns colours out; papers take 1.5 to 8")
    if trained.text is None or job.config.text_encoder == "precomputed":
        return {}
    require_model(resolve_part(trained, "text encoder", trained.text), key=f"text encoder of {trained.name}")
    lost = _lost_words(job)
    for prompt, words in list(lost.items())[:MAX_LOST_SHOWN]:
        log.warning(
            f"the model reads {trained.text['max_tokens']} tokens; of {_cut(prompt, 60)!r} these words are lost: "
            f"{_cut(words, MAX_LOST_CHARACTERS)}"
        )
    if len(lost) > MAX_LOST_SHOWN:
        log.warning(f"{len(lost):,} prompts are too long in all")
    return lost


def _lost_words(job: SamplingJob) -> dict[str, str]:
    """Return what is cut off each prompt that is too long; of embeddings made earlier it is not known."""
    text, prompts = job.trained.text, [request.prompt for request in job.requests]
    if text is None or job.config.text_encoder == "precomputed":
        return {}
    return find_lost_words(
        [job.config.negative_prompt, *prompts],
        resolve_model(text["model"], text["revision"]),
        max_tokens=text["max_tokens"],
        cleaning=text.get("cleaning", DEFAULT_CLEANING),
        tokenizer=text.get("tokenizer"),
    )


def _cut(text: str, num_characters: int) -> str:
    return text if len(text) <= num_characters else f"{text[:num_characters]} …"


def _draw(job: SamplingJob, *, num_pending: int, lost: Mapping[str, str]) -> None:
    # Only here, so that a finished job loads no model library.
    from sampling.worker import SampleWorker, SampleWorkerConfig

    by_size = job.in_order
    run_over_shards(
        SampleWorker,
        SampleWorkerConfig(
            sampling=job.config,
            trained=job.trained,
            requests=tuple(by_size),
            fingerprint=job.fingerprint,
            folder=job.directory.path.absolute(),
            lost_words=lost,
        ),
        sources=[Source(name=REPORT_NAME, path="", identity=job.identity, num_samples=len(by_size))],
        output=job.directory,
        fingerprint=job.fingerprint,
        engine=job.engine.model_copy(update={"samples_per_slice": job.config.batch_size}),
        max_reject_fraction=0.0,
        room="sampling",
        # The engine counts the images that are there, too: a table of all is made.
        few_samples=len(by_size) if num_pending <= job.config.max_images_in_process else 0,
        memory_settings=memory_settings(job),
        upstream={"checkpoint": job.trained.identity},
        extra={
            "checkpoint": job.trained.name,
            "resolution": job.trained.resolution,
            "prompts_cut": len(lost),
            "dtype": job.config.dtype,
            "vae_dtype": job.config.vae_dtype,
            "weight_dtype": job.config.weight_dtype or job.config.dtype,
        },
    )


def memory_settings(job: SamplingJob) -> dict[str, Any]:
    """Return what of the recipe to lower where the memory is too small, with its values."""
    config = job.config
    sizes = {f"{item.width}x{item.height}": item.width * item.height for item in job.requests}
    settings: dict[str, Any] = {
        "sampling.batch_size": config.batch_size,
        "sampling.size": max(sizes, key=lambda size: sizes[size], default=config.size),
    }
    if job.trained.text is not None and config.text_encoder == "device":
        settings["sampling.text_encoder"] = f"{config.text_encoder} (8bit takes half, precomputed nothing)"
    if config.vae_tiles is not True:
        settings["sampling.vae_tiles"] = f"{config.vae_tiles} (true takes half)".lower()
    if config.weight_dtype is None:
        settings["sampling.weight_dtype"] = "null (int8 takes half)"
    return settings


def _write_grid(job: SamplingJob, *, lost: Mapping[str, str]) -> None:
    folder, title = job.directory.path, job.title
    if lost:
        title += f" · {_describe_cut(job, lost)}"
    cells, num_columns = lay_out(job.requests, job.config, folder=folder, lost=lost)
    with atomic_file(folder / GRID_NAME) as temporary:
        make_grid(cells, title=title, num_columns=num_columns).save(temporary, format="PNG")
