"""Text features that were made elsewhere: `.npz` files of `caption_feature` and `attention_mask`, as PixArt has them.

They become the text family of a table: real tokens alone, stored as `text_storage` says. What encoded them, and how
texts were cleaned, is what the recipe says of `text_model` and `text_cleaning`.
"""

# L tokens of a caption, D text width

import functools
import io
import zipfile
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from encoders.opening import open_text_encoder, text_spec
from encoders.weights import resolve_model
from features.config import DECIDES_TEXT
from features.imported_files import (
    CORRUPT,
    WRONG_SHAPE,
    FeaturePlaces,
    ImportedSample,
    find_places,
    import_piece,
    imported_sources,
)
from features.jobs import FamilyPlan, FeatureFamily, FeatureInputs, FeatureJob, count_samples
from features.overflow import NON_FINITE_TEXT
from features.quantization import store_text
from features.text import DEFAULT_D_TEXT, PUBLISHED_D_TEXT, text_bytes, text_facts, text_record
from features.text_worker import TextCounts
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.store.families import NULL_CAPTION_FILE, text_directory, text_schema
from pipelines.store.feature_store import join_shards, write_tensors
from pipelines.store.manifest import Fingerprint, ShardDirectory
from pipelines.store.weight_files import weight_file_damage

# Raised when a change of code changes what is imported of unchanged files.
IMPORT_VERSION = 1
FEATURE, MASK = "caption_feature", "attention_mask"

log = get_logger("features")


@dataclass(frozen=True, kw_only=True)
class TextImportConfig:
    """What a `TextImporter` needs; `dtype` is that of the files."""

    places: FeaturePlaces
    model: str
    revision: str | None
    storage: str
    max_tokens: int
    weight: float
    reading: Reading
    dtype: str = "float32"


class TextImporter:
    """Writes the files of a shard's samples as text features; one tar member per sample kept, one index row each."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: TextImportConfig) -> None:
        self._config = config
        spec = text_spec(resolve_model(config.model, config.revision), max_tokens=config.max_tokens)
        self._width = spec.width if spec is not None else PUBLISHED_D_TEXT.get(config.model, DEFAULT_D_TEXT)
        self._family = text_schema(config.storage, self._width)

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        config = self._config
        counts = TextCounts(config.max_tokens)
        report = import_piece(
            piece,
            functools.partial(self._store, counts=counts),
            family=self._family,
            places=config.places,
            reading=config.reading,
            row={"caption_index": 0, "weight": config.weight},
        )
        return replace(report, details=counts.details)

    def _store(self, item: ImportedSample, *, counts: TextCounts) -> None:
        import torch

        embedding = torch.from_numpy(read_embedding(item.files.read(item.sample.key)))  # [L, D]
        if embedding.shape[1] != self._width:
            raise SampleReject(WRONG_SHAPE, f"{embedding.shape[1]} wide, not {self._width}")
        if not 0 < len(embedding) <= self._config.max_tokens:
            raise SampleReject("no_tokens" if not len(embedding) else "too_many_tokens", f"{len(embedding)}")
        if not embedding.isfinite().all():
            counts.count_non_finite()
            raise SampleReject(NON_FINITE_TEXT)
        stored = store_text(embedding, self._config.storage)
        parts = [part for part in (stored.values, stored.scale) if part is not None]
        self._family.write(item.tar, [item.row], [parts])
        counts.count(embedding, stored, self._config.storage)


def read_embedding(data: bytes) -> np.ndarray:
    """Return the embedding [L, D] of an `.npz`, float32: its real tokens, which are all where there is no mask.

    Raises:
        SampleReject: `corrupt_feature`, or `wrong_shape`.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            values = arrays[FEATURE]
            mask = arrays.get(MASK)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SampleReject(CORRUPT, str(error)) from None
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or values.dtype.kind != "f":
        raise SampleReject(WRONG_SHAPE, f"{FEATURE} is {values.dtype} {values.shape}")
    if mask is not None:
        if mask.size != len(values):
            raise SampleReject(WRONG_SHAPE, f"{MASK} is {mask.shape}, {FEATURE} {values.shape}")
        values = values[mask.reshape(-1) != 0]
    return values.astype(np.float32)


def imported_text_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the import of the stage's text features."""
    features, key = inputs.features, f"features.{inputs.stage_name}.text_from"
    assert features.text_from is not None
    (caption,) = features.captions
    places = find_places(features.text_from, suffix="npz", run=inputs.run, key=key)
    output = ShardDirectory(text_directory(inputs.run, features.caption_columns, variant=features.text_variant))
    model = resolve_model(features.text_model, features.text_revision)
    fields = {
        "family": "text",
        "imported": IMPORT_VERSION,
        "text_model": model.identity,
        "caption_columns": features.caption_columns,
        "caption_weights": [caption.weight],
        **features.fingerprint_fields(DECIDES_TEXT),
    }
    return FeatureJob(
        family=IMPORTED_TEXT,
        worker_class=TextImporter,
        worker_config=TextImportConfig(
            places=places,
            model=features.text_model,
            revision=features.text_revision,
            storage=features.text_storage,
            max_tokens=features.max_tokens,
            weight=caption.weight,
            reading=inputs.data.reading,
        ),
        sources=imported_sources(places, inputs, key=key),
        output=output,
        fingerprint=Fingerprint.of(fields),
        defaults=features.fingerprint_defaults(DECIDES_TEXT),
        upstream={},
        model=model,
        model_key="features.text_model",
        dtype_key="features.text_dtype",
        memory_settings={"engine.samples_per_slice": inputs.engine.samples_per_slice},
    )


def _plan(inputs: FeatureInputs) -> FamilyPlan:
    job, features = imported_text_job(inputs), inputs.features
    spec = text_spec(job.model, max_tokens=features.max_tokens)
    width = spec.width if spec else PUBLISHED_D_TEXT.get(features.text_model, DEFAULT_D_TEXT)
    return FamilyPlan(
        family="text",
        directory=job.output.path,
        model=f"imported from {features.text_from}, of {features.text_model}",
        num_samples=count_samples(job.sources),
        pending_samples=count_samples(job.pending()),
        bytes_per_sample=text_bytes(features.max_tokens, width, storage=features.text_storage),
        basis=f"at most {features.max_tokens} tokens x {width} {features.text_storage}",
        job=job,
    )


def _prepare(job: FeatureJob, inputs: FeatureInputs) -> None:
    """Encode the empty caption, which no file holds, and training draws in place of captions it drops."""
    # One of settings that nothing is done under yet may be another encoder's.
    path = job.output.path / NULL_CAPTION_FILE
    if path.is_file() and not weight_file_damage(path) and len(job.pending()) < len(job.sources):
        return
    features = inputs.features
    log.info(f"the empty caption is encoded by features.text_model {features.text_model}; no other is")
    encoder = open_text_encoder(
        features.text_model,
        features.text_revision,
        max_tokens=features.max_tokens,
        cleaning=features.text_cleaning,
        dtype=features.text_dtype,
        is_8bit=features.text_weight_dtype == "int8",
    )
    (null,) = encoder.encode([""])
    write_tensors(path, {"embedding_0": store_text(null, "bfloat16").values})


IMPORTED_TEXT = FeatureFamily(
    name="text",
    is_wanted=lambda features: features.text and features.text_from is not None,
    job=imported_text_job,
    plan=_plan,
    schema=text_record,
    facts=lambda job, inputs: {**text_facts(job, inputs), "imported": True},
    probe=lambda config, folder: config,
    prepare=_prepare,
    encodes=False,
)
