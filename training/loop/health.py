"""Watching over training: stopping before bad weights are made or kept."""

import json
import math
from collections import deque
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from errors import UserError
from pipelines.as_typed import typed_command
from pipelines.store.files import atomic_write_bytes
from training.loop.losses import StepLosses
from training.loop.measure import count_non_finite, total_norm
from training.loop.zero import Update, ZeroModel
from training.stages.stage import TrainingJob

# Steps that are launched before the host looks at one: the device always has the next step to do.
LAG = 1


class UnhealthyTrainingError(UserError):
    """Training was stopped because going on would waste or ruin it; says what was seen and where to look."""


def stop_on_non_finite(losses: StepLosses, model: ZeroModel, job: TrainingJob, *, step: int) -> NoReturn:
    """Write the batch and the state of the weights to `non-finite-step-<k>.json` and stop before the update spoils any.

    Raises:
        UnhealthyTrainingError: always.
    """
    samples, num_spoilt = losses.gather_samples(), count_non_finite(model)
    weights = {"norm": total_norm(model, model.masters), "num_non_finite": num_spoilt}
    moments = {"norm": total_norm(model, model.first_moments())}
    bad = [sample for sample in samples if not math.isfinite(sample["loss"])]
    path = job.directory / f"non-finite-step-{step}.json"
    if dist.get_rank() == 0:
        # `NaN` and `Infinity` as Python's json writes them: which of the two it was is half the diagnosis.
        dump = {"step": step, "non_finite": [sample["key"] for sample in bad], "samples": samples}
        dump |= {"weights": weights, "first_moments": moments}
        atomic_write_bytes(path, json.dumps(dump, indent=1).encode())
    first, asked = bad[0], dict.fromkeys(typed_command("verify", {"run": each.run}) for each in job.features.datasets)
    runs = " and ".join(f"`{command}`" for command in asked)
    raise UnhealthyTrainingError(
        f"step {step}: the loss of {len(bad)} samples is not finite, first {first['key']} of shard {first['shard']}; "
        f"{path} lists the batch. No weights were changed by it; {num_spoilt} of them are not finite themselves. "
        f"{runs} finds features that are damaged; if none are, lower training.learning_rate"
    )


class Health:
    """Whether steps are sound: decided on the device, so that the host need not wait for a step before the next.

    The device keeps the counts of skipped updates, and once a loss is not finite, or too many updates in a row were
    skipped, ruins every step from then on: nothing moves any more. The host looks at a step when `LAG` more have been
    launched, at the same step on all ranks, and stops there. `is_stopping` says whether a rank was to stop at a step
    that the host has seen.
    """

    def __init__(self, max_in_a_row: int, *, total: int = 0, in_a_row: int = 0, device: torch.device) -> None:
        self._max_in_a_row = max_in_a_row
        self._total, self._in_a_row = torch.tensor([total, in_a_row], device=device).unbind()
        self._is_ruined = torch.zeros((), dtype=torch.bool, device=device)
        self._unseen: deque[_Verdict] = deque()
        self.is_stopping = False

    def is_ruined(self, losses: StepLosses) -> Tensor:
        """Return whether the step of these shared losses, or one before it, forbids an update; a scalar."""
        self._is_ruined = self._is_ruined | (losses.num_non_finite > 0)
        return self._is_ruined

    def count(self, losses: StepLosses, update: Update, *, step: int) -> None:
        """Take note of the losses and the update of a step, the `step`th."""
        self._total = self._total + update.is_skipped
        self._in_a_row = (self._in_a_row + 1) * update.is_skipped
        self._is_ruined = self._is_ruined | (self._in_a_row >= self._max_in_a_row)
        signs = torch.stack([losses.num_stopping, losses.num_non_finite, self._in_a_row.double()])
        self._unseen.append(_Verdict(step, losses, ToHost(signs)))

    def look(self, model: ZeroModel, job: TrainingJob, *, is_all: bool) -> None:
        """Look at steps not seen so far, all of them or all but the last `LAG`; all ranks must call it.

        Raises:
            UnhealthyTrainingError: a loss was not finite, or too many updates were skipped one after the other.
        """
        while len(self._unseen) > (0 if is_all else LAG):
            verdict = self._unseen.popleft()
            num_stopping, num_non_finite, num_in_a_row = verdict.signs.values().tolist()
            if num_non_finite:
                stop_on_non_finite(verdict.losses, model, job, step=verdict.step - 1)
            if num_in_a_row >= self._max_in_a_row:
                raise UnhealthyTrainingError(
                    f"step {verdict.step}: the last {num_in_a_row:.0f} updates were skipped because the gradient was "
                    f"not finite, as training.max_skipped_steps {self._max_in_a_row} allows at most; no weights have "
                    "changed since. Lower training.learning_rate or use training.dtype fp32"
                )
            self.is_stopping |= num_stopping > 0

    def counts(self) -> tuple[int, int]:
        """Return the updates skipped in all, and one after the other up to now; waits for the device."""
        total, in_a_row = torch.stack([self._total, self._in_a_row]).tolist()
        return total, in_a_row


class ToHost:
    """A small tensor on its way from the device to the host, which waits for it only when it asks for the values."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.current_stream(values.device).record_event()
        else:
            self._values = values.clone()

    def values(self) -> Tensor:
        """Return the values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


class _Verdict(NamedTuple):
    """A step that the host has not looked at: its losses, and how many ranks stop, losses are bad, skips in a row."""

    step: int
    losses: StepLosses
    signs: ToHost
