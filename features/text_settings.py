"""What encodes the texts of a table: one record of settings, for captions, one text for all, and imported embeddings.

The three jobs of the text family differ in where texts or embeddings come from; what is the same of them is here.
"""

# L tokens of a text, D text width

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from encoders.devices import choose_device
from encoders.opening import open_text_encoder, text_spec
from encoders.text import TextEncoder, TextSpec
from encoders.weights import ModelSource, resolve_model
from features.config import DECIDES_TEXT
from features.jobs import FamilyPlan, FeatureFamily, FeatureInputs, FeatureJob, count_samples, member_bytes
from features.quantization import store_text
from pipelines.engine.pieces import ShardWorker, Source
from pipelines.store.families import NULL_CAPTION_FILE, FamilySchema, text_directory, text_schema
from pipelines.store.feature_store import write_tensors
from pipelines.store.manifest import Fingerprint, ShardDirectory, manifest_path, read_manifest

if TYPE_CHECKING:
    import torch

# Width of the published T5 encoders, for planning before one is downloaded.
PUBLISHED_D_TEXT = {"google/flan-t5-xxl": 4096, "google/flan-t5-xl": 2048, "DeepFloyd/t5-v1_1-xxl": 4096}
DEFAULT_D_TEXT = 4096
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """A table's settings of its text encoder, named as `open_text_encoder` names them, and how embeddings are stored.

    Workers take it along: it holds plain values alone.
    """

    model: str
    revision: str | None
    dtype: str
    weight_dtype: str | None
    storage: str
    max_tokens: int
    cleaning: str
    batch_tokens: int | None
    device: str
    num_threads: int

    @classmethod
    def of(cls, inputs: FeatureInputs) -> Self:
        """Return those of a command's table."""
        features = inputs.features
        return cls(
            model=features.text_model,
            revision=features.text_revision,
            dtype=features.text_dtype,
            weight_dtype=features.text_weight_dtype,
            storage=features.text_storage,
            max_tokens=features.max_tokens,
            cleaning=features.text_cleaning,
            batch_tokens=features.text_batch_tokens,
            device=features.device,
            num_threads=inputs.num_threads,
        )

    def source(self) -> ModelSource:
        """Return where the model's files are; raises as `resolve_model` does."""
        return resolve_model(self.model, self.revision)

    def spec(self, source: ModelSource) -> TextSpec | None:
        """Return the encoder's spec, None of one of the hub that is not here yet; raises as `text_spec` does."""
        return text_spec(source, max_tokens=self.max_tokens, cleaning=self.cleaning)

    def width(self, source: ModelSource) -> int:
        """Return the width of an embedding; of a model that is not here yet that of the published one."""
        spec = self.spec(source)
        return spec.width if spec else PUBLISHED_D_TEXT.get(self.model, DEFAULT_D_TEXT)

    def open_encoder(self, *, is_long_run: bool = False) -> TextEncoder:
        """Load the encoder; raises as `open_text_encoder` does, and where `device` is not there."""
        return open_text_encoder(
            self.model,
            self.revision,
            max_tokens=self.max_tokens,
            cleaning=self.cleaning,
            device=choose_device(self.device, key="features.device"),
            dtype=self.dtype,
            is_8bit=self.weight_dtype == "int8",
            batch_tokens=self.batch_tokens,
            is_long_run=is_long_run,
        )

    def facts(self, encoder: TextSpec) -> dict[str, Any]:
        """Return what manifests say of them."""
        return {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "storage": self.storage,
            "max_tokens": encoder.max_tokens,
            "cleaning": encoder.cleaning,
            "d_text": encoder.width,
            **({} if self.weight_dtype is None else {"weight_dtype": self.weight_dtype}),
        }


def write_null_caption(directory: Path, embedding: "torch.Tensor") -> None:
    """Write the embedding [L, D] of the empty caption, which training draws in place of captions it drops."""
    write_tensors(directory / NULL_CAPTION_FILE, {"embedding_0": store_text(embedding, "bfloat16").values})


def text_output(inputs: FeatureInputs) -> ShardDirectory:
    """Return the directory of a table's text features."""
    features = inputs.features
    return ShardDirectory(text_directory(inputs.run, features.caption_columns, variant=features.text_variant))


