"""The text family: captions of `captions/<shard>.parquet` to T5 embeddings in `features/text/<shard>.tar`."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from encoders.text import clean_text
from encoders.token_kinds import TokenKinds, token_kinds
from encoders.tokens import find_tokenizer, load_tokenizer
from features.captions import CaptionPlaces, caption_sources, remember_identities, require_unchanged
from features.jobs import FamilyPlan, FeatureFamily, FeatureInputs, FeatureJob, count_samples
from features.quantization import summarize_storage
from features.rare_token import require_token
from features.text_settings import (
    TextSettings,
    describe_text_job,
    index_weights,
    plan_text_job,
    text_facts,
    text_output,
    text_record,
)
from features.text_worker import TextWorker, TextWorkerConfig
from features.unreadable import kept_texts, quote_some
from pipelines.columns.caption_columns import RunCaptions
from pipelines.engine.pieces import forget_pieces
from pipelines.engine.progress import get_logger
from pipelines.store.families import NULL_CAPTION_FILE
from pipelines.store.files import take_away
from pipelines.store.manifest import Manifest
from pipelines.store.summary import update_summary
from pipelines.store.weight_files import weight_file_damage

# What the fingerprint had before defaults were left out of it. Keys that came later have no place here.
WRITTEN_OUT = ("text_dtype", "text_storage", "max_tokens")

log = get_logger("features")

# Raised when a change of code changes what is made of unchanged captions.
CODE_VERSION = 2

NUM_PROBED_CAPTIONS, NUM_PROBED_SHARDS = 1000, 10
TOKENS_PER_WORD = 1.3
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
    captions = RunCaptions(inputs.run)
    places = CaptionPlaces.find(captions, columns, key=f"features.{inputs.stage_name}.captions")
    output, of_captions = text_output(inputs), captions.texts_digest(columns)
    assert of_captions is not None, "all columns have been found"
    job = describe_text_job(
        inputs,
        family=TEXT,
        worker_class=TextWorker,
        worker_config=TextWorkerConfig(
            text=TextSettings.of(inputs),
            places=places,
            # Of all samples, done or not: a resumed run rounds as the first one did.
            is_long_run=count_samples(inputs.raw) * len(columns) >= LONG_RUN_CAPTIONS,
            caption_weights=dict(zip(columns, index_weights(inputs), strict=True)),
            directory=output.path,
        ),
        sources=caption_sources(captions, inputs.raw, places, directory=output.path),
        made_of={"code_version": CODE_VERSION, "captions": of_captions},
        memory_settings={
            "features.text_batch_tokens": features.text_batch_tokens or "null (8192 on a GPU, 1024 on a CPU)",
            "features.max_tokens": features.max_tokens,
            "engine.samples_per_slice": inputs.engine.samples_per_slice,
        },
        upstream={"captions": of_captions},
        dtype=features.text_dtype,
    )
    written_out = {name: job.defaults[name] for name in WRITTEN_OUT}
    return replace(job, fingerprint=output.known_as(job.fingerprint, defaults=written_out))


def _plan_text(inputs: FeatureInputs) -> FamilyPlan:
    num_tokens, basis = float(inputs.features.max_tokens * len(inputs.features.caption_columns)), "at most"
    if RunCaptions(inputs.run).texts_digest(inputs.features.caption_columns) is None:
        return plan_text_job(inputs, None, num_tokens=num_tokens, basis=f"no captions yet: {basis}")
    job = text_job(inputs)
    num_tokens, basis = _mean_tokens(job, inputs)
    return plan_text_job(inputs, job, num_tokens=num_tokens, basis=basis)


def _mean_tokens(job: FeatureJob, inputs: FeatureInputs) -> tuple[float, str]:
    """Return the mean length of all captions of a sample, from some of every shard, in T5's tokens."""
    columns, limit, model = inputs.features.caption_columns, inputs.features.max_tokens, job.encoder
    probed = job.sources[:: max(1, len(job.sources) // NUM_PROBED_SHARDS)]
    samples: list[list[str]] = []
    for source in probed:
        texts = list(kept_texts(job, source.name))[: NUM_PROBED_CAPTIONS // NUM_PROBED_SHARDS]
        samples += [[clean_text(text, inputs.features.text_cleaning) for text in sample] for sample in texts]
    samples = [texts for sample in samples if (texts := [text for text in sample if text])]
    if not samples:
        return float(limit * len(columns)), "no text to measure: at most"
    texts = [text for sample in samples for text in sample]
    tokenizer_file = find_tokenizer(model)
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


def _check(job: FeatureJob, inputs: FeatureInputs) -> None:
    """Refuse captions that are not those of their manifest."""
    columns = RunCaptions(inputs.run).folders(inputs.features.caption_columns)
    for source in job.pending():
        require_unchanged(source.name, columns)
    if inputs.features.token is not None:
        texts = [text for source in job.sources for sample in kept_texts(job, source.name) for text in sample]
        require_token(inputs, texts, what=f"the {len(texts):,} captions of {inputs.run / 'captions'}")


def _prepare(job: FeatureJob, inputs: FeatureInputs) -> None:
    """Remember whose the captions are, and have a lost null caption written again."""
    columns = RunCaptions(inputs.run).folders(inputs.features.caption_columns)
    remember_identities(job.sources, columns, directory=job.output.path)
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
