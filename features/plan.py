"""What a stage's features will take: bytes per sample and in total, and whether the disk has room for them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from rich.table import Table

from features.encoders import clean_prompt
from features.jobs import VAE_DEFAULTS, Inputs, latent_job, read_model_config, text_job
from pipelines.feature_store import TAR_BLOCK_BYTES, text_directory
from pipelines.manifest import MANIFEST_NAME
from pipelines.models import ModelSource, resolve_model
from pipelines.pieces import Source
from pipelines.progress import console

# Width of the published T5 encoders, for planning before one is downloaded.
PUBLISHED_D_TEXT = {"google/flan-t5-xxl": 4096, "google/flan-t5-xl": 2048, "DeepFloyd/t5-v1_1-xxl": 4096}
DEFAULT_D_TEXT = 4096
NUM_PROBED_CAPTIONS = 1000
TOKENS_PER_WORD = 1.3
# safetensors header of one tensor and of two, and a row of the index.
TEXT_HEADER_BYTES, LATENT_HEADER_BYTES, INDEX_ROW_BYTES = 128, 192, 64


@dataclass(frozen=True, kw_only=True)
class FamilyPlan:
    """One line of the plan; `pending_samples` are what this run would add to `directory`."""

    family: str
    directory: Path
    model: str
    num_samples: int
    pending_samples: int
    bytes_per_sample: int
    basis: str

    @property
    def pending_bytes(self) -> int:
        """Bytes this run would write."""
        return self.pending_samples * self.bytes_per_sample


def text_bytes(num_tokens: float, d_text: int) -> int:
    """Return the bytes one caption takes in tar and index: bf16 [num_tokens, d_text] and what goes around it."""
    return _member_bytes(TEXT_HEADER_BYTES + round(num_tokens * d_text * 2))


def latent_bytes(num_pixels: int, channels: int = 4) -> int:
    """Return the bytes one image takes in tar and index: mean and std, fp16, one value per channel and 8 x 8 pixels."""
    return _member_bytes(LATENT_HEADER_BYTES + 2 * channels * (num_pixels // 64) * 2)


def _member_bytes(content_bytes: int) -> int:
    padded = -(-content_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    return TAR_BLOCK_BYTES + padded + INDEX_ROW_BYTES


def plan_families(inputs: Inputs) -> list[FamilyPlan]:
    """Return the plan of each family, the text family too when its captions are not there yet."""
    return ([_plan_text(inputs)] if inputs.stage.text else []) + [_plan_latents(inputs)]


def _plan_text(inputs: Inputs) -> FamilyPlan:
    features = inputs.features
    model = resolve_model(features.text_model, features.text_revision)
    config = read_model_config(model) or {}
    d_text = config.get("d_model", PUBLISHED_D_TEXT.get(features.text_model, DEFAULT_D_TEXT))
    num_samples = pending_samples = _count(inputs.raw)
    num_tokens, basis = float(features.max_tokens), "no captions yet: at most"
    directory = inputs.run / "captions"
    if (directory / MANIFEST_NAME).is_file():
        job = text_job(inputs)
        pending_samples = _count(job.pending())
        num_tokens, basis = _mean_tokens(job.sources, model, inputs)
    return FamilyPlan(
        family="text",
        directory=text_directory(inputs.run, inputs.stage.caption_columns),
        model=features.text_model,
        num_samples=num_samples,
        pending_samples=pending_samples,
        bytes_per_sample=text_bytes(num_tokens, d_text),
        basis=f"{basis} {num_tokens:.0f} tokens x {d_text} bf16",
    )


def _plan_latents(inputs: Inputs) -> FamilyPlan:
    job = latent_job(inputs)
    config = VAE_DEFAULTS | (read_model_config(job.model) or {})
    resolution = inputs.stage.resolution
    crop = "aspect buckets" if inputs.stage.buckets else "centre crop"
    return FamilyPlan(
        family="latents",
        directory=job.output.path,
        model=inputs.features.vae_model,
        num_samples=_count(job.sources),
        pending_samples=_count(job.pending()),
        # Every bucket has about the area of the square.
        bytes_per_sample=latent_bytes(resolution**2, config["latent_channels"]),
        basis=f"{resolution} x {resolution} pixels, {crop}: {config['latent_channels']} channels, mean and std fp16",
    )


def _count(sources: Sequence[Source]) -> int:
    return sum(source.num_samples for source in sources)


def _mean_tokens(sources: Sequence[Source], model: ModelSource, inputs: Inputs) -> tuple[float, str]:
    """Return the mean length of some captions, spread over all shards, in T5's tokens."""
    column = inputs.stage.caption_columns[0]
    texts: list[str] = []
    for source in sources[:: max(1, len(sources) // 10)]:
        values = pq.read_table(source.path, columns=[column]).column(column).drop_null()
        texts += values.slice(0, NUM_PROBED_CAPTIONS // 10).to_pylist()
    texts = [clean_prompt(text) for text in texts if text.strip()]
    if not texts:
        return float(inputs.features.max_tokens), "no text to measure: at most"
    tokenizer_file = _find_tokenizer(model)
    if tokenizer_file is None:
        lengths = [TOKENS_PER_WORD * len(text.split()) + 1 for text in texts]
        basis = f"{len(texts)} captions, {TOKENS_PER_WORD} tokens a word as the tokenizer is not here:"
    else:
        from tokenizers import Tokenizer

        encodings = Tokenizer.from_file(str(tokenizer_file)).encode_batch(texts)
        lengths = [len(encoding.ids) for encoding in encodings]
        basis = f"mean of {len(texts)} captions:"
    limit = inputs.features.max_tokens
    return sum(min(length, limit) for length in lengths) / len(lengths), basis


def _find_tokenizer(model: ModelSource) -> Path | None:
    folder = Path(model.location)
    if folder.is_dir():
        return path if (path := folder / "tokenizer.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model.location, "tokenizer.json", revision=model.revision)
    return Path(path) if isinstance(path, str) else None


def print_plan(inputs: Inputs) -> None:
    """Print what the stage would write, with sizes."""
    table = Table(title=f"features, {inputs.stage_name}: {', '.join(inputs.stage.shards)}", title_justify="left")
    table.add_column("family")
    for heading in ("samples", "to do", "bytes/sample", "to write", "total"):
        table.add_column(heading, justify="right")
    families = plan_families(inputs)
    for family in families:
        total = format_bytes(family.num_samples * family.bytes_per_sample)
        counts = (f"{family.num_samples:,}", f"{family.pending_samples:,}", f"{family.bytes_per_sample:,}")
        table.add_row(family.family, *counts, format_bytes(family.pending_bytes), total)
    console.print(table)
    for family in families:
        console.print(
            f"{family.family}: {family.model} -> {family.directory}; {family.basis}", markup=False, soft_wrap=True
        )
    console.print(f"free on this disk: {format_bytes(_free_bytes(inputs.run))}")


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
