"""Text features of one text for all images of a table, as a subject of DreamBooth has: no captions are read."""

# L tokens of the text, D text width

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from encoders.devices import choose_device
from encoders.opening import open_text_encoder, text_spec
from encoders.weights import resolve_model
from errors import UserError
from features.config import DECIDES_TEXT
from features.jobs import FamilyPlan, FeatureFamily, FeatureInputs, FeatureJob, count_samples
from features.quantization import store_text
from features.rare_token import require_token
from features.text import DEFAULT_D_TEXT, PUBLISHED_D_TEXT, text_bytes, text_facts, text_record
from features.text_worker import TextCounts
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.reading import Reading
from pipelines.raw.shards import open_shard
from pipelines.store.families import NULL_CAPTION_FILE, text_directory, text_schema
from pipelines.store.feature_store import FeatureTarWriter, join_shards, write_index, write_tensors
from pipelines.store.files import atomic_file
from pipelines.store.manifest import Fingerprint, ShardDirectory

# Raised when a change of code changes what is made of unchanged texts.
CONSTANT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ConstantTextConfig:
    """What a `ConstantTextWorker` needs; `directory` is where the null caption goes, `run` where headers are kept."""

    text: str
    weight: float
    model: str
    revision: str | None
    dtype: str
    weight_dtype: str | None
    storage: str
    max_tokens: int
    cleaning: str
    device: str
    num_threads: int
    reading: Reading
    run: Path
    directory: Path
    key: str


class ConstantTextWorker:
    """Writes the embedding of one text for each sample of a raw shard; one tar member and one index row a sample.

    Raises:
        UserError: the text encoder reads nothing of the text, or gives values that are not finite.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: ConstantTextConfig) -> None:
        import torch

        torch.set_num_threads(config.num_threads)
        encoder = open_text_encoder(
            config.model,
            config.revision,
            max_tokens=config.max_tokens,
            cleaning=config.cleaning,
            device=choose_device(config.device, key="features.device"),
            dtype=config.dtype,
            is_8bit=config.weight_dtype == "int8",
        )
        (tokens,) = encoder.tokenize([config.text])
        if encoder.token_kinds.is_unreadable(tokens):
            raise UserError(f"{config.key} = {config.text!r}: {config.model} reads nothing of it")
        self._config = config
        self._embedding, null = encoder.encode([config.text, ""])  # [L, D]
        if not self._embedding.isfinite().all():
            raise UserError(f"{config.key} = {config.text!r}: {config.model} gives values that are not finite")
        self._family = text_schema(config.storage, encoder.spec.width)
        write_tensors(config.directory / NULL_CAPTION_FILE, {"embedding_0": store_text(null, "bfloat16").values})

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        config, counts, rows = self._config, TextCounts(self._config.max_tokens), []
        stored = store_text(self._embedding, config.storage)
        parts = [part for part in (stored.values, stored.scale) if part is not None]
        with (
            open_shard(piece.source.path, config.reading, run=config.run) as raw,
            atomic_file(piece.output(".tar")) as tar_path,
            FeatureTarWriter(tar_path) as tar,
        ):
            for start, stop in piece.slices():
                for sample in raw.samples[start:stop]:
                    row = {"key": sample.key, "shard": raw.name, "caption_index": 0, "weight": config.weight}
                    rows.append(row | {"reject": sample.reject})
                    if sample.reject is None:
                        self._family.write(tar, [rows[-1]], [parts])
                        counts.count(self._embedding, stored, config.storage)
        with atomic_file(piece.output(".parquet")) as index_path:
            write_index(index_path, rows, self._family.columns)
        rejected = Counter(row["reject"] for row in rows if row["reject"] is not None)
        return PieceReport(
            num_read=len(rows),
            num_kept=len(rows) - rejected.total(),
            rejected=dict(rejected),
            details=counts.details,
        )


def constant_text_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the encoding of the table's text for all samples of its raw shards.

    Raises:
        UserError: the table's token is not in the text, or is a common word.
    """
    features = inputs.features
    (caption,) = features.captions
    assert caption.text is not None
    require_token(inputs, [caption.text], what="the text of features.<name>.captions")
    output = ShardDirectory(text_directory(inputs.run, features.caption_columns, variant=features.text_variant))
    model = resolve_model(features.text_model, features.text_revision)
    fields = {
        "family": "text",
        "constant": CONSTANT_VERSION,
        "text": caption.text,
        "text_model": model.identity,
        "caption_columns": features.caption_columns,
        "caption_weights": [caption.weight],
        **features.fingerprint_fields(DECIDES_TEXT),
    }
    return FeatureJob(
        family=CONSTANT_TEXT,
        worker_class=ConstantTextWorker,
        worker_config=ConstantTextConfig(
            text=caption.text,
            weight=caption.weight,
            model=features.text_model,
            revision=features.text_revision,
            dtype=features.text_dtype,
            weight_dtype=features.text_weight_dtype,
            storage=features.text_storage,
            max_tokens=features.max_tokens,
            cleaning=features.text_cleaning,
            device=features.device,
            num_threads=inputs.num_threads,
            reading=inputs.data.reading,
            run=inputs.run,
            directory=output.path,
            key=f"features.{inputs.stage_name}.captions.0.text",
        ),
        sources=inputs.raw,
        output=output,
        fingerprint=Fingerprint.of(fields),
        defaults=features.fingerprint_defaults(DECIDES_TEXT),
        upstream={},
        model=model,
        model_key="features.text_model",
        dtype_key="features.text_dtype",
        memory_settings={"features.max_tokens": features.max_tokens},
    )


def _plan(inputs: FeatureInputs) -> FamilyPlan:
    job, features = constant_text_job(inputs), inputs.features
    spec = text_spec(job.model, max_tokens=features.max_tokens, cleaning=features.text_cleaning)
    width = spec.width if spec else PUBLISHED_D_TEXT.get(features.text_model, DEFAULT_D_TEXT)
    return FamilyPlan(
        family="text",
        directory=job.output.path,
        model=features.text_model,
        num_samples=count_samples(job.sources),
        pending_samples=count_samples(job.pending()),
        bytes_per_sample=text_bytes(features.max_tokens, width, storage=features.text_storage),
        basis=f"one text, at most {features.max_tokens} tokens x {width} {features.text_storage}",
        job=job,
    )


CONSTANT_TEXT = FeatureFamily(
    name="text",
    is_wanted=lambda features: features.text and features.captions[0].text is not None,
    job=constant_text_job,
    plan=_plan,
    schema=text_record,
    facts=text_facts,
    probe=lambda config, folder: replace(config, directory=folder),
)
