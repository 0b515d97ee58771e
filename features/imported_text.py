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

from features.imported_files import (
    CORRUPT,
    IMPORTED_DTYPE,
    WRONG_SHAPE,
    FeatureFiles,
    FeaturePlaces,
    find_places,
    import_piece,
    imported_sources,
)
from features.jobs import FamilyPlan, FeatureFamily, FeatureInputs, FeatureJob
from features.overflow import NON_FINITE_TEXT
from features.quantization import store_text
from features.text_settings import (
    TextSettings,
    describe_text_job,
    index_weights,
    plan_text_job,
    text_facts,
    text_record,
    write_null_caption,
)
from features.text_worker import TextCounts
from features.writer import SampleToWrite
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.store.families import NULL_CAPTION_FILE, text_schema
from pipelines.store.feature_store import join_shards
from pipelines.store.weight_files import weight_file_damage

# Raised when a change of code changes what is imported of unchanged files.
IMPORT_VERSION = 1
FEATURE, MASK = "caption_feature", "attention_mask"

log = get_logger("features")


@dataclass(frozen=True, kw_only=True)
class TextImportConfig:
    """What a `TextImporter` needs."""

    places: FeaturePlaces
    text: TextSettings
    weight: float
    reading: Reading


class TextImporter:
    """Writes the files of a shard's samples as text features; one tar member per sample kept, one index row each."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: TextImportConfig) -> None:
        self._config = config
        self._width = config.text.width(config.text.source())
        self._family = text_schema(config.text.storage, self._width)

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        config = self._config
        counts = TextCounts(config.text.max_tokens)
        report = import_piece(
            piece,
            functools.partial(self._store, counts=counts),
            family=self._family,
            places=config.places,
            reading=config.reading,
            row={"caption_index": 0, "weight": config.weight},
        )
        return replace(report, details=counts.details)

    def _store(self, item: SampleToWrite, files: FeatureFiles, *, counts: TextCounts) -> None:
        import torch

        embedding = torch.from_numpy(read_embedding(files.read(item.sample.key)))  # [L, D]
        if embedding.shape[1] != self._width:
            raise SampleReject(WRONG_SHAPE, f"{embedding.shape[1]} wide, not {self._width}")
        if not 0 < len(embedding) <= self._config.text.max_tokens:
            raise SampleReject("no_tokens" if not len(embedding) else "too_many_tokens", f"{len(embedding)}")
        if not embedding.isfinite().all():
            counts.count_non_finite()
            raise SampleReject(NON_FINITE_TEXT)
        stored = store_text(embedding, self._config.text.storage)
        self._family.write(item.tar, [item.row], [stored.parts])
        counts.count(embedding, stored, self._config.text.storage)


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
    places = find_places(features.text_from, suffixes=("npz",), run=inputs.run, key=key)
    return describe_text_job(
        inputs,
        family=IMPORTED_TEXT,
        worker_class=TextImporter,
        worker_config=TextImportConfig(
            places=places,
            text=TextSettings.of(inputs),
            weight=index_weights(inputs)[0],
            reading=inputs.data.reading,
        ),
        sources=imported_sources(places, inputs, key=key),
        made_of={"imported": IMPORT_VERSION},
        memory_settings={"engine.samples_per_slice": inputs.engine.samples_per_slice},
        upstream={},
        dtype=IMPORTED_DTYPE,
    )


def _plan(inputs: FeatureInputs) -> FamilyPlan:
    features = inputs.features
    return plan_text_job(
        inputs,
        imported_text_job(inputs),
        num_tokens=features.max_tokens,
        basis="at most",
        model=f"imported from {features.text_from}, of {features.text_model}",
    )


def _prepare(job: FeatureJob, inputs: FeatureInputs) -> None:
    """Encode the empty caption, which no file holds, and training draws in place of captions it drops."""
    # One of settings that nothing is done under yet may be another encoder's.
    path = job.output.path / NULL_CAPTION_FILE
    if path.is_file() and not weight_file_damage(path) and len(job.pending()) < len(job.sources):
        return
    # Not by a worker, which has the device.
    settings = replace(TextSettings.of(inputs), device="cpu")
    log.info(f"the empty caption is encoded by features.text_model {settings.model}; no other is")
    (null,) = settings.open_encoder().encode([""])
    write_null_caption(job.output.path, null)


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
