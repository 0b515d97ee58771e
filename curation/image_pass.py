"""One pass over the images of a shard: each is read and decoded once, for all scores that are pending."""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from curation.score_files import rejects_of, rows_of, write_rows
from curation.scores.protocol import REJECT, ImageScore, LoadedImage
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.images import SampleReject, decode_image
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard, open_shard
from pipelines.store.files import atomic_file
from pipelines.store.tables import MEND_PART, read_table

# Between a score and its column, in the files of a pass; in neither name.
OF = "/"
# Images that a thread takes at a time: handing over one costs as much as looking at a small one.
IMAGES_TOGETHER = 4


@dataclass(frozen=True, kw_only=True)
class ImagePassConfig:
    """What a worker process needs to know.

    Attributes:
        num_threads: that read, decode and look.
        run: where the headers of the shards are remembered.
    """

    scores: tuple[ImageScore, ...]
    reading: Reading
    max_pixels: int
    num_threads: int
    run: Path


# Of one sample: why it is rejected before any score sees it, and what each score keeps of it, or says against it.
Looks = tuple[str | None, list[Any]]


class ImagePassWorker:
    """Makes `<shard>.parquet` with `key`, `reject` and `<score>/<column>`, which is then dealt out to the scores."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, config: ImagePassConfig) -> None:
        self._config = config

    def __call__(self, piece: Piece) -> PieceReport:
        """Measure the images of a piece."""
        start_seconds = time.monotonic()
        tables, wait_seconds = [], 0.0
        source, config = piece.source, self._config
        with (
            open_shard(source.path, config.reading, run=config.run, identity=source.identity) as raw,
            ThreadPoolExecutor(config.num_threads, thread_name_prefix="decode") as pool,
        ):
            # Asked for beside the loop, so that looking ahead does not count as done.
            slices = [raw.samples[start:stop] for start, stop in replace(piece, on_slice=None).slices()]
            ahead = self._look_ahead(pool, raw, slices)
            for samples, _ in zip(slices, piece.slices(), strict=True):
                began = time.monotonic()
                looks = list(itertools.chain.from_iterable(future.result() for future in next(ahead)))
                wait_seconds += time.monotonic() - began
                tables.append(self._measure([sample.key for sample in samples], looks))
        table = pa.concat_tables(tables) if tables else self._measure([], [])
        with atomic_file(piece.output(".parquet")) as path:
            write_rows([table], path)
        rejected = rejects_of(table)
        num_rejected = sum(rejected.values())
        return PieceReport(
            num_read=table.num_rows,
            num_kept=table.num_rows - num_rejected,
            rejected=rejected,
            wait_seconds=wait_seconds,
            busy_seconds=time.monotonic() - start_seconds - wait_seconds,
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Concatenate the parts of a shard."""
        write_rows([read_table(part[".parquet"], mend=MEND_PART) for part in parts], outputs[".parquet"])

    def _look_ahead(
        self, pool: ThreadPoolExecutor, raw: RawShard, slices: Iterable[Sequence[RawSample]]
    ) -> Iterator[list[Future[list[Looks]]]]:
        """Yield the looks at each slice, under way; those at the next one are begun before the last one is measured."""
        waiting: deque[list[Future[list[Looks]]]] = deque()
        for samples in slices:
            groups = [samples[start : start + IMAGES_TOGETHER] for start in range(0, len(samples), IMAGES_TOGETHER)]
            waiting.append([pool.submit(self._look_at, raw, group) for group in groups])
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    def _look_at(self, raw: RawShard, samples: Sequence[RawSample]) -> list[Looks]:
        return [self._look(raw, sample) for sample in samples]

    def _look(self, raw: RawShard, sample: RawSample) -> Looks:
        if sample.reject is not None:
            return sample.reject, []
        try:
            data = raw.image_bytes(sample)
            loaded = LoadedImage(
                key=sample.key, data=data, image=decode_image(data, max_pixels=self._config.max_pixels)
            )
        except SampleReject as reject:
            return reject.reason, []
        looks: list[Any] = []
        for score in self._config.scores:
            try:
                looks.append(score.look(loaded))
            except SampleReject as reject:
                looks.append(reject)
        return None, looks

    def _measure(self, keys: Sequence[str], looks: Sequence[Looks]) -> pa.Table:
        """Return the rows of a slice, of all scores beside each other."""
        of_pass = [reason for reason, _ in looks]
        columns: dict[str, Any] = {"key": pa.array(keys, pa.string()), REJECT: pa.array(of_pass, pa.string())}
        for index, score in enumerate(self._config.scores):
            seen = [found[index] if reason is None else None for reason, found in looks]
            reasons = [
                look.reason if isinstance(look, SampleReject) else reason
                for reason, look in zip(of_pass, seen, strict=True)
            ]
            kept = [look for reason, look in zip(reasons, seen, strict=True) if reason is None]
            rows = rows_of(score, keys, reasons, score.measure(kept) if kept else {})
            columns |= {f"{score.name}{OF}{name}": rows[name] for name in rows.column_names if name != "key"}
        return pa.table(columns)
