"""Batches of a rank, read ahead of the loop by a thread."""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from training.data.assembly import BatchAssembler
from training.data.batch import Buffers, PackedBatch
from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.window import ShardWindow


class BatchReader:
    """Iterates over a rank's micro-batches of `steps`, `num_micro_batches` for each step.

    A rank takes one stretch of each global batch and cuts it into its micro-batches. Use as a context manager:
    leaving it stops the thread. Errors of the thread, such as a tar that was cut short, are raised by the iterator.
    """

    def __init__(
        self,
        plan: Plan,
        index: FeatureIndex,
        assembler: BatchAssembler,
        *,
        steps: range,
        rank: int,
        num_ranks: int,
        num_micro_batches: int = 1,
        prefetch_batches: int = 2,
        is_pinned: bool = False,
    ) -> None:
        assert plan.batch_size % (num_ranks * num_micro_batches) == 0
        self._plan = plan
        self._index = index
        self._assembler = assembler
        self._steps = steps
        num_samples = plan.batch_size // (num_ranks * num_micro_batches)
        starts = [(rank * num_micro_batches + i) * num_samples for i in range(num_micro_batches)]
        self._positions = [range(start, start + num_samples) for start in starts]
        self._free: queue.SimpleQueue[Buffers | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[PackedBatch, Buffers] | BaseException | None] = queue.SimpleQueue()
        # One batch in the loop's hands, one being filled, the others ready.
        for _ in range(prefetch_batches + 2):
            self._free.put(Buffers(is_pinned=is_pinned))
        self._thread = threading.Thread(target=self._read_ahead, name="reader", daemon=True)
        self._is_closed = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        # The thread may be waiting for a download.
        self._index.stop()
        self._free.put(None)
        self._thread.join()

    def __iter__(self) -> Iterator[PackedBatch]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, buffers = item
            yield batch
            self._free.put(buffers)

    def _read_ahead(self) -> None:
        positions = range(self._positions[0].start, self._positions[-1].stop)
        try:
            with ShardWindow(self._plan, self._index, steps=self._steps, positions=positions) as window:
                for _ in self._steps:
                    planned, shards = window.advance()
                    for part in self._positions:
                        buffers = self._free.get()
                        if buffers is None or self._is_closed:
                            return
                        self._ready.put((self._assembler.assemble(buffers, planned, part, shards), buffers))
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001  the loop's thread raises it
            self._ready.put(error)
