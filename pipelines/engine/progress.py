"""One style of log lines and one progress view for every room."""

import contextlib
import datetime
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

LOG_INTERVAL_SECONDS = 30.0
LOG_FILE_COLUMNS = 200
MAX_REASONS_SHOWN = 3
# Libraries that tell at their import of kernels for other GPUs and of names that torch will give up.
TALKATIVE = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
# What is printed comes from recipes, paths and data, too: `[INST]` and `:cat:` in them are text. Styles are `Text`.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
if not console.is_terminal:
    # A log file has no width, and rich would wrap its lines at 80 columns.
    console.width = LOG_FILE_COLUMNS


def get_logger(room: str) -> logging.Logger:
    """Return the logger of a room; the first call installs the house's rich handler on stderr.

    It also lets libraries that talk of themselves at their import report errors alone.
    """
    logger = logging.getLogger(f"atelier.{room}")
    parent = logging.getLogger("atelier")
    if not parent.handlers:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]", highlighter=None)
        handler.setFormatter(logging.Formatter("%(room)s · %(message)s", defaults={"room": ""}))
        handler.addFilter(_add_room)
        parent.addHandler(handler)
        parent.setLevel(logging.INFO)
        parent.propagate = False
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
    return logger


def _add_room(record: logging.LogRecord) -> bool:
    record.room = record.name.removeprefix("atelier.")
    return True


def describe_rejects(rejected: Mapping[str, int], *, num_read: int) -> str:
    """Return the rejects with their share and their largest reasons, empty if there are none."""
    num_rejected = sum(rejected.values())
    if not num_rejected:
        return ""
    largest = sorted(rejected.items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in largest[:MAX_REASONS_SHOWN])
    more = ", …" if len(largest) > MAX_REASONS_SHOWN else ""
    return f"{num_rejected:,} rejected ({num_rejected / num_read:.1%}): {reasons}{more}"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


class ProgressBar:
    """Counts samples towards a total, and says how fast.

    Attributes:
        note: shown below the bar and behind the log line: rejects, loss, waiting for data; it may have several lines.
        under_way: units of work that has begun and not ended; they count as done until `advance` counts them.
    """

    def __init__(self, description: str, total: int, *, unit: str = "samples") -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self.under_way = 0
        self._num_skipped = 0
        self._start_seconds = time.monotonic()

    def skip(self, count: int) -> None:
        """Count what an earlier run has done: it is no part of the rate."""
        self.done += count
        self._num_skipped += count

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` more; `note` replaces the note."""
        self.done += count
        self.note = note or self.note

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the bar was made."""
        return max(time.monotonic() - self._start_seconds, 1e-6)

    @property
    def num_new(self) -> int:
        """How many have been done since the bar was made."""
        return self._reached() - self._num_skipped

    def _reached(self) -> int:
        return min(self.done + self.under_way, self.total)

    def rate(self) -> str:
        """Return the rate since the bar was made."""
        return f"{self.num_new / self.elapsed_seconds:.1f} {self.unit}/s"

    def _time_left(self) -> str:
        if self.num_new <= 0:
            return "-:--:--"
        return clock((self.total - self._reached()) * self.elapsed_seconds / self.num_new)

    def line(self) -> str:
        """Return what a log file is told."""
        counts = f"{self._reached():,}/{self.total:,} {self.unit}"
        return " · ".join([counts, self.rate(), f"{self._time_left()} left", *self.note.splitlines()])

    def __rich__(self) -> Group:
        """Return what a terminal is shown: the bar and the note's lines, cut at its width."""
        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None, None):
            grid.add_column(no_wrap=True, ratio=ratio)
        reached = self._reached()
        bar = Bar(total=max(self.total, 1), completed=reached, width=None)
        counts = f"{reached:,}/{self.total:,}"
        grid.add_row(Text(self.description, style="bold"), bar, counts, self.rate(), f"{self._time_left()} left")
        notes = (Text(f"  {line}", no_wrap=True, overflow="ellipsis", style="dim") for line in self.note.splitlines())
        return Group(grid, *notes)


@contextlib.contextmanager
def progress_bar(
    description: str, total: int, *, unit: str = "samples", log_interval_seconds: float = LOG_INTERVAL_SECONDS
) -> Iterator[ProgressBar]:
    """Show progress towards `total`: a bar on a terminal, elsewhere a line every `log_interval_seconds`.

    The first word of `description` names the room. The line comes also when nothing has moved.
    """
    progress = ProgressBar(description, total, unit=unit)
    if console.is_terminal:
        with Live(progress, console=console, transient=True, refresh_per_second=2):
            yield progress
        return
    logger, is_over = get_logger(description.split()[0]), threading.Event()

    def log_regularly() -> None:
        while not is_over.wait(log_interval_seconds):
            logger.info(progress.line())

    thread = threading.Thread(target=log_regularly, name="progress", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        is_over.set()
        thread.join()
