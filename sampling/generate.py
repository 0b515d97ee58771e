"""Draw what is missing of `RUN/samples/<name>/`: images, `samples.parquet`, `grid.png` and the manifest."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.manifest import MANIFEST_NAME, Fingerprint, ShardReport, StageDirectory
from pipelines.models import resolve_model
from pipelines.progress import get_logger, progress_bar
from pipelines.storage import atomic_file, sha256_file, sha256_text
from pipelines.summary import update_summary
from sampling.checkpoints import Checkpoint
from sampling.config import SamplingConfig
from sampling.grid import MAX_COLUMNS, Sample, make_grid
from sampling.images import is_written, write_image
from sampling.prompts import Prompt, class_prompts, read_prompts, single_prompt
from sampling.requests import ImageRequest, make_requests, warn_of_untrained_size

log = get_logger("sampling")

SAMPLING_VERSION = 1  # raise it when the same settings give other images
REPORT_NAME = "samples"
GRID_NAME = "grid.png"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("file", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is to lie in one folder of samples, whether drawn already or not."""

    config: SamplingConfig
    checkpoint: Checkpoint
    requests: list[ImageRequest]
    fingerprint: Fingerprint
    directory: StageDirectory

    @property
    def identity(self) -> str:
        """Hash of what is requested."""
        return "sha256:" + sha256_text(json.dumps([asdict(request) for request in self.requests]))

    def is_done(self) -> bool:
        """Whether this very job has been finished and all its files are still there."""
        files = [MANIFEST_NAME, GRID_NAME, *(request.file for request in self.requests)]
        return self.directory.is_done(REPORT_NAME, self.identity, self.fingerprint) and all(
            (self.directory.path / file).is_file() for file in files
        )

    def pending(self) -> list[ImageRequest]:
        """Return the images that are not there yet."""
        folder = self.directory.path
        return [item for item in self.requests if not is_written(folder, item, fingerprint=self.fingerprint)]


def make_job(config: SamplingConfig, checkpoint: Checkpoint, *, run: Path, name: str) -> Job:
    """Read the prompts and settle size, seed and file of each image of `RUN/samples/<name>`.

    Raises:
        FileNotFoundError: the prompt file does not exist.
        ValueError: prompts, classes or size are not what the checkpoint can draw.
    """
    prompts = _read_prompts(config, checkpoint, run)[: config.max_prompts]
    return Job(
        config=config,
        checkpoint=checkpoint,
        requests=make_requests(prompts, config, checkpoint),
        fingerprint=_fingerprint(config, checkpoint),
        directory=StageDirectory(run / "samples" / name),
    )


def describe_job(job: Job) -> list[str]:
    """Return what the job would do, line by line."""
    config, requests, pending = job.config, job.requests, job.pending()
    sizes = sorted({(item.width, item.height) for item in requests})
    num_passes = len(pending) * config.num_steps * (1 if config.guidance_scale == 1 else 2)
    shown = ", ".join(f"{width}x{height}" for width, height in sizes[:5]) + (", …" if len(sizes) > 5 else "")
    return [
        f"checkpoint: {job.checkpoint.name} ({job.checkpoint.model_folder})",
        f"would draw {len(pending):,} of {len(requests):,} images ({shown} pixels) into {job.directory.path}",
        f"{config.solver}, {config.num_steps} steps, guidance {config.guidance_scale:g}: "
        f"{num_passes:,} passes of one image through the transformer",
    ]


def run_job(job: Job, *, run: Path) -> None:
    """Draw the images that are missing, then write table, grid and manifest; a finished job is left alone.

    Raises:
        ValueError: model and VAE do not fit each other, or the model gives no finite latents.
    """
    folder = job.directory.path
    if job.is_done():
        log.info(f"nothing to do: {len(job.requests):,} images of {folder} are done")
        return
    warn_of_untrained_size(job.config, job.checkpoint)
    start_seconds = time.monotonic()
    pending = job.pending()
    job.directory.clear_marker(REPORT_NAME)
    log.info(f"{job.checkpoint.name}: {len(pending):,} of {len(job.requests):,} images to draw into {folder}")
    if pending:
        _draw(job, pending)
    _write_table(folder / f"{REPORT_NAME}.parquet", job.requests)
    _write_grid(job)
    _write_manifest(job)
    update_summary(run, f"seconds.sampling_{folder.name}", round(time.monotonic() - start_seconds, 1))
    counts = {"read": len(job.requests), "kept": len(job.requests), "rejected": {}}
    update_summary(run, f"counts.sampling_{folder.name}", counts)
    log.info(f"drew {len(pending):,} of {len(job.requests):,} images, see {folder / GRID_NAME}")


