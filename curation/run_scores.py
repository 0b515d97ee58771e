"""Scores that are made from all shards together, such as which images are near duplicates."""

import shutil
from collections.abc import Sequence

import pyarrow as pa

from curation.dealing import write_shard
from curation.job import ColumnsJob
from curation.score_files import rows_of
from curation.scores.protocol import RunScore
from curation.table_rows import read_inputs, sample_keys, source_identity
from pipelines.engine.pieces import Source
from pipelines.engine.progress import progress_bar
from pipelines.engine.run import say_done_anew
from pipelines.store.files import exclusive

SCRATCH_FOLDER = ".scratch"
ROOM = "columns"


def run_sources(job: ColumnsJob, score: RunScore) -> list[Source]:
    """Return the shards as a score of the whole run knows them: each has all others in its identity."""
    sources = job.sources_of(score)
    whole = source_identity(score.source(), *(f"{each.name}:{each.identity}" for each in sources))
    return [
        Source(
            name=each.name, path=each.path, identity=source_identity(each.identity, whole), num_samples=each.num_samples
        )
        for each in sources
    ]


def make_run_score(job: ColumnsJob, score: RunScore, sources: Sequence[Source]) -> None:
    """Make a score of the whole run, if something that it is made from has changed; `sources` as `run_sources` gives.

    Raises:
        UserError: the folder is being written by another process.
    """
    output, fingerprint = job.output(score), job.fingerprint(score)
    if job.pending(score, sources):
        with exclusive(output.path):
            changes = output.changes(fingerprint, defaults={})
            say_done_anew(output, sources, fingerprint, changes=changes, room=ROOM)
            output.clear_leftovers(is_held=True)
            # What other shards have was found among other samples, or in another table.
            for name in set(output.marked()).difference(source.name for source in sources):
                output.clear_marker(name)
            _measure(job, score, sources)


def _measure(job: ColumnsJob, score: RunScore, sources: Sequence[Source]) -> None:
    output, fingerprint = job.output(score), job.fingerprint(score)
    scratch = output.path / SCRATCH_FOLDER
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)

    raw = {each.name: each for each in job.sources}

    def read_all(shard: str) -> tuple[pa.Table, list[str | None]]:
        keys = None if score.reads else sample_keys(raw[shard], job.data.reading, run=job.run)
        return read_inputs(job.run, score.reads, shard, keys)

    def read(shard: str) -> pa.Table:
        table, reasons = read_all(shard)
        return table.filter(pa.array([reason is None for reason in reasons]))

    num_samples = sum(each.num_samples for each in sources)
    with progress_bar(f"{ROOM} {score.name}", num_samples) as progress:
        found = score.measure_run([each.name for each in sources], read, scratch)
        for source, measured in zip(sources, found, strict=True):
            table, reasons = read_all(source.name)
            rows = rows_of(score, table["key"].to_pylist(), reasons, measured)
            if not output.is_done(source.name, source.identity, fingerprint):
                write_shard(output, rows, fingerprint, name=source.name, source=source.identity)
            progress.advance(source.num_samples)
    shutil.rmtree(scratch)
