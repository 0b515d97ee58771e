"""What making columns would take: scores, shards and samples that are pending, without reading an image."""

from rich.table import Table
from rich.text import Text

from curation.columns import to_do
from curation.job import ColumnsJob
from pipelines.engine.progress import console


def print_plan(job: ColumnsJob) -> None:
    """Print what is pending of each score."""
    table = Table(title=f"Columns of {len(job.sources)} shards into {job.folder}")
    for column in ("score", "from", "columns", "shards", "to do", "samples"):
        table.add_column(column, justify="left" if column in ("score", "from", "columns") else "right")
    sources_to_do = to_do(job)
    for score in job.scores:
        pending = sources_to_do[score.name]
        names = ", ".join(column.name for column in score.columns)
        num_samples = sum(source.num_samples for source in pending)
        counts = (f"{len(job.sources):,}", f"{len(pending):,}", f"{num_samples:,}")
        table.add_row(score.name, score.needs, Text(names), *counts)
    console.print(table)
