"""Seconds of training, and the speed since the last line of metrics."""

import contextlib
import time
from collections.abc import Iterator

TERA = 1e12


class Clock:
    """Seconds of training, over all resumes, and of waiting for data since the last line of metrics.

    `num_devices` are used now; earlier parts of the training may have used more or fewer.
    """

    def __init__(self, elapsed_seconds: float = 0.0, *, device_seconds: float = 0.0, num_devices: int = 1) -> None:
        self._start_seconds = time.monotonic() - elapsed_seconds
        self._former_device_seconds = device_seconds - num_devices * elapsed_seconds
        self._num_devices = num_devices
        self._lap_seconds = time.monotonic()
        self._wait_seconds = 0.0
        self._flops = 0

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self._start_seconds

    @property
    def device_seconds(self) -> float:
        """Seconds of all devices together so far."""
        return self._former_device_seconds + self._num_devices * self.elapsed_seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens inside as waiting for data."""
        start_seconds = time.monotonic()
        yield
        self._wait_seconds += time.monotonic() - start_seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the speed, though not out of the elapsed time."""
        start_seconds = time.monotonic()
        yield
        self._lap_seconds += time.monotonic() - start_seconds

    def count_flops(self, flops: int) -> None:
        """Count floating point operations of this rank's model."""
        self._flops += flops

    def lap(self, num_samples: int, *, peak_teraflops: float | None) -> dict[str, float | None]:
        """Return the speed since the last lap, in which `num_samples` were trained on, and start the next.

        `teraflops_per_second` and `mfu`, its share of the device's peak, are this rank's.
        """
        now_seconds = time.monotonic()
        seconds = now_seconds - self._lap_seconds
        teraflops_per_second = self._flops / TERA / seconds
        figures = {
            "images_per_second": num_samples / seconds,
            "data_wait_fraction": self._wait_seconds / seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "teraflops_per_second": teraflops_per_second,
            "mfu": teraflops_per_second / peak_teraflops if peak_teraflops else None,
        }
        self._lap_seconds, self._wait_seconds, self._flops = now_seconds, 0.0, 0
        return figures
