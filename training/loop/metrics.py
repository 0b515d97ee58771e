"""What a run reports: `metrics.jsonl` and TensorBoard, losses by timestep, and what the training has cost so far."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipelines.store.files import atomic_write_bytes
from training.config import StageTraining

if TYPE_CHECKING:
    from training.loop.health import StepLosses

METRICS = "metrics.jsonl"
NUM_TIMESTEP_BINS = 10
SECONDS_PER_DAY = 86_400
SECONDS_PER_HOUR = 3_600


class LossWindow:
    """Sums of losses since the last line, by bin of the timestep; part of a checkpoint, so that a resume loses none."""

    def __init__(self, state: "dict[str, Any] | None" = None) -> None:
        self._state = {
            "sums": [0.0] * NUM_TIMESTEP_BINS,
            "counts": [0.0] * NUM_TIMESTEP_BINS,
            "squared_error": 0.0,
            "num_steps": 0,
            "max_gradient_norm": 0.0,
        } | (state or {})

    @property
    def state(self) -> dict[str, Any]:
        """What to keep in a checkpoint."""
        return self._state

    def add(self, losses: "StepLosses", *, gradient_norm: float = 0.0) -> None:
        """Add the shared losses of a step, and the norm of its gradient before clipping, which may be infinite."""
        state = self._state
        self._state = {
            "sums": [total + value for total, value in zip(state["sums"], losses.sums, strict=True)],
            "counts": [total + value for total, value in zip(state["counts"], losses.counts, strict=True)],
            "squared_error": state["squared_error"] + losses.squared_error,
            "num_steps": state["num_steps"] + 1,
            "max_gradient_norm": max(state["max_gradient_norm"], gradient_norm if math.isfinite(gradient_norm) else 0),
        }

    def flush(self) -> tuple[dict[str, Any], int]:
        """Return mean losses and the number of steps they are of, and start anew.

        The losses are `loss` (what is minimised), `mse` (of the noise alone) and `loss_by_timestep`, one value per
        tenth of the timesteps, null where none fell.
        """
        state = self._state
        self._state = LossWindow().state
        num_samples = sum(state["counts"])
        pairs = zip(state["sums"], state["counts"], strict=True)
        losses = {
            "loss": sum(state["sums"]) / num_samples,
            "mse": state["squared_error"] / num_samples,
            "loss_by_timestep": [total / count if count else None for total, count in pairs],
        }
        return losses, state["num_steps"]


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
    """Appends lines to `metrics.jsonl` and scalars to TensorBoard.

    Lines after `step`, left by a run that got further than its last checkpoint, are removed: the file becomes what an
    uninterrupted run would have written.
    """

    def __init__(self, directory: Path, *, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS
        atomic_write_bytes(path, b"".join(_lines_up_to(path, step)))
        self._file = path.open("ab", buffering=0)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write one line; its numbers go to TensorBoard under their names.

        Raises:
            OSError: the disk is full; names the file.
        """
        try:
            self._file.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise OSError(
                f"{self._file.name} cannot be written: {error.strerror}; the last checkpoint stays in force, and the "
                "same command continues from it"
            ) from error
        for name, value in record.items():
            scalars = (
                {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
            )
            for tag, scalar in scalars.items():
                if scalar is not None:
                    self._board.add_scalar(tag, scalar, record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    """Return the whole lines of steps up to `step`, none if that is the start; one that a kill has cut is not whole."""
    if step == 0 or not path.is_file():
        return []
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]
