"""Batches that fit the memory: what is too much at once is halved, and goes on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from errors import LoneItemError, is_out_of_memory
from pipelines.engine.progress import get_logger

log = get_logger("encoders")
Item = TypeVar("Item")
Result = TypeVar("Result")


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
        """Yield one result of `encode` per item, in order; raises as `each` does."""
        for results in self.each(items, encode):
            yield from results

    def each(self, items: Sequence[Item], encode: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
        """Yield what `encode` gives for each batch, in order.

        Raises:
            LoneItemError: a single item does not fit.
        """
        import torch

        start = 0
        while start < len(items):
            cost = self._cost(items[start])
            batch = items[start : start + max(1, self.size // cost)]
            try:
                result = encode(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise LoneItemError(str(error)) from error
                result = None
            # Out here the error and its frames are gone, and with them what they held of the memory.
            if result is None:
                self.size = len(batch) // 2 * cost
                torch.cuda.empty_cache()
                log.warning(f"out of memory: going on with batches of {len(batch) // 2}")
                continue
            start += len(batch)
            yield result
