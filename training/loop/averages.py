"""The averages of what trains: one, or under `training.ema = "power"` two of different lengths."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from training.loop.disk import saying_a_full_disk
from training.loop.ema import EMA
from training.loop.kept_averages import path_of, write_averages
from training.loop.power_average import decay_at
from training.loop.zero import ZeroModel
from training.stages.critics import without_critic


class Averages:
    """Averages of a model's masters; the first one is what is exported, drawn with and a target.

    Power averages are of the steps of the stage, of which the first leaves nothing of what they began as.
    """

    def __init__(self, model: ZeroModel) -> None:
        settings = model.settings
        self._lengths = settings.ema_lengths if settings.ema == "power" else ()
        self._all = [EMA(model, 0.0) for _ in self._lengths] or [EMA(model, settings.ema_decay)]

    @property
    def exported(self) -> EMA:
        """The one that `model/` of a checkpoint is."""
        return self._all[0]

    @property
    def second(self) -> EMA | None:
        """The other one, where there are two."""
        return self._all[1] if self._lengths else None

    def update(self, step: int, *, is_skipped: Tensor) -> None:
        """Move them towards the masters after `step`, counted from 0, which `is_skipped` on the device or not.

        A skipped step leaves an exponential average where it is. How a power average weighs the steps goes by their
        number alone, and masters that have not moved are as good as any.
        """
        if not self._lengths:
            self.exported.update(is_skipped=is_skipped)
            return
        for average, length in zip(self._all, self._lengths, strict=True):
            average.decay = decay_at(length, step)
            average.update(is_skipped=torch.zeros_like(is_skipped))

    def keep(self, stage_directory: Path, step: int) -> None:
        """Write power averages as they are after `step` steps, for those of other lengths; all ranks must call it.

        Raises:
            StorageError: the disk is full.
        """
        weights = {}
        for average, length in zip(self._all, self._lengths, strict=True):
            weights[length] = without_critic(average.gather())
        if dist.get_rank() == 0:
            path = path_of(stage_directory, step)
            with saying_a_full_disk(stage_directory, f"{path.name} of its averages was not kept"):
                write_averages(path, weights)
