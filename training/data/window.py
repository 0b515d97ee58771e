"""The shards of the next steps: those of a step are held open, those of later steps are fetched while it trains."""

import random
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from training.data.cache import CacheFullError
from training.data.index import FeatureIndex, OpenShard
from training.data.plan import Plan, PlannedBatch

NUM_FETCHING_THREADS = 8
NUM_STEPS_AHEAD = 32
# How long to wait for other ranks to close what is in a full cache.
WAIT_SECONDS = 60.0
MAX_PAUSE_SECONDS = 0.5


class ShardWindow:
    """Gives each step its planned batch and open shards, and fetches those of the steps to come.

    What is fetched ahead lies in the cache without being held, so that no rank keeps another from what it needs now.

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
        self._fetching: dict[int, Future[None]] = {}
        self._open: dict[int, OpenShard] = {}
        self._pool = ThreadPoolExecutor(NUM_FETCHING_THREADS, thread_name_prefix="shards")

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
            CacheFullError: the cache cannot hold this step's shards, though other ranks had time to make room.
            MissingFileError, UserError, StorageError: a shard's file cannot be used; names it.
        """
        while len(self._planned) <= NUM_STEPS_AHEAD and (step := next(self._upcoming, None)) is not None:
            planned = self._plan.batch(step)
            self._planned.append((planned, set(planned.shards[self._positions].tolist())))
        coming = [shard for _, shards in self._planned for shard in sorted(shards)]
        planned, needed = self._planned.popleft()
        self._close_all_but(needed)
        self._fetching = {shard: future for shard, future in self._fetching.items() if shard in coming}
        for shard in coming:
            self._fetch(shard)
        self._open_all(needed)
        return planned, self._open

    def _open_all(self, needed: set[int]) -> None:
        """Open the shards of a step. Nothing is held while waiting for room, so ranks cannot wait for each other."""
        deadline_seconds = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                for shard in sorted(needed - self._open.keys()):
                    # Its error, if there was one, comes again; but a full cache may have room by now.
                    self._fetching[shard].exception()
                    self._open[shard] = self._index.open(shard)
                return
            except CacheFullError:
                self._close_all_but(set())
                if time.monotonic() > deadline_seconds:
                    raise
                time.sleep(random.uniform(0.0, MAX_PAUSE_SECONDS))

    def _fetch(self, shard: int) -> None:
        """Fetch a shard in the background, once; again if there was no room for it."""
        future = self._fetching.get(shard)
        if future is None or (future.done() and isinstance(future.exception(), CacheFullError)):
            self._fetching[shard] = self._pool.submit(self._index.fetch, shard)

    def _close_all_but(self, kept: set[int]) -> None:
        for shard in self._open.keys() - kept:
            self._open.pop(shard).close()