def index_weights(inputs: FeatureInputs) -> list[float]:
    """Return the weights of a table's captions as text features are written with them.

    One by an expression is in the choice: then what is written stays as it is, so that nothing is encoded for it.
    """
    captions, path = inputs.features.captions, text_output(inputs).path
    fields = read_manifest(path).fingerprint.fields if manifest_path(path).is_file() else {}
    found = fields.get("caption_weights", [])
    if len(found) != len(captions) or fields.get("caption_columns") != inputs.features.caption_columns:
        return [caption.index_weight for caption in captions]
    return [
        former if isinstance(caption.weight, str) else caption.weight
        for caption, former in zip(captions, found, strict=True)
    ]


def describe_text_job(
    inputs: FeatureInputs,
    *,
    family: FeatureFamily,
    worker_class: type[ShardWorker],
    worker_config: Any,
    sources: list[Source],
    made_of: Mapping[str, Any],
    memory_settings: Mapping[str, Any],
    upstream: Mapping[str, str],
    dtype: str,
) -> FeatureJob:
    """Describe a job of the text family.

    `made_of` is what its fingerprint has beside the encoder and its settings; for the rest see `FeatureJob`.
    """
    features = inputs.features
    model = TextSettings.of(inputs).source()
    fields = {
        "family": "text",
        "text_model": model.identity,
        "caption_columns": features.caption_columns,
        "caption_weights": index_weights(inputs),
        **features.fingerprint_fields(DECIDES_TEXT),
        **made_of,
    }
    return FeatureJob(
        family=family,
        worker_class=worker_class,
        worker_config=worker_config,
        sources=sources,
        output=text_output(inputs),
        # Batch and slice sizes decide nothing: they move embeddings by less than bfloat16 resolves.
        fingerprint=Fingerprint.of(fields),
        defaults=features.fingerprint_defaults(DECIDES_TEXT),
        upstream=dict(upstream),
        model=model,
        model_key="features.text_model",
        dtype=dtype,
        dtype_key="features.text_dtype",
        choice=inputs.choice,
        memory_settings=memory_settings,
    )


def plan_text_job(
    inputs: FeatureInputs, job: FeatureJob | None, *, num_tokens: float, basis: str, model: str | None = None
) -> FamilyPlan:
    """Return what a job of the text family will take; without a job, which waits for captions, that of all samples.

    Args:
        inputs: of the command.
        job: what is to be done.
        num_tokens: of all captions of a sample together.
        basis: where that is known from.
        model: what makes the features, in words; None is `features.text_model`.
    """
    settings, columns = TextSettings.of(inputs), inputs.features.caption_columns
    width = settings.width(settings.source() if job is None else job.encoder)
    return FamilyPlan(
        family="text",
        directory=text_output(inputs).path,
        model=model or settings.model,
        num_samples=count_samples(inputs.raw),
        pending_samples=count_samples(inputs.raw if job is None else job.pending()),
        bytes_per_sample=text_bytes(num_tokens, width, storage=settings.storage, num_captions=len(columns)),
        basis=f"{basis} {num_tokens:.0f} tokens x {width} {settings.storage}",
        job=job,
    )


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
    return member_bytes(payload_bytes, num_tensors=num_tensors, num_rows=num_captions)


def text_record(job: FeatureJob, inputs: FeatureInputs) -> FamilySchema:
    """Return the record of the text family as a job's settings make it."""
    columns: Sequence[str] = inputs.features.caption_columns
    return text_schema(inputs.features.text_storage, _loaded_spec(job, inputs).width, rows_per_sample=len(columns))


def text_facts(job: FeatureJob, inputs: FeatureInputs) -> dict[str, Any]:
    """Return what later stages need to know of text features: what encoded them, and of which captions they are."""
    weights = zip(inputs.features.captions, index_weights(inputs), strict=True)
    captions = [caption.model_dump(exclude_none=True) | {"weight": weight} for caption, weight in weights]
    return {"text": TextSettings.of(inputs).facts(_loaded_spec(job, inputs)), "captions": captions}


def _loaded_spec(job: FeatureJob, inputs: FeatureInputs) -> TextSpec:
    spec = TextSettings.of(inputs).spec(job.encoder)
    assert spec is not None, f"{job.encoder.location} has been loaded, but its config.json is not in the cache"
    return spec
