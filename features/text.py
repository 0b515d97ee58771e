"""The text family: captions of `captions/<shard>.parquet` to T5 embeddings in `features/text/<shard>.tar`."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from encoders.opening import text_spec
from encoders.text import TextSpec, clean_text
from encoders.token_kinds import TokenKinds, token_kinds
from encoders.tokens import TOKENIZER_FILE, load_tokenizer
from encoders.weights import ModelSource, find_file, resolve_model
from features.captions import caption_sources, mend_captions, remember_identities, require_unchanged
from features.config import DECIDES_TEXT
from features.jobs import (
    FamilyPlan,
    FeatureFamily,
    FeatureInputs,
    FeatureJob,
    count_samples,
    member_bytes,
)
from features.quantization import summarize_storage
from features.rare_token import require_token
from features.text_worker import TextWorker, TextWorkerConfig
from features.unreadable import quote_some
from pipelines.engine.pieces import Source, forget_pieces
from pipelines.engine.progress import get_logger
from pipelines.store.families import NULL_CAPTION_FILE, FamilySchema, text_directory, text_schema, texts_digest
from pipelines.store.files import take_away
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory, manifest_path, read_manifest
from pipelines.store.summary import update_summary
from pipelines.store.tables import read_table
from pipelines.store.weight_files import weight_file_damage

# What the fingerprint had before defaults were left out of it. Keys that came later have no place here.
WRITTEN_OUT = ("text_dtype", "text_storage", "max_tokens")

log = get_logger("features")

# Raised when a change of code changes what is made of unchanged captions.
CODE_VERSION = 2

# Width of the published T5 encoders, for planning before one is downloaded.
PUBLISHED_D_TEXT = {"google/flan-t5-xxl": 4096, "google/flan-t5-xl": 2048, "DeepFloyd/t5-v1_1-xxl": 4096}
DEFAULT_D_TEXT = 4096
NUM_PROBED_CAPTIONS, NUM_PROBED_SHARDS = 1000, 10
TOKENS_PER_WORD = 1.3
SCALE_BYTES = 4
# A GPU encodes so many with an XXL in about half a minute; compiling takes seconds, and saves one in fifteen.
LONG_RUN_CAPTIONS = 20_000


def text_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the encoding of the stage's captions.

    Raises:
        MissingFileError: captioning has not finished.
        UserError: a shard has no captions, they were made from another tar than the one there is now, or lack a
            column.
    """
    features, columns = inputs.features, inputs.features.caption_columns
    captions = read_manifest(inputs.run / "captions")
    output = ShardDirectory(text_directory(inputs.run, columns, variant=inputs.features.text_variant))
    model = resolve_model(features.text_model, features.text_revision)
    fields = {
        "family": "text",
        "code_version": CODE_VERSION,
        "text_model": model.identity,
        "caption_columns": columns,
        "caption_weights": [caption.weight for caption in features.captions],
        "captions": texts_digest(captions, columns),
        **features.fingerprint_fields(DECIDES_TEXT),
    }
    defaults = features.fingerprint_defaults(DECIDES_TEXT)
    return FeatureJob(
        family=TEXT,
        worker_class=TextWorker,
        worker_config=TextWorkerConfig(
            model=features.text_model,
            revision=features.text_revision,
            dtype=features.text_dtype,
            weight_dtype=features.text_weight_dtype,
            storage=features.text_storage,
            max_tokens=features.max_tokens,
            cleaning=features.text_cleaning,
            batch_tokens=features.text_batch_tokens,
            # Of all samples, done or not: a resumed run rounds as the first one did.
            is_long_run=count_samples(inputs.raw) * len(columns) >= LONG_RUN_CAPTIONS,
            device=features.device,
            num_threads=inputs.num_threads,
            caption_weights={caption.column: caption.weight for caption in inputs.features.captions},
            directory=output.path,
        ),
        sources=caption_sources(inputs.run, inputs.raw, columns, captions=captions, directory=output.path),
        output=output,
        # Batch and slice sizes decide nothing: they move embeddings by less than bfloat16 resolves.
        fingerprint=output.known_as(Fingerprint.of(fields), defaults={name: defaults[name] for name in WRITTEN_OUT}),
        defaults=defaults,
        upstream={"captions": texts_digest(captions, columns)},
        model=model,
        model_key="features.text_model",
        dtype_key="features.text_dtype",
        memory_settings={
            "features.text_batch_tokens": features.text_batch_tokens or "null (8192 on a GPU, 1024 on a CPU)",
            "features.max_tokens": features.max_tokens,
            "engine.samples_per_slice": inputs.engine.samples_per_slice,
        },
    )


