"""`runs/<name>/summary.json`: the figures of a run, written by each room as it finishes."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.store.files import atomic_write_json


def read_summary(run: Path) -> dict[str, Any]:
    """Return the run's summary, empty when nothing has finished yet."""
    path = run / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def update_summary(run: Path, key: str, value: Mapping[str, Any] | float | int) -> None:
    """Set `key`, dotted as in `counts.captioning`, to `value`; commands that end at once do not lose each other's."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".summary.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        summary = read_summary(run)
        node = summary
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = dict(value) if isinstance(value, Mapping) else value
        atomic_write_json(run / "summary.json", summary)
