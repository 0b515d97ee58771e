"""One style of log lines and one progress bar for every stage."""

import contextlib
import logging
import time
from collections.abc import Iterator

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG_INTERVAL_SECONDS = 30.0
LOG_FILE_COLUMNS = 160
console = Console(stderr=True, highlight=False)
if not console.is_terminal:
    # A log file has no width, and rich would wrap its lines at 80 columns.
    console.width = LOG_FILE_COLUMNS


def get_logger(room: str) -> logging.Logger:
    """Return the logger of a room; the first call installs the house's rich handler on stderr."""
    logger = logging.getLogger(f"atelier.{room}")
    parent = logging.getLogger("atelier")
    if not parent.handlers:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]", highlighter=None)
        handler.setFormatter(logging.Formatter("%(room)s · %(message)s", defaults={"room": ""}))
        handler.addFilter(_add_room)
        parent.addHandler(handler)
        parent.setLevel(logging.INFO)
        parent.propagate = False
    return logger


def _add_room(record: logging.LogRecord) -> bool:
    record.room = record.name.removeprefix("atelier.")
    return True


class ProgressBar:
    """Counts samples towards a total; draws a bar on a terminal and logs a line every 30 s elsewhere."""

    def __init__(self, description: str, total: int, *, unit: str = "samples") -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._start_seconds = time.monotonic()
        self._last_log_seconds = self._start_seconds
        self._logger = get_logger(description.split()[0])
        self._bar: tuple[Progress, TaskID] | None = None

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` more; `note` is shown behind the rate (rejects, loss, device wait)."""
        self.done += count
        self.note = note or self.note
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=self.done, rate=self._rate(), note=self.note)
        elif time.monotonic() - self._last_log_seconds >= LOG_INTERVAL_SECONDS:
            self._last_log_seconds = time.monotonic()
            self._logger.info(self._line())

    def _rate(self) -> str:
        elapsed_seconds = max(time.monotonic() - self._start_seconds, 1e-6)
        return f"{self.done / elapsed_seconds:.1f} {self.unit}/s"

    def _line(self) -> str:
        elapsed_seconds = max(time.monotonic() - self._start_seconds, 1e-6)
        remaining_seconds = (self.total - self.done) * elapsed_seconds / max(self.done, 1)
        return (
            f"{self.done:,}/{self.total:,} {self.unit} · {self._rate()} · {remaining_seconds:.0f} s left · {self.note}"
        )


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, unit: str = "samples") -> Iterator[ProgressBar]:
    """Show progress towards `total`; the first word of `description` names the room."""
    progress = ProgressBar(description, total, unit=unit)
    if not console.is_terminal:
        yield progress
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        progress._bar = (bar, bar.add_task(description, total=total, rate="", note=""))
        yield progress
