"""The worker: captions and judges pieces of raw shards, one row per sample, rejected ones too."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from captioning.canary import check_engine, is_worth_showing
from captioning.config import CaptioningConfig, QualityConfig
from captioning.engine import Caption, CaptionEngine
from captioning.loading import LoadedSample, ShardLoader
from captioning.quality import judge
from captioning.table import count_flags, join_files, write_rows
from pipelines.images import SampleReject
from pipelines.pieces import Piece, PieceReport
from pipelines.shards import RawSample, open_shard
from pipelines.storage import atomic_file


@dataclass(frozen=True, kw_only=True)
class CaptionWorkerConfig:
    """What a worker process needs to know.

    Attributes:
        num_threads: for the model's arithmetic on a CPU.
        run: where the headers of the shards are remembered; None reads them from the tars.
    """

    captioning: CaptioningConfig
    dialect: str
    max_pixels: int
    num_threads: int
    run: Path | None = None


class CaptionWorker:
    """Captions pieces of raw shards; makes `<shard>.parquet`."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, config: CaptionWorkerConfig) -> None:
        # The engine brings torch and transformers, which the driver never needs.
        from captioning.transformers_engine import TransformersEngine

        self._config = config
        self._settings = config.captioning
        self._engine: CaptionEngine = TransformersEngine(config.captioning, num_threads=config.num_threads)
        self._is_checked = False

    def __call__(self, piece: Piece) -> PieceReport:
        """Caption the samples of a piece.

        Raises:
            CanaryError: on the first piece, if the model ignores the image or the batch changes its captions.
        """
        start_seconds = time.monotonic()
        rows: list[dict[str, Any]] = []
        source, run = piece.source, self._config.run
        with open_shard(source.path, self._config.dialect, run=run, identity=source.identity) as raw:
            loader = ShardLoader(raw, self._settings, self._engine, max_pixels=self._config.max_pixels)
            self._check_engine(loader, raw.samples[piece.start : piece.stop])
            for start, stop in piece.slices():
                rows += self._caption_slice(loader, raw.samples[start:stop])
            # Of the tar as a whole: told once, by the first piece.
            faults = {"unusable_members": len(raw.unusable), "damaged_tars": int(raw.fault is not None)}
            faults = {name: count for name, count in faults.items() if count and piece.start == 0}
        with atomic_file(piece.output(".parquet")) as path:
            write_rows(rows, path, quality=self._settings.quality)
        rejected = Counter(row["reject"] for row in rows if row["reject"] is not None)
        details = {"num_tokens": sum(row.get("num_tokens", 0) for row in rows), **count_flags(rows)}
        return PieceReport(
            num_read=len(rows),
            num_kept=len(rows) - rejected.total(),
            rejected=dict(rejected),
            details=details | faults,
            wait_seconds=loader.wait_seconds,
            busy_seconds=time.monotonic() - start_seconds - loader.wait_seconds,
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Concatenate the parts of a shard."""
        join_files([part[".parquet"] for part in parts], outputs[".parquet"])

    def _check_engine(self, loader: ShardLoader, samples: Sequence[RawSample]) -> None:
        if self._is_checked:
            return
        for sample in samples:
            try:
                request = loader.request(sample, loader.alt_text(sample))
            except SampleReject:
                continue
            if is_worth_showing(request.image):
                check_engine(self._engine, request.image, self._settings.prompts["default"])
                self._is_checked = True
                return

    def _caption_slice(self, loader: ShardLoader, samples: Sequence[RawSample]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        captions = iter(self._engine.caption(_take_prepared(loader.load(samples), rows=rows)))
        finished = [
            row if row["reject"] is not None else _finish_row(row, next(captions), self._settings.quality)
            for row in rows
        ]
        assert len(rows) == len(samples) and next(captions, None) is None, "one row per sample, one caption per image"
        return finished


def _take_prepared(samples: Iterable[LoadedSample], *, rows: list[dict[str, Any]]) -> Iterator[Any]:
    """Note every sample's row, and yield what goes to the engine."""
    for sample in samples:
        rows.append(sample.row)
        if sample.row["reject"] is None:
            yield sample.prepared


def _finish_row(row: Mapping[str, Any], caption: Caption, quality: QualityConfig) -> dict[str, Any]:
    judged = judge(caption.text, finish_reason=caption.finish_reason, alt_text=row["alt_text"], quality=quality)
    return {
        **row,
        "caption_raw": caption.text,
        "num_tokens": caption.num_tokens,
        "finish_reason": caption.finish_reason,
        **judged,
    }
