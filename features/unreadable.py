"""Captions that a text encoder cannot read: how many there are, and some of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from encoders.text import clean_text
from encoders.token_kinds import token_kinds
from encoders.tokens import find_tokenizer, load_tokenizer
from features.captions import mend_captions
from features.jobs import FeatureInputs, FeatureJob
from pipelines.engine.progress import get_logger
from pipelines.store.tables import read_table

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
        f"{job.model.location} cannot read, such as {quote_some(_examples(job, inputs))}: {num_tokens:,} of their "
        f"tokens stand for nothing, and of {num_unreadable:,} nothing else is left, which are left out ({UNREADABLE})"
    )


def quote_some(texts: Sequence[str]) -> str:
    """Return the first of some captions, as messages show them."""
    return "; ".join(f"{text[:MAX_EXAMPLE_CHARACTERS]!r}" for text in texts[:MAX_EXAMPLES])


def _examples(job: FeatureJob, inputs: FeatureInputs) -> list[str]:
    path = find_tokenizer(job.model)
    found: list[str] = []
    if path is None:
        return found
    tokenizer = load_tokenizer(path)
    kinds = token_kinds(tokenizer)
    for texts in _texts(job, inputs):
        cleaned = [clean_text(text, inputs.features.text_cleaning) for text in texts]
        codes = tokenizer.encode_batch(cleaned)
        found += [text for text, code in zip(texts, codes, strict=True) if kinds.is_unread(code.ids)]
        if len(found) >= MAX_EXAMPLES:
            break
    return found


def _texts(job: FeatureJob, inputs: FeatureInputs) -> Iterator[list[str]]:
    """Yield the captions of the shards with such captions, some at a time."""
    columns = inputs.features.caption_columns
    for source in job.sources:
        report = job.output.report(source.name, job.fingerprint)
        if report is None or not report.details.get(NUM_UNREAD_CAPTIONS):
            continue
        table = read_table(Path(source.path), [*columns, "reject"], mend=mend_captions())
        for start in range(0, len(table), TEXTS_AT_ONCE):
            rows = table.slice(start, TEXTS_AT_ONCE).to_pylist()
            yield [row[column] for row in rows if row["reject"] is None for column in columns if row[column]]