def _read_prompts(config: SamplingConfig, checkpoint: Checkpoint, run: Path) -> list[Prompt]:
    if checkpoint.num_classes is not None:
        if config.prompt is not None:
            raise ValueError(f"sampling.prompt is set, but {checkpoint.name} knows classes, not text")
        classes = config.classes or range(checkpoint.num_classes)
        for label in classes:
            if not 0 <= label < checkpoint.num_classes:
                raise ValueError(f"sampling.classes {label}: {checkpoint.name} has {checkpoint.num_classes} classes")
        return class_prompts(list(classes), seed=config.seed)
    if config.prompt is not None:
        return [single_prompt(config.prompt, seed=config.seed)]
    if config.prompts is None:
        raise ValueError("neither sampling.prompts nor sampling.prompt is set: give a file or PROMPT='…'")
    return read_prompts(Path(config.prompts.replace("{run}", str(run))), seed=config.seed)


def _fingerprint(config: SamplingConfig, checkpoint: Checkpoint) -> Fingerprint:
    names = ("solver", "num_steps", "guidance_scale", "negative_prompt", "dtype", "text_dtype")
    fields = {name: getattr(config, name) for name in names}
    for name, model in (("text", checkpoint.text), ("vae", checkpoint.vae)):
        if model is not None:
            fields[name] = {**model, "model": resolve_model(model["model"], model["revision"]).identity}
    return Fingerprint.of(
        {"version": SAMPLING_VERSION, "checkpoint": checkpoint.identity, "schedule": checkpoint.schedule, **fields}
    )


def _draw(job: Job, pending: Sequence[ImageRequest]) -> None:
    from sampling.renderer import Renderer, encode_prompts

    texts = {}
    if job.checkpoint.text is not None:
        prompts = [job.config.negative_prompt, *(request.prompt for request in pending)]
        texts = encode_prompts(prompts, job.config, job.checkpoint)
    renderer = Renderer(job.config, job.checkpoint, texts)
    with progress_bar(f"sampling {job.directory.path.name}", len(pending), unit="images") as progress:
        for batch in _batches(pending, job.config.batch_size):
            for request, image in zip(batch, renderer.draw(batch), strict=True):
                write_image(job.directory.path, image, request, fingerprint=job.fingerprint)
            progress.advance(len(batch))


def _batches(requests: Sequence[ImageRequest], batch_size: int) -> Iterator[list[ImageRequest]]:
    by_size = sorted(requests, key=lambda request: (request.height, request.width))
    for _, group in groupby(by_size, key=lambda request: (request.height, request.width)):
        same_size = list(group)
        for start in range(0, len(same_size), batch_size):
            yield same_size[start : start + batch_size]


def _write_table(path: Path, requests: Sequence[ImageRequest]) -> None:
    rows = [{name: getattr(request, name) for name in SCHEMA.names} for request in requests]
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)


def _write_grid(job: Job) -> None:
    config, folder = job.config, job.directory.path
    samples = []
    for number, request in enumerate(job.requests[: config.num_grid_images]):
        is_first = number % config.images_per_prompt == 0
        with Image.open(folder / request.file) as image:
            samples.append(Sample(image.convert("RGB"), request.prompt if is_first else f"seed {request.seed}"))
    title = f"{job.checkpoint.name} · {config.solver}, {config.num_steps} steps · guidance {config.guidance_scale:g}"
    num_columns = config.images_per_prompt if 1 < config.images_per_prompt <= MAX_COLUMNS else None
    with atomic_file(folder / GRID_NAME) as temporary:
        make_grid(samples, title=title, num_columns=num_columns).save(temporary, format="PNG")


def _write_manifest(job: Job) -> None:
    report = ShardReport(
        name=REPORT_NAME,
        source=job.identity,
        num_read=len(job.requests),
        num_kept=len(job.requests),
        files={".parquet": sha256_file(job.directory.file(REPORT_NAME, ".parquet"))},
    )
    job.directory.write_marker(report, job.fingerprint)
    job.directory.write_manifest(
        job.fingerprint,
        [REPORT_NAME],
        upstream={"checkpoint": job.checkpoint.identity},
        extra={"checkpoint": job.checkpoint.name, "resolution": job.checkpoint.resolution},
    )
