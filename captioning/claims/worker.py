"""The worker: asks claims of captions back about their images, one row per sample, rejected ones too."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from captioning.claims.asking import ClaimAsker, Supports
from captioning.claims.loading import load_asker
from captioning.claims.sources import read_texts, split_identity, text_of
from captioning.claims.splitting import Claim, split_claims
from captioning.claims.table import asked_digest, join_files, marked, read_answers, write_rows
from captioning.config import CaptioningConfig
from captioning.loading import LoadedSample, SampleLoader
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.images import SampleReject, decode_image
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard, open_shard
from pipelines.store.files import atomic_file

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ClaimWorkerConfig:
    """What a worker process needs to know.

    Attributes:
        captioning: the table `[captioning]` with what its claims say laid over it.
        num_threads: for the model's arithmetic on a CPU.
        run: where the headers of the shards are remembered.
        captions: the folder of the captions, and their `column`.
        output: the folder that finished shards are in, whose answers may still hold.
        asked: digest of what is asked of whom, the threshold left out.
        api_key: of the server, from the driver's environment; it is in no file.
    """

    captioning: CaptioningConfig
    reading: Reading
    max_pixels: int
    num_threads: int
    run: Path
    captions: Path
    column: str
    output: Path
    asked: str
    api_key: str = field(default="", repr=False)


class ClaimWorker:
    """Asks about pieces of raw shards; makes `<shard>.parquet`. The model is loaded with the first question."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, config: ClaimWorkerConfig) -> None:
        self._config = config
        self._asker: ClaimAsker | None = None

    def __call__(self, piece: Piece) -> PieceReport:
        """Ask about the captions of a piece.

        Raises:
            UserError: its captions are not those of the manifest, or the model or server cannot be used.
        """
        start_seconds = time.monotonic()
        config, source = self._config, piece.source
        raw_identity, captions_sha256 = split_identity(source.identity)
        texts = read_texts(config.captions / f"{source.name}.parquet", config.column, sha256=captions_sha256)
        asked = asked_digest(config.asked, raw=raw_identity, texts=texts.columns)
        answers = read_answers(config.output / f"{source.name}.parquet", asked=asked)
        rows: list[Row] = []
        wait_seconds = 0.0
        if answers is not None:
            threshold = config.captioning.claims.threshold
            rows = [_marked_again(row, threshold=threshold) for row in answers[piece.start : piece.stop]]
        else:
            with open_shard(source.path, config.reading, run=config.run, identity=raw_identity) as raw:
                loader = ClaimLoader(raw, config, texts.by_key(raw), self._load())
                for start, stop in piece.slices():
                    rows += self._ask(loader, raw.samples[start:stop])
                wait_seconds = loader.wait_seconds
        with atomic_file(piece.output(".parquet")) as path:
            write_rows(rows, path, asked=asked)
        rejected = Counter(row["reject"] for row in rows if row["reject"] is not None)
        return PieceReport(
            num_read=len(rows),
            num_kept=len(rows) - rejected.total(),
            rejected=dict(rejected),
            details=_details(rows, threshold=config.captioning.claims.threshold),
            wait_seconds=wait_seconds,
            busy_seconds=time.monotonic() - start_seconds - wait_seconds,
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Concatenate the parts of a shard."""
        join_files([part[".parquet"] for part in parts], outputs[".parquet"])

    def _load(self) -> ClaimAsker:
        if self._asker is None:
            config = self._config
            self._asker = load_asker(config.captioning, api_key=config.api_key, num_threads=config.num_threads)
        return self._asker

    def _ask(self, loader: "ClaimLoader", samples: Sequence[RawSample]) -> list[Row]:
        rows: list[Row] = []

        def prepared() -> Iterator[Any]:
            for sample in loader.load(samples):
                rows.append(sample.row)
                if sample.prepared is not None:
                    yield sample.prepared

        supports = iter(self._load().supports(prepared()))
        finished = [self._finish(row, supports) for row in rows]
        assert len(finished) == len(samples) and next(supports, None) is None, "one row per sample"
        return finished

    def _finish(self, row: Row, supports: Iterator[Supports]) -> Row:
        claims: list[Claim] | None = row.pop("claims")
        if row["reject"] is not None or claims is None:
            return row
        found = next(supports) if claims else []
        threshold = self._config.captioning.claims.threshold
        return row | marked([claim.sentence for claim in claims], found, threshold=threshold)


class ClaimLoader(SampleLoader):
    """Loads samples with what their captions claim."""

    def __init__(
        self,
        raw: RawShard,
        config: ClaimWorkerConfig,
        texts: dict[str, tuple[str | None, str | None]],
        asker: ClaimAsker,
    ) -> None:
        super().__init__(raw, config.captioning, max_pixels=config.max_pixels)
        self._asker = asker
        self._claims = config.captioning.claims
        self._texts = texts

    def _load_group(self, samples: Sequence[RawSample]) -> list[LoadedSample]:
        return [self._load_one(sample) for sample in samples]

    def _load_one(self, sample: RawSample) -> LoadedSample:
        text, reject = text_of(sample, self._texts)
        row: Row = {"key": sample.key, "claims": None, "reject": reject}
        if reject is not None:
            return LoadedSample(row=row, prepared=None, look=None)
        claims = split_claims(text or "", split=self._claims.split)
        if not claims:
            return LoadedSample(row=row | {"claims": claims}, prepared=None, look=None)
        try:
            image = decode_image(self._raw.image_bytes(sample), max_pixels=self._max_pixels)
            self.require_limits(*image.size)
        except SampleReject as found:
            return LoadedSample(row=row | {"reject": found.reason}, prepared=None, look=None)
        questions = [self._claims.question.format(claim=claim.text) for claim in claims]
        return LoadedSample(row=row | {"claims": claims}, prepared=self._asker.prepare(image, questions), look=None)


def _marked_again(row: Row, *, threshold: float) -> Row:
    if row["reject"] is not None:
        return row
    return row | marked(row["claim_sentences"], row["claim_supports"], threshold=threshold)


def _details(rows: Sequence[Row], *, threshold: float) -> dict[str, int]:
    """Count claims, those nobody knows of, those without support, and captions that claim nothing."""
    kept = [row for row in rows if row["reject"] is None]
    return {
        "num_claims": sum(row["num_claims"] for row in kept),
        "num_unknown_claims": sum(row["num_unknown"] for row in kept),
        "num_unsupported_claims": sum(
            support is not None and support < threshold for row in kept for support in row["claim_supports"]
        ),
        "num_captions_without_claims": sum(row["num_claims"] == 0 for row in kept),
    }
