"""`runs/<name>/summary.json`: the figures of a run, written by each room as it finishes."""

import fcntl
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_json, remove_temporary_files
from pipelines.store.state_files import read_state

SUMMARY_NAME = "summary.json"

log = get_logger("store")


def read_summary(run: Path) -> dict[str, Any]:
    """Return the run's summary, empty when nothing has finished yet.

    Raises:
        UserError: it is damaged; names it.
    """
    path = run / SUMMARY_NAME
    mend = "put a copy of it back, or move it away: a new one is begun by the next room that finishes"
    return read_state(path, mend=mend) if path.is_file() else {}


def update_summary(run: Path, key: str, value: Mapping[str, Any] | float | int) -> None:
    """Set `key`, dotted as in `counts.captioning`, to `value`; commands that end at once do not lose each other's.

    A damaged summary is put aside with a warning and a new one begun: the work of which this tells is done.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".summary.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Under its lock, what is left of a killed writer is nobody's.
        remove_temporary_files(run, SUMMARY_NAME, is_held=True)
        summary = _read_or_put_aside(run)
        node = summary
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = dict(value) if isinstance(value, Mapping) else value
        atomic_write_json(run / SUMMARY_NAME, summary)


def _read_or_put_aside(run: Path) -> dict[str, Any]:
    try:
        return read_summary(run)
    except UserError as error:
        aside = run / f"summary-damaged-{secrets.token_hex(4)}.json"
        (run / SUMMARY_NAME).rename(aside)
        log.warning(f"{str(error).partition(';')[0]}; it now is {aside}, and a new one is begun")
        return {}
