"""The shards of the next steps, opened ahead of the reader: remote ones are downloaded while earlier steps train."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from training.data.cache import CacheFullError
from training.data.index import WAIT_SECONDS, FeatureIndex, OpenShard
from training.data.plan import Plan, PlannedBatch

NUM_OPENING_THREADS = 8
NUM_STEPS_AHEAD = 32


class ShardWindow:
    """Gives each step its planned batch and open shards, and opens those of the steps to come.

    Args:
        plan, index: what is read.
        steps: to go through, in order.
        positions: the rank's part of every global batch; only its shards are opened.

    Use as a context manager; leaving it closes all shards.
    """

    def __init__(self, plan: Plan, index: FeatureIndex, *, steps: range, positions: range) -> None:
        self._plan = plan
        self._index = index
        self._upcoming = iter(steps)
        self._positions = slice(positions.start, positions.stop)
        self._planned: deque[tuple[PlannedBatch, set[int]]] = deque()
        self._opening: dict[int, Future[OpenShard]] = {}
        self._pool = ThreadPoolExecutor(NUM_OPENING_THREADS, thread_name_prefix="shards")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._index.stop()
        self._pool.shutdown(cancel_futures=True)
        self._close_all_but(set())

    def advance(self) -> tuple[PlannedBatch, Mapping[int, OpenShard]]:
        """Return the next step's batch and its shards, open until the next call.

        Raises:
            CacheFullError: the cache cannot hold this step's shards.
            FileNotFoundError, ValueError, OSError: a shard's file cannot be used; names it.
        """
        self._plan_ahead()
        planned, needed = self._planned.popleft()
        self._close_all_but(needed.union(*(shards for _, shards in self._planned)))
        for shard in sorted(needed):
            self._start(shard)
        for _, shards in self._planned:
            for shard in sorted(shards):
                self._start(shard)
        return planned, {shard: self._finish(shard, needed) for shard in needed}

    def _plan_ahead(self) -> None:
        while len(self._planned) <= NUM_STEPS_AHEAD and (step := next(self._upcoming, None)) is not None:
            planned = self._plan.batch(step)
            self._planned.append((planned, set(planned.shards[self._positions].tolist())))

    def _start(self, shard: int) -> None:
        """Open a shard in the background, also if it had no room when that was tried before."""
        future = self._opening.get(shard)
        if future is None or (future.done() and isinstance(future.exception(), CacheFullError)):
            self._opening[shard] = self._pool.submit(self._index.open, shard)

    def _finish(self, shard: int, needed: set[int]) -> OpenShard:
        try:
            return self._opening[shard].result()
        except CacheFullError:
            # What is open for later steps makes room for what this one needs; then others may.
            self._close_all_but(needed)
            opened: Future[OpenShard] = Future()
            opened.set_result(self._index.open(shard, wait_seconds=WAIT_SECONDS))
            self._opening[shard] = opened
            return opened.result()

    def _close_all_but(self, kept: set[int]) -> None:
        for shard in self._opening.keys() - kept:
            future = self._opening.pop(shard)
            if not future.cancel() and future.exception() is None:
                future.result().close()
