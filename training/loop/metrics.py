"""What a run reports: `metrics.jsonl` and the boards beside it, and what the training has cost so far."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from errors import StorageError
from pipelines.store.files import atomic_write_bytes, remove_temporary_files
from pipelines.store.previews import Pictures
from pipelines.store.state_files import log_lines
from training.config import StageTraining
from training.loop.boards import Board

METRICS = "metrics.jsonl"
SECONDS_PER_DAY = 86_400
SECONDS_PER_HOUR = 3_600


def costs(settings: StageTraining, *, device_seconds: float) -> dict[str, float]:
    """Return device days, dollars and kilograms of CO2 spent on training, as in Figure 2 of the paper.

    CO2 = devices x hours x watts x carbon intensity of the electricity (Strubell et al. 2019, without their factor
    for the data centre's overhead); price, power and intensity are settings.
    """
    device_hours = device_seconds / SECONDS_PER_HOUR
    kilowatt_hours = device_hours * settings.watts_per_device / 1000
    return {
        "device_days": device_seconds / SECONDS_PER_DAY,
        "dollars": device_hours * settings.dollars_per_device_hour,
        "co2_kilograms": kilowatt_hours * settings.co2_kilograms_per_kilowatt_hour,
    }


class MetricsLog:
    """Appends lines to `metrics.jsonl`, and shows their numbers on `boards`, which it closes.

    Lines after `step`, left by a run that got further than its last checkpoint, are removed: the file becomes what an
    uninterrupted run would have written.
    """

    def __init__(self, directory: Path, *, step: int, boards: Sequence[Board]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS
        # The launcher holds the directory.
        remove_temporary_files(directory, is_held=True)
        atomic_write_bytes(path, b"".join(_lines_up_to(path, step)))
        self._file = path.open("ab", buffering=0)
        self._boards = boards

    def write(self, record: dict[str, Any]) -> None:
        """Write one line; its numbers go to the boards under their names.

        Raises:
            StorageError: the disk is full; names the file.
        """
        try:
            self._file.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise StorageError(
                f"{self._file.name} cannot be written: {error.strerror}; the last checkpoint stays in force, and the "
                "same command continues from it"
            ) from error
        scalars: dict[str, Any] = {}
        for name, value in record.items():
            scalars |= (
                {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
            )
        scalars = {name: value for name, value in scalars.items() if value is not None}
        for board in self._boards:
            board.add_scalars(scalars, step=record["step"])

    def show(self, pictures: Pictures, *, step: int) -> None:
        """Show previews of a step on the boards."""
        for board in self._boards:
            board.add_pictures(pictures, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    """Return the whole lines of steps up to `step`, none if that is the start; one that a kill has cut is not whole."""
    if step == 0 or not path.is_file():
        return []
    found = ((line, record.get("step")) for line, record in log_lines(path))
    return [line + b"\n" for line, number in found if isinstance(number, int) and number <= step]
