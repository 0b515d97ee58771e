"""The worker: captions and judges pieces of raw shards, one row per sample, rejected ones too."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from captioning.canary import CanaryError, RefusedProbeError, check_engine, is_worth_showing
from captioning.config import CaptioningConfig
from captioning.earlier import read_earlier
from captioning.engines.protocol import CaptionEngine
from captioning.given.addresses import MAIN_COLUMN
from captioning.given.loader import ALT_TEXT_FAULT, GivenColumn, GivenEngine, GivenLoader, GivenTexts
from captioning.loading import SampleLoader, ShardLoader
from captioning.slices import SliceCaptioner
from captioning.table import count_flags, join_files, write_rows
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard, open_shard
from pipelines.store.files import atomic_file

# One image may be refused for its own sake; so many in a row, before any has a caption, are refused by a wrong setting.
MAX_REFUSED_PROBES = 3


@dataclass(frozen=True, kw_only=True)
class CaptionWorkerConfig:
    """What a worker process needs to know.

    Attributes:
        num_threads: for the model's arithmetic on a CPU.
        gpu_share: the part of a GPU that is the worker's alone, at most 1; 0 where nobody knows how many share it.
        settings: those of `earlier.UPDATABLE`, which each file carries.
        run: where the headers of the shards are remembered; None reads them from the tars.
        given: the columns of captions that no model makes, and where their texts are.
        earlier: the folder of the captions that are kept, and only completed.
        api_key: of the server, from the driver's environment; it is in no file.
    """

    captioning: CaptioningConfig
    reading: Reading
    max_pixels: int
    num_threads: int
    gpu_share: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    given: tuple[GivenColumn, ...] = ()
    earlier: Path | None = None
    api_key: str = field(default="", repr=False)


class CaptionWorker:
    """Captions pieces of raw shards; makes `<shard>.parquet`."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, config: CaptionWorkerConfig) -> None:
        self._config = config
        self._settings = config.captioning
        # Either an engine, or texts that are there.
        self._texts = GivenTexts(config.given) if config.captioning.is_given else None
        self._engine = _load_engine(config) if self._texts is None else None
        self._scorer = None
        if config.captioning.clip_model is not None:
            from captioning.clip_score import ClipScorer

            self._scorer = ClipScorer(config.captioning)
        self._slices = SliceCaptioner(config.captioning, self._engine or GivenEngine(), self._scorer)
        self._is_checked = False
        self._num_refused_probes = 0

    def __call__(self, piece: Piece) -> PieceReport:
        """Caption the samples of a piece.

        Raises:
            CanaryError: on the first piece, if the model ignores the image or the batch changes its captions, or if
                the first `MAX_REFUSED_PROBES` images are refused.
        """
        start_seconds = time.monotonic()
        rows: list[dict[str, Any]] = []
        source, run = piece.source, self._config.run
        with open_shard(source.path, self._config.reading, run=run, identity=source.identity) as raw:
            loader = self._open_loader(raw)
            if isinstance(loader, ShardLoader):
                self._check_engine(loader, raw.samples[piece.start : piece.stop])
            earlier = read_earlier(self._config.earlier, raw.name)
            for start, stop in piece.slices():
                samples = raw.samples[start:stop]
                if earlier is None:
                    rows += self._slices.caption(loader, samples)
                    continue
                is_scored = earlier.settings["clip_model"] == self._config.settings["clip_model"]
                rows += self._slices.update(loader, samples, earlier.rows[start:stop], is_scored=is_scored)
            # Of the tar as a whole: told once, by the first piece.
            faults = {
                "unusable_members": len(raw.unusable),
                "stray_members": len(raw.strays),
                "damaged_tars": int(raw.fault is not None),
            }
            faults = {name: count for name, count in faults.items() if count and piece.start == 0}
        faults |= self._count_cut([row["caption_raw"] for row in rows if row.get("clip_score") is not None])
        others = [column.name for column in self._config.given if column.name != MAIN_COLUMN]
        with atomic_file(piece.output(".parquet")) as path:
            write_rows(rows, path, quality=self._settings.quality, settings=self._config.settings, others=others)
        rejected = Counter(row["reject"] for row in rows if row["reject"] is not None)
        details = {"num_tokens": sum(row.get("num_tokens") or 0 for row in rows), **count_flags(rows)}
        return PieceReport(
            num_read=len(rows),
            num_kept=len(rows) - rejected.total(),
            rejected=dict(rejected),
            details=details | faults | _count_missing(rows, others),
            wait_seconds=loader.wait_seconds,
            busy_seconds=time.monotonic() - start_seconds - loader.wait_seconds,
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Concatenate the parts of a shard."""
        join_files([part[".parquet"] for part in parts], outputs[".parquet"])

    def _open_loader(self, raw: RawShard) -> SampleLoader:
        look = self._scorer.prepare if self._scorer is not None else None
        max_pixels = self._config.max_pixels
        if self._texts is not None:
            return GivenLoader(raw, self._settings, self._texts, max_pixels=max_pixels, look=look)
        assert self._engine is not None, "an engine, or texts that are there"
        return ShardLoader(raw, self._settings, self._engine, max_pixels=max_pixels, look=look)

    def _count_cut(self, captions: Sequence[str]) -> dict[str, int]:
        """Return how much of the scored captions CLIP does not read, as details of the piece."""
        if self._scorer is None:
            return {}
        cut = self._scorer.count_cut(captions)
        return {
            "max_clip_tokens": cut.max_tokens,
            "clip_captions": cut.num_texts,
            "clip_captions_cut": cut.num_cut,
            "clip_tokens": cut.num_tokens,
            "clip_tokens_cut": cut.num_tokens_cut,
        }

    def _check_engine(self, loader: ShardLoader, samples: Sequence[RawSample]) -> None:
        """Look at the first image that tells something; a piece without one leaves the look to the next."""
        if self._is_checked or self._engine is None:
            return
        for sample in samples:
            try:
                request = loader.request(sample, loader.text(sample))
            except SampleReject:
                continue
            if not is_worth_showing(request.image):
                continue
            try:
                check_engine(self._engine, request.image, self._settings.prompts["default"])
            except RefusedProbeError as error:
                self._num_refused_probes += 1
                if self._num_refused_probes == MAX_REFUSED_PROBES:
                    raise CanaryError(f"the first {MAX_REFUSED_PROBES} images are refused, the last: {error}") from None
                continue
            self._is_checked = True
            return


def _count_missing(rows: Sequence[Mapping[str, Any]], others: Sequence[str]) -> dict[str, int]:
    """Return, as details, how many captioned samples lack a column, and how many alt texts nobody can read."""
    kept = [row for row in rows if row["reject"] is None]
    counts = {f"num_without_{name}": sum(not row.get(name) for row in kept) for name in others}
    if others:
        counts[f"num_without_{MAIN_COLUMN}"] = sum(not row["caption_raw"] for row in kept)
    counts["num_unreadable_alt_texts"] = sum(ALT_TEXT_FAULT in row for row in rows)
    return {name: count for name, count in counts.items() if count}


def _load_engine(config: CaptionWorkerConfig) -> CaptionEngine:
    # Each brings libraries that the driver, or the others, never need.
    if config.captioning.engine == "openai":
        from captioning.engines.openai_engine import OpenAIEngine

        return OpenAIEngine(config.captioning, api_key=config.api_key)
    if config.captioning.engine == "vllm":
        from captioning.engines.vllm_engine import VllmEngine

        return VllmEngine(config.captioning)
    if config.captioning.engine == "generate":
        from captioning.engines.generate_engine import GenerateEngine

        return GenerateEngine(config.captioning, num_threads=config.num_threads)
    from captioning.engines.transformers_engine import TransformersEngine

    return TransformersEngine(config.captioning, num_threads=config.num_threads, gpu_share=config.gpu_share)
