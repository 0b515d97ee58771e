"""A look at the raw shards of a run: whether they are where they were found, and as they were when they were read."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.raw.shard_headers import HeaderCache
from pipelines.raw.summaries import stamp_of
from pipelines.store.files import is_remote


def raw_notes(run: Path, paths: Sequence[str]) -> list[str]:
    """Return notes on the user's raw shards at `paths`; they are input, so a change of them is no damage of the run."""
    local = [path for path in paths if not is_remote(path)]
    missing = [path for path in local if not Path(path).exists()]
    cache = HeaderCache(run)
    known = {path: summary for path in local if path not in missing and (summary := cache.summary(path)) is not None}
    changed = [path for path, summary in known.items() if summary.stamp != stamp_of(path)]
    notes = []
    if missing:
        notes.append(f"{len(missing):,} raw shards are not where they were found, such as {missing[0]}")
    if changed:
        notes.append(
            f"{len(changed):,} raw shards have changed since their headers were read, such as {changed[0]}: commands "
            "take them for other shards"
        )
    return notes
