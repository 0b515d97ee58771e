"""Captions that a text encoder cannot read: how many there are, and some of them."""

from collections.abc import Iterator, Sequence

from encoders.text import clean_text
from encoders.token_kinds import token_kinds
from encoders.tokens import find_tokenizer, load_tokenizer
from features.jobs import FeatureInputs, FeatureJob
from pipelines.engine.progress import get_logger

UNREADABLE = "unreadable_text"
# In a report's `details`, where there are any: captions that are not read whole, and tokens that stand for nothing.
NUM_UNREAD_CAPTIONS, NUM_UNREAD_TOKENS, NUM_UNREADABLE = (
    "num_captions_not_read_whole",
    "num_unknown_tokens",
    "num_unreadable_captions",
)
MAX_EXAMPLES, MAX_EXAMPLE_CHARACTERS = 3, 80
TEXTS_AT_ONCE = 1000

log = get_logger("features")


def warn_of_unreadable(job: FeatureJob, inputs: FeatureInputs) -> None:
    """Say how many captions the text encoder does not read whole, or not at all, with examples."""
    reports = [job.output.report(source.name, job.fingerprint) for source in job.sources]
    details = [report.details for report in reports if report is not None]
    num_unread, num_tokens, num_unreadable, num_stored = (
        sum(found.get(name, 0) for found in details)
        for name in (NUM_UNREAD_CAPTIONS, NUM_UNREAD_TOKENS, NUM_UNREADABLE, "num_captions")
    )
    if not num_unread:
        return
    share = num_unread / (num_stored + num_unreadable)
    log.warning(
        f"{job.output.path}: {num_unread:,} captions ({share:.1%}) have words that {job.model_key} "
        f"{job.encoder.location} cannot read, such as {quote_some(_examples(job, inputs))}: {num_tokens:,} of their "
        f"tokens stand for nothing, and of {num_unreadable:,} nothing else is left, which are left out ({UNREADABLE})"
    )


def quote_some(texts: Sequence[str]) -> str:
    """Return the first of some captions, as messages show them."""
    return "; ".join(f"{text[:MAX_EXAMPLE_CHARACTERS]!r}" for text in texts[:MAX_EXAMPLES])


def _examples(job: FeatureJob, inputs: FeatureInputs) -> list[str]:
    path = find_tokenizer(job.encoder)
    found: list[str] = []
    if path is None:
        return found
    tokenizer = load_tokenizer(path)
    kinds = token_kinds(tokenizer)
    for texts in _texts(job):
        cleaned = [clean_text(text, inputs.features.text_cleaning) for text in texts]
        codes = tokenizer.encode_batch(cleaned)
        found += [text for text, code in zip(texts, codes, strict=True) if kinds.is_unread(code.ids)]
        if len(found) >= MAX_EXAMPLES:
            break
    return found


def kept_texts(job: FeatureJob, shard: str) -> Iterator[list[str]]:
    """Yield the texts of each sample of a shard that has some, of a job that encodes captions."""
    for row in job.worker_config.places.read(shard):
        texts = [cell[0] for name, cell in row.items() if name != "key" and cell[0] and cell[1] is None]
        if texts:
            yield texts


def _texts(job: FeatureJob) -> Iterator[list[str]]:
    """Yield the captions of the shards with such captions, some at a time."""
    for source in job.sources:
        report = job.output.report(source.name, job.fingerprint)
        if report is None or not report.details.get(NUM_UNREAD_CAPTIONS):
            continue
        samples = list(kept_texts(job, source.name))
        for start in range(0, len(samples), TEXTS_AT_ONCE):
            yield [text for sample in samples[start : start + TEXTS_AT_ONCE] for text in sample]