def _plan_text(inputs: FeatureInputs) -> FamilyPlan:
    features = inputs.features
    model = resolve_model(features.text_model, features.text_revision)
    spec = text_spec(model, max_tokens=features.max_tokens, cleaning=features.text_cleaning)
    d_text = spec.width if spec else PUBLISHED_D_TEXT.get(features.text_model, DEFAULT_D_TEXT)
    num_samples = pending_samples = count_samples(inputs.raw)
    columns = inputs.features.caption_columns
    num_tokens, basis = float(features.max_tokens * len(columns)), "no captions yet: at most"
    job = None
    if manifest_path(inputs.run / "captions").is_file():
        job = text_job(inputs)
        pending_samples = count_samples(job.pending())
        num_tokens, basis = _mean_tokens(job.sources, model, inputs)
    return FamilyPlan(
        family="text",
        directory=text_directory(inputs.run, columns, variant=inputs.features.text_variant),
        model=features.text_model,
        num_samples=num_samples,
        pending_samples=pending_samples,
        bytes_per_sample=text_bytes(num_tokens, d_text, storage=features.text_storage, num_captions=len(columns)),
        basis=f"{basis} {num_tokens:.0f} tokens x {d_text} {features.text_storage}",
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


def _mean_tokens(sources: Sequence[Source], model: ModelSource, inputs: FeatureInputs) -> tuple[float, str]:
    """Return the mean length of all captions of a sample, from some of every shard, in T5's tokens."""
    columns, limit = inputs.features.caption_columns, inputs.features.max_tokens
    probed = sources[:: max(1, len(sources) // NUM_PROBED_SHARDS)]
    tables = [read_table(Path(source.path), [*columns, "reject"], mend=mend_captions()) for source in probed]
    kept = [table.filter(pc.field("reject").is_null()) for table in tables]
    rows = [row for table in kept for row in table.slice(0, NUM_PROBED_CAPTIONS // NUM_PROBED_SHARDS).to_pylist()]
    samples = [[clean_text(row[column] or "", inputs.features.text_cleaning) for column in columns] for row in rows]
    samples = [texts for sample in samples if (texts := [text for text in sample if text])]
    if not samples:
        return float(limit * len(columns)), "no text to measure: at most"
    texts = [text for sample in samples for text in sample]
    tokenizer_file = find_file(model, TOKENIZER_FILE)
    if tokenizer_file is None:
        lengths = [TOKENS_PER_WORD * len(text.split()) + 1 for text in texts]
        basis = f"{len(texts)} captions, {TOKENS_PER_WORD} tokens a word as the tokenizer is not here:"
    else:
        tokenizer = load_tokenizer(tokenizer_file)
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        lengths = [len(ids) for ids in tokens]
        basis = f"mean of {len(texts)} captions{_say_unread(texts, tokens, token_kinds(tokenizer))}:"
    if len(columns) > 1:
        basis = f"{basis} {len(texts) / len(samples):.1f} a sample,"
    return sum(min(length, limit) for length in lengths) / len(samples), basis


def _say_unread(texts: Sequence[str], tokens: Sequence[Sequence[int]], kinds: TokenKinds) -> str:
    unread = list(itertools.compress(texts, map(kinds.is_unread, tokens)))
    num_unreadable = sum(map(kinds.is_unreadable, tokens))
    return f" ({len(unread)} are not read whole, {num_unreadable} not at all: {quote_some(unread)})" if unread else ""


def text_record(job: FeatureJob, inputs: FeatureInputs) -> FamilySchema:
    """Return the record of the text family as a job's settings make it."""
    columns = inputs.features.caption_columns
    return text_schema(inputs.features.text_storage, _spec(job, inputs).width, rows_per_sample=len(columns))


def _spec(job: FeatureJob, inputs: FeatureInputs) -> TextSpec:
    features = inputs.features
    spec = text_spec(job.model, max_tokens=features.max_tokens, cleaning=features.text_cleaning)
    assert spec is not None, f"{job.model.location} has been loaded, but its config.json is not in the cache"
    return spec


def text_facts(job: FeatureJob, inputs: FeatureInputs) -> dict[str, Any]:
    """Return what later stages need to know of text features: what encoded them, and of which captions they are."""
    features, encoder = inputs.features, _spec(job, inputs)
    text = {
        "model": features.text_model,
        "revision": features.text_revision,
        "dtype": features.text_dtype,
        "storage": features.text_storage,
        "max_tokens": encoder.max_tokens,
        "cleaning": encoder.cleaning,
        "d_text": encoder.width,
        **({} if features.text_weight_dtype is None else {"weight_dtype": features.text_weight_dtype}),
    }
    return {"text": text, "captions": [caption.model_dump(exclude_none=True) for caption in features.captions]}


def _check(job: FeatureJob, inputs: FeatureInputs) -> None:
    """Refuse captions that are not those of their manifest."""
    captions, columns = read_manifest(inputs.run / "captions"), inputs.features.caption_columns
    for source in job.pending():
        require_unchanged(source, captions)
    if inputs.features.token is not None:
        tables = [read_table(Path(source.path), columns, mend=mend_captions()) for source in job.sources]
        texts = [text for table in tables for row in table.to_pylist() for text in row.values() if text]
        require_token(inputs, texts, what=f"the {len(texts):,} captions of {inputs.run / 'captions'}")


def _prepare(job: FeatureJob, inputs: FeatureInputs) -> None:
    """Remember whose the captions are, and have a lost null caption written again."""
    captions = read_manifest(inputs.run / "captions")
    remember_identities(job.sources, captions=captions, directory=job.output.path)
    null = job.output.path / NULL_CAPTION_FILE
    if null.is_file() and (damage := weight_file_damage(null)):
        log.warning(f"{null} {damage}: it is written anew, with the texts of one shard")
        take_away(null)
    if not null.is_file():
        # The workers write it, so one shard has to be done again, finished parts of it too.
        forget_pieces(job.sources[0].name, job.output)
        job.output.clear_marker(job.sources[0].name)


def _report(job: FeatureJob, manifest: Manifest, inputs: FeatureInputs) -> None:
    storage = inputs.features.text_storage
    figures = summarize_storage([manifest.shards[source.name].details for source in job.sources])
    if figures is not None:
        log.info(
            f"{storage} text takes {figures['size']:.1%} of bfloat16; "
            f"relative RMS error {figures['relative_rms_error']:.2%}, cosine {figures['cosine']:.5f}, "
            f"largest error {figures['max_error']:.2%} of a token's largest value"
        )
        update_summary(inputs.run, f"features.{inputs.stage_name}.text_storage", {"storage": storage, **figures})


TEXT = FeatureFamily(
    name="text",
    is_wanted=lambda features: features.text and features.text_from is None and features.captions[0].text is None,
    job=text_job,
    plan=_plan_text,
    schema=text_record,
    facts=text_facts,
    probe=lambda config, folder: replace(config, directory=folder),
    check=_check,
    prepare=_prepare,
    report=_report,
)
