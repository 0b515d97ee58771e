"""Copies between host and device that nobody waits for: behind the work they need, beside the work that follows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Result = TypeVar("Result")


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    import torch

    return torch.cuda.Stream(device)


class HostCopy:
    """A tensor on its way to the host.

    From a CUDA device it goes into page-locked memory on a stream of its own: the device goes on with what is started
    after. On a CPU it is the tensor itself.
    """

    def __init__(self, tensor: Tensor) -> None:
        import torch

        self._host, self._event = tensor, None
        if tensor.is_cuda:
            stream = _copy_stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            with torch.cuda.stream(stream):
                self._host.copy_(tensor, non_blocking=True)
            # Its memory must not be given to other work before it has been read.
            tensor.record_stream(stream)
            # A thread that waits leaves its core to those that decode images.
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(stream)

    def wait(self) -> Tensor:
        """Return the tensor on the host when it has arrived. Page-locked memory is scarce: keep copies of it alone."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; a CUDA device takes it when it comes to it, and nobody waits."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def one_behind(started: Iterator[Callable[[], Result]]) -> Iterator[Result]:
    """Yield what each piece of started work gives, after the one behind it has been started, too."""
    before = None
    for finish in started:
        if before is not None:
            yield before()
        before = finish
    if before is not None:
        yield before()
