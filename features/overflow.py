"""Samples whose features are not finite: which they are, and what to try."""

import pyarrow.compute as pc

from features.jobs import FeatureJob
from pipelines.engine.progress import get_logger
from pipelines.store.tables import MEND_SHARD, read_table

NON_FINITE_TEXT, NON_FINITE_LATENT = "non_finite_text", "non_finite_latent"
# In a report's `details`, where there are any: such a caption is no reject if the sample has another one.
NUM_NON_FINITE_CAPTIONS = "num_non_finite_captions"
MAX_KEYS_NAMED = 3
WIDEST_DTYPE = "float32"

log = get_logger("features")


def warn_of_overflow(job: FeatureJob) -> None:
    """Say of how many samples the features are not finite, which are the first, and what to try."""
    counts: dict[str, int] = {}
    for source in job.sources:
        report = job.output.report(source.name, job.fingerprint)
        if report is not None:
            num_latents = report.rejected.get(NON_FINITE_LATENT, 0)
            counts[source.name] = report.details.get(NUM_NON_FINITE_CAPTIONS, num_latents)
    first = next((name for name, count in counts.items() if count), None)
    if first is None:
        return
    path = job.output.file(first, ".parquet")
    rows = read_table(path, ["key", "reject"], mend=MEND_SHARD)
    rows = rows.filter(pc.field("reject").isin([NON_FINITE_TEXT, NON_FINITE_LATENT]))
    keys = rows["key"].unique().to_pylist()
    shown = ", ".join(keys[:MAX_KEYS_NAMED]) + (", …" if len(keys) > MAX_KEYS_NAMED else "")
    num_others = sum(count > 0 for count in counts.values()) - 1
    others = f"; {num_others:,} more shards have some" if num_others else ""
    log.warning(
        f"{job.output.path}: {sum(counts.values()):,} features are not finite and left out, first of shard {first}: "
        f"{shown} ({path} lists them as reject){others}. {_advice(job)}"
    )


def _advice(job: FeatureJob) -> str:
    key, dtype = job.dtype_key, job.dtype
    if dtype == WIDEST_DTYPE:
        weights = f"the weights of {job.model_key} {job.encoder.location}"
        return f"{key} is {dtype!r} already: look at what these samples are, and at {weights}"
    return f"{key} = {WIDEST_DTYPE!r}, where it is {dtype!r} now, may hold them; it makes all of this folder anew"
