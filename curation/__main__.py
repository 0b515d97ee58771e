"""`python -m curation --recipe R --run RUN [--set key=value] [--plan]`: raw shards to columns/<score>/*.parquet."""

import sys
import time
from collections.abc import Mapping

from curation.columns import ROOM, make_columns
from curation.job import read_job
from curation.plan import print_plan
from curation.scores.protocol import TableScore
from pipelines.command import parse_command, run_command
from pipelines.engine.progress import describe_rejects, get_logger
from pipelines.run_memory import remember_found
from pipelines.store.manifest import Manifest
from pipelines.store.summary import update_summary

log = get_logger(ROOM)


def main() -> None:
    """Make the recipe's columns, or print what that would take."""
    start_seconds = time.monotonic()
    command = parse_command("curation", "Raw shards to columns about each sample.")
    job = read_job(command)
    if command.is_plan:
        print_plan(job)
        return
    command.remember()
    remember_found(command.run, [source.path for source in job.sources])
    made = make_columns(job)
    if made.num_new == 0:
        log.info(f"nothing to do: {len(job.scores)} scores of {len(job.sources)} shards are done")
    else:
        update_summary(command.run, "seconds.columns", round(time.monotonic() - start_seconds, 1))
        counts = {name: _counts(each) for name, each in made.manifests.items()}
        update_summary(command.run, "counts.columns", counts)
    for name, manifest in made.manifests.items():
        log.info(f"{name}: {_describe(manifest)}")
    for score in job.scores:
        said = score.say(_details(made.manifests[score.name])) if isinstance(score, TableScore) else None
        if said is not None:
            log.info(f"{score.name}: {said}")


def _counts(manifest: Manifest) -> Mapping[str, object]:
    return {"read": manifest.num_read, "kept": manifest.num_kept, "rejected": manifest.rejected}


def _details(manifest: Manifest) -> dict[str, int]:
    """Return the counts of all shards: sums, and the largest of those that are limits."""
    found: dict[str, int] = {}
    for report in manifest.shards.values():
        for name, count in report.details.items():
            found[name] = max(found.get(name, 0), count) if name.startswith("max_") else found.get(name, 0) + count
    return found


def _describe(manifest: Manifest) -> str:
    rejects = describe_rejects(manifest.rejected, num_read=manifest.num_read)
    return f"{manifest.num_kept:,} of {manifest.num_read:,} samples" + (f" · {rejects}" if rejects else "")


if __name__ == "__main__":
    sys.exit(run_command("curation", main))
