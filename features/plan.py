"""What a stage's features will take: bytes per sample and in total, hours, and whether the disk has room for them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from encoders.latents import LatentSpec
from encoders.opening import latent_spec, text_spec
from encoders.text import DEFAULT_CLEANING, clean_text
from encoders.tokens import TOKENIZER_FILE, load_tokenizer
from encoders.weights import ModelSource, find_file, resolve_model
from features.jobs import FeatureJob, Inputs, latent_job, text_job
from features.speed import find_speed
from pipelines.engine.pieces import Source
from pipelines.engine.progress import console
from pipelines.store.families import text_directory
from pipelines.store.feature_store import TAR_BLOCK_BYTES
from pipelines.store.manifest import MANIFEST_NAME

# Width of the published T5 encoders, for planning before one is downloaded.
PUBLISHED_D_TEXT = {"google/flan-t5-xxl": 4096, "google/flan-t5-xl": 2048, "DeepFloyd/t5-v1_1-xxl": 4096}
DEFAULT_D_TEXT = 4096
# Of the paper's VAE, likewise.
PUBLISHED_VAE = LatentSpec(channels=4, factor=8, scale=0.18215, shift=0.0, has_std=True, identity="")
NUM_PROBED_CAPTIONS, NUM_PROBED_SHARDS = 1000, 10
TOKENS_PER_WORD = 1.3
# safetensors header of one tensor and of one more, and a row of the index.
HEADER_BYTES, TENSOR_HEADER_BYTES, INDEX_ROW_BYTES = 128, 64, 64
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class FamilyPlan:
    """One line of the plan; `pending_samples` are what this run would add to `directory`.

    `job` is None as long as captions are not there.
    """

    family: str
    directory: Path
    model: str
    num_samples: int
    pending_samples: int
    bytes_per_sample: int
    basis: str
    job: FeatureJob | None

    @property
    def pending_bytes(self) -> int:
        """Bytes this run would write."""
        return self.pending_samples * self.bytes_per_sample


def text_bytes(num_tokens: float, d_text: int, *, storage: str = "bfloat16", num_captions: int = 1) -> int:
    """Return the bytes a sample's captions take in tar and index: values, scales, and what goes around them.

    Args:
        num_tokens: of all captions of the sample together.
        d_text: width of an embedding.
        storage: as `features.text_storage`.
        num_captions: tensors of the sample; with 8 bits each has a scale beside it.
    """
    is_16_bit = storage == "bfloat16"
    num_tensors = num_captions * (1 if is_16_bit else 2)
    payload_bytes = round(num_tokens * (2 * d_text if is_16_bit else d_text + SCALE_BYTES))
    header_bytes = HEADER_BYTES + TENSOR_HEADER_BYTES * (num_tensors - 1)
    return _member_bytes(header_bytes + payload_bytes, num_rows=num_captions)


def latent_bytes(num_pixels: int, spec: LatentSpec) -> int:
    """Return the bytes one image takes in tar and index: mean and, if the codec has one, std, in fp16."""
    num_tensors = 2 if spec.has_std else 1
    header_bytes = HEADER_BYTES + TENSOR_HEADER_BYTES * (num_tensors - 1)
    num_values = num_tensors * spec.channels * (num_pixels // spec.factor**2)
    return _member_bytes(header_bytes + 2 * num_values, num_rows=1)


def _member_bytes(content_bytes: int, *, num_rows: int) -> int:
    padded = -(-content_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    return TAR_BLOCK_BYTES + padded + num_rows * INDEX_ROW_BYTES


def plan_families(inputs: Inputs) -> list[FamilyPlan]:
    """Return the plan of each family, the text family too when its captions are not there yet."""
    return ([_plan_text(inputs)] if inputs.features.text else []) + [_plan_latents(inputs)]


def _plan_text(inputs: Inputs) -> FamilyPlan:
    features = inputs.features
    model = resolve_model(features.text_model, features.text_revision)
    spec = text_spec(model, max_tokens=features.max_tokens)
    d_text = spec.width if spec else PUBLISHED_D_TEXT.get(features.text_model, DEFAULT_D_TEXT)
    num_samples = pending_samples = _count(inputs.raw)
    columns = inputs.features.caption_columns
    num_tokens, basis = float(features.max_tokens * len(columns)), "no captions yet: at most"
    job = None
    if (inputs.run / "captions" / MANIFEST_NAME).is_file():
        job = text_job(inputs)
        pending_samples = _count(job.pending())
        num_tokens, basis = _mean_tokens(job.sources, model, inputs)
    return FamilyPlan(
        family="text",
        directory=text_directory(inputs.run, columns),
        model=features.text_model,
        num_samples=num_samples,
        pending_samples=pending_samples,
        bytes_per_sample=text_bytes(num_tokens, d_text, storage=features.text_storage, num_captions=len(columns)),
        basis=f"{basis} {num_tokens:.0f} tokens x {d_text} {features.text_storage}",
        job=job,
    )


def _plan_latents(inputs: Inputs) -> FamilyPlan:
    job = latent_job(inputs)
    spec = latent_spec(job.model) or PUBLISHED_VAE
    resolution = inputs.features.resolution
    tensors = "mean and std" if spec.has_std else "mean"
    crop = "aspect buckets" if inputs.features.buckets else "centre crop"
    return FamilyPlan(
        family="latents",
        directory=job.output.path,
        model=inputs.features.vae_model,
        num_samples=_count(job.sources),
        pending_samples=_count(job.pending()),
        # Every bucket has about the area of the square.
        bytes_per_sample=latent_bytes(resolution**2, spec),
        basis=f"{resolution} x {resolution} pixels, {crop}: {spec.channels} channels, {tensors} fp16",
        job=job,
    )


def _count(sources: Sequence[Source]) -> int:
    return sum(source.num_samples for source in sources)


def _mean_tokens(sources: Sequence[Source], model: ModelSource, inputs: Inputs) -> tuple[float, str]:
    """Return the mean length of all captions of a sample, from some of every shard, in T5's tokens."""
    columns, limit = inputs.features.caption_columns, inputs.features.max_tokens
    probed = sources[:: max(1, len(sources) // NUM_PROBED_SHARDS)]
    tables = [pq.read_table(source.path, columns=[*columns, "reject"]) for source in probed]
    kept = [table.filter(pc.field("reject").is_null()) for table in tables]
    rows = [row for table in kept for row in table.slice(0, NUM_PROBED_CAPTIONS // NUM_PROBED_SHARDS).to_pylist()]
    samples = [[clean_text(row[column] or "", DEFAULT_CLEANING) for column in columns] for row in rows]
    samples = [texts for sample in samples if (texts := [text for text in sample if text])]
    if not samples:
        return float(limit * len(columns)), "no text to measure: at most"
    texts = [text for sample in samples for text in sample]
    tokenizer_file = find_file(model, TOKENIZER_FILE)
    if tokenizer_file is None:
        lengths = [TOKENS_PER_WORD * len(text.split()) + 1 for text in texts]
        basis = f"{len(texts)} captions, {TOKENS_PER_WORD} tokens a word as the tokenizer is not here:"
    else:
        encodings = load_tokenizer(tokenizer_file).encode_batch(texts)
        lengths = [len(encoding.ids) for encoding in encodings]
        basis = f"mean of {len(texts)} captions:"
    if len(columns) > 1:
        basis = f"{basis} {len(texts) / len(samples):.1f} a sample,"
    return sum(min(length, limit) for length in lengths) / len(samples), basis


def print_plan(inputs: Inputs) -> None:
    """Print what the stage would write, with sizes, and how long it would take where that can be measured."""
    table = Table(title=f"features, {inputs.stage_name}: {', '.join(inputs.features.shards)}", title_justify="left")
    table.add_column("family")
    for heading in ("samples", "to do", "bytes/sample", "to write", "total", "hours"):
        table.add_column(heading, justify="right")
    families = plan_families(inputs)
    notes: list[str] = []
    for family in families:
        hours, speed = _hours(family, inputs)
        total = format_bytes(family.num_samples * family.bytes_per_sample)
        counts = (f"{family.num_samples:,}", f"{family.pending_samples:,}", f"{family.bytes_per_sample:,}")
        table.add_row(family.family, *counts, format_bytes(family.pending_bytes), total, hours)
        notes += [f"{family.family}: {family.model} -> {family.directory}; {family.basis}", f"{family.family}: {speed}"]
        for change in family.job.changed_settings() if family.job else []:
            notes.append(f"{family.directory} was made with other settings and would be computed anew: {change}")
    console.print(table)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"free on this disk: {format_bytes(_free_bytes(inputs.run))}")


def _hours(family: FamilyPlan, inputs: Inputs) -> tuple[str, str]:
    """Return the hours of a family as the table shows them, and what they rest on."""
    if not family.pending_samples:
        return "0", "nothing to do"
    if family.job is None:
        return "?", "hours are not measured: captions are not there yet; run `make caption` first"
    speed = find_speed(family.job, inputs)
    if isinstance(speed, str):
        return "?", f"hours are {speed}"
    workers = "1 worker" if speed.num_workers == 1 else f"{speed.num_workers} workers"
    text = f"{speed.samples_per_second:,.1f} samples/s a worker, {speed.basis}; {workers}"
    hours = speed.hours(family.pending_samples)
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}", text


def require_space(inputs: Inputs) -> None:
    """Check that what is pending fits on the disk.

    Raises:
        ValueError: it does not; names the run, what is needed and what is free.
    """
    needed, free = sum(family.pending_bytes for family in plan_families(inputs)), _free_bytes(inputs.run)
    if needed > free:
        raise ValueError(
            f"{inputs.run}: features of {inputs.stage_name} need about {format_bytes(needed)}, but only "
            f"{format_bytes(free)} are free on this disk"
        )


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def format_bytes(num_bytes: float) -> str:
    """Return a size in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
