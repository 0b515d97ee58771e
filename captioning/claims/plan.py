"""What asking about captions would take: shards, samples and claims, without loading a model."""

from collections.abc import Sequence

from rich.table import Table

from captioning.claims.job import ClaimsJob
from captioning.claims.sources import read_texts, split_identity
from captioning.claims.splitting import split_claims
from pipelines.engine.progress import console

# Captions that are split to reckon how many claims there are.
NUM_PROBED = 200


def print_plan(jobs: Sequence[ClaimsJob]) -> None:
    """Print shards, samples, about how many claims, and who is asked."""
    job = jobs[0]
    table = Table(title=f"Claims of captions of {len(job.sources)} shards into {job.output.path.parent}")
    for heading in ("captions", "shards", "samples", "to do", "claims, about"):
        table.add_column(heading, justify="left" if heading == "captions" else "right")
    for each in jobs:
        pending = sum(source.num_samples for source in each.pending())
        total = sum(source.num_samples for source in each.sources)
        claims = f"{round(pending * _claims_per_sample(each)):,}"
        table.add_row(each.column.name, f"{len(each.sources):,}", f"{total:,}", f"{pending:,}", claims)
    console.print(table)
    config, claims = job.config, job.config.claims
    place = f", at {config.server.base_url}" if config.engine == "openai" else ""
    lines = (
        f"model     {config.model} ({job.model.identity}){place}",
        f"engine    {config.engine}, one look at each question, no token is written",
        f"question  {claims.question}",
        f"claims    {claims.split}; unsupported below {claims.threshold:g}",
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    for each in jobs:
        for change in each.output.changes(each.fingerprint, defaults=claims.fingerprint_defaults()):
            is_asked = not change.startswith("threshold: ")
            done = "asked again" if is_asked else "marked again, and nothing is asked"
            console.print(f"{each.output.path} would be {done}: {change}", markup=False, soft_wrap=True)


def _claims_per_sample(job: ClaimsJob) -> float:
    """Return how many claims a sample has on average, of some of the first shard."""
    source = job.sources[0]
    _, sha256 = split_identity(source.identity)
    path = job.column.folder / f"{source.name}.parquet"
    texts = read_texts(path, job.column.column, sha256=sha256).texts[:NUM_PROBED]
    claims = [len(split_claims(text or "", split=job.config.claims.split)) for text in texts]
    return sum(claims) / max(1, len(claims))
