"""What is made of a slice is written in a thread, while the device makes the next."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class SliceWriter:
    """Runs functions one after the other in a thread of its own; at most one is running or waiting.

    Use as a context manager: left without an error, all is done. What a function raises is raised when the next one is
    handed over, or at the end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._before: Future[None] | None = None

    def write(self, function: Callable[[], None]) -> None:
        """Have a function run when the one before is done; waits for that one, so that slices do not pile up."""
        self._wait()
        self._before = self._thread.submit(function)

    def _wait(self) -> None:
        if self._before is not None:
            self._before.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The files it writes are closed next.
        self._thread.shutdown()
        if kind is None:
            self._wait()
