"""Micro-batches on their way to the device, behind what it computes."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from training.data.batch import Batch, PackedBatch


class Lane(Protocol):
    """How copies from the reader's buffers run beside the device's computations."""

    def copying(self) -> contextlib.AbstractContextManager[None]:
        """Inside, copies and what is computed of them are queued behind each other, beside all else."""
        ...

    def hand_over(self, tensors: list[Tensor]) -> None:
        """Let what is computed from now on wait for the copies, and keep `tensors` as long as it needs them."""
        ...

    def finish(self) -> None:
        """Wait, on the host, until the copies have been made."""
        ...


class SameMemory:
    """On a CPU nothing is copied: the network reads the reader's buffers."""

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Do nothing."""
        yield

    def hand_over(self, tensors: list[Tensor]) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class CopyStream:
    """A CUDA stream of its own; the copies of a step run while the device still computes the one before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event()

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Queue on the stream."""
        with torch.cuda.stream(self._stream):
            yield
        self._copied.record(self._stream)

    def hand_over(self, tensors: list[Tensor]) -> None:
        """Let the current stream wait for the copies; the allocator keeps `tensors` until it has used them."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        for tensor in tensors:
            tensor.record_stream(current)

    def finish(self) -> None:
        """Wait for the copies alone, which wait for no computation."""
        self._copied.synchronize()


class Transfers:
    """Takes micro-batches to a device.

    Ask `finish` before the reader is asked for another: it fills the buffers again that are copied from.
    """

    def __init__(self, device: torch.device, *, lane: Lane | None = None) -> None:
        self._device = device
        self._lane: Lane = lane or (CopyStream(device) if device.type == "cuda" else SameMemory())

    def bring(self, packed: PackedBatch) -> Batch:
        """Return the batch on the device, for computations launched from now on."""
        with self._lane.copying():
            batch = packed.to(self._device)
        self._lane.hand_over(batch.device_tensors())
        return batch

    def finish(self) -> None:
        """Wait until the reader's buffers are not needed any more."""
        self._lane.finish()
