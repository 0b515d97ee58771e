"""How a piece is written: sample by sample, or what is made of a slice in a thread while the device makes the next."""

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelines.engine.pieces import Piece, PieceReport
from pipelines.engine.rejects import NOT_CHOSEN, is_wanted
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard, open_shard
from pipelines.store.families import FamilySchema
from pipelines.store.feature_store import FeatureTarWriter, write_index
from pipelines.store.files import atomic_file


@dataclass(frozen=True, kw_only=True)
class SampleToWrite:
    """A sample of a raw shard, the tar that its features go to, and its index row, which is filled in."""

    raw: RawShard
    sample: RawSample
    tar: FeatureTarWriter
    row: dict[str, Any]


def write_samples(
    piece: Piece,
    store: Callable[[SampleToWrite], None],
    *,
    family: FamilySchema,
    reading: Reading,
    run: Path,
    row: Mapping[str, Any],
) -> PieceReport:
    """Write the tar and index of samples [piece.start, piece.stop): a member of each that is kept, a row of each.

    Args:
        piece: of a raw shard.
        store: writes a sample; raises `SampleReject` for one that it cannot.
        family: columns of the index.
        reading: how the shard's samples are read.
        run: where headers of tars are remembered.
        row: what all rows begin with.
    """
    rows: list[dict[str, Any]] = []
    with (
        open_shard(piece.source.path, reading, run=run) as raw,
        atomic_file(piece.output(".tar")) as tar_path,
        FeatureTarWriter(tar_path) as tar,
    ):
        for start, stop in piece.slices():
            for index, sample in enumerate(raw.samples[start:stop], start):
                reject = sample.reject if is_wanted(piece, index) else NOT_CHOSEN
                rows.append({"key": sample.key, "shard": raw.name, **row, "reject": reject})
                try:
                    if reject is None:
                        store(SampleToWrite(raw=raw, sample=sample, tar=tar, row=rows[-1]))
                except SampleReject as reject:
                    rows[-1]["reject"] = reject.reason
    with atomic_file(piece.output(".parquet")) as index_path:
        write_index(index_path, rows, family.columns)
    rejected = Counter(row["reject"] for row in rows if row["reject"] is not None)
    return PieceReport(num_read=len(rows), num_kept=len(rows) - rejected.total(), rejected=dict(rejected))


class SliceWriter:
    """Runs functions one after the other in a thread of its own; at most one is running or waiting.

    Use as a context manager: left without an error, all is done. What a function raises is raised when the next one is
    handed over, or at the end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._before: Future[None] | None = None

    def write(self, function: Callable[[], None]) -> None:
        """Have a function run when the one before is done; waits for that one, so that slices do not pile up."""
        self._wait()
        self._before = self._thread.submit(function)

    def _wait(self) -> None:
        if self._before is not None:
            self._before.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The files it writes are closed next.
        self._thread.shutdown()
        if kind is None:
            self._wait()
