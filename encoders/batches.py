"""Batches that fit the memory: what is too much at once is halved, and goes on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipelines.engine.progress import get_logger

log = get_logger("encoders")
Item = TypeVar("Item")


class Batches:
    """Cuts work into batches that cost at most `size`; one that does not fit the memory halves the size for good.

    Args:
        size: captions are counted in tokens with their padding, images one by one.
        cost: of the first item of a batch, and so of each other: items come largest first, or all alike.
    """

    def __init__(self, size: int, *, cost: Callable[[Any], int] = lambda item: 1) -> None:
        self.size = size
        self._cost = cost

    def run(self, items: Sequence[Item], encode: Callable[[Sequence[Item]], list[Any]]) -> Iterator[Any]:
        """Yield one result of `encode` per item, in order.

        Raises:
            torch.OutOfMemoryError, RuntimeError: a single item does not fit; the latter is what a CPU raises.
        """
        import torch

        start = 0
        while start < len(items):
            cost = self._cost(items[start])
            batch = items[start : start + max(1, self.size // cost)]
            try:
                results = encode(batch)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or len(batch) == 1:
                    raise
                results = None
            # Out here the error and its frames are gone, and with them what they held of the memory.
            if results is None:
                self.size = len(batch) // 2 * cost
                torch.cuda.empty_cache()
                log.warning(f"out of memory: going on with batches of {len(batch) // 2}")
                continue
            start += len(results)
            yield from results


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
