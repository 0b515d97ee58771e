"""Work of many small pieces: reads in this thread as long as nothing is waited for, else in several; many objects."""

import contextlib
import gc
import resource
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# Of file systems across a network, and of cold disks, calls wait.
NUM_THREADS = 16
# A server across a network answers so many requests in the time that one takes; memory bounds how many are under way.
NUM_REMOTE_THREADS = 128
NUM_AHEAD = 32
# Threads that have nothing to wait for take turns, and that costs as much again as what they do.
WAITS_PER_ITEM = 0.25

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Hold back the search for cycles, which takes a third of the time where millions of objects are made and kept."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cut_into_tasks(items: Sequence[Item], num_in_task: int) -> list[Sequence[Item]]:
    """Cut items into runs of at most `num_in_task`, in order."""
    return [items[start : start + num_in_task] for start in range(0, len(items), num_in_task)]


def map_tasks(function: Callable[[Sequence[Item]], Result], tasks: Sequence[Sequence[Item]]) -> Iterator[Result]:
    """Yield what `function` makes of each task, in order; behind the first one that has waited, in threads."""
    num_done = 0
    for task in tasks:
        waits_before = _num_waits()
        result = function(task)
        num_waits = (_num_waits() or 0) - waits_before if waits_before is not None else len(task)
        num_done += 1
        yield result
        if num_waits >= WAITS_PER_ITEM * len(task):
            break
    if num_done < len(tasks):
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            yield from pool.map(function, tasks[num_done:])


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield what `function` makes of each item, in order; the next `NUM_AHEAD` are waited for in threads meanwhile."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(NUM_AHEAD) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > NUM_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _num_waits() -> int | None:
    """How often this thread has given up its core to wait, not been made to; None where the system does not say."""
    if not hasattr(resource, "RUSAGE_THREAD"):
        return None
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
