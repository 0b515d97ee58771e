"""What draws images in a worker process: batches of requests to PNG files, and the rows of `samples.parquet`."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from pipelines.engine.pieces import Piece, PieceReport
from pipelines.store.files import atomic_file
from pipelines.store.manifest import Fingerprint
from pipelines.store.tables import MEND_PART, read_table
from sampling.compiled_shapes import compiled_shapes, compiles_decoder
from sampling.config import SamplingConfig
from sampling.images import is_written, write_image, write_map
from sampling.renderer import Drawing, Renderer
from sampling.requests import ImageRequest
from sampling.text_encoding import load_texts, text_id
from sampling.trained_model import TrainedModel

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("file", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("lost_words", pa.string()),
        ("control_map", pa.string()),
    ]
)
# The prompts of so many images are encoded at once; T5-XXL gives 1 MB for 120 tokens.
TEXTS_AHEAD = 1024
NUM_PNG_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class SampleWorkerConfig:
    """What a `SampleWorker` needs: all requests of the job in the order of work, and where their images go.

    `lost_words` are what the text encoder does not read of a prompt that is too long.
    """

    sampling: SamplingConfig
    trained: TrainedModel
    requests: tuple[ImageRequest, ...]
    fingerprint: Fingerprint
    folder: Path
    lost_words: Mapping[str, str] = field(default_factory=dict)


class SampleWorker:
    """Draws the images of a piece that are missing; one table row per image, in the order of prompts.

    Prompts are encoded before the first image that needs them, and the encoder is freed before anything is denoised.
    The transformer is loaded after it, and kept.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, config: SampleWorkerConfig) -> None:
        self._config = config
        self._texts: Mapping[str, Tensor] = {}
        self._renderer: Renderer | None = None

    def __call__(self, piece: Piece) -> PieceReport:
        """Draw images [piece.start, piece.stop) of the job and write their rows."""
        with ThreadPoolExecutor(max_workers=NUM_PNG_THREADS) as pool:
            writer = _Writer(self, pool)
            try:
                for start, stop in piece.slices():
                    for batch in self._pending(start, stop):
                        writer.take(self._draw(batch, piece, start=start), batch)
            finally:
                writer.finish()
        requests = self._config.requests[piece.start : piece.stop]
        with atomic_file(piece.output(".parquet")) as path:
            _write_rows(path, [self._row(request) for request in requests])
        return PieceReport(num_read=len(requests), num_kept=len(requests))

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Put the rows of all parts into one table, in the order of prompts."""
        rows = [row for part in parts for row in read_table(part[".parquet"], mend=MEND_PART).to_pylist()]
        _write_rows(outputs[".parquet"], rows)

    def missing(self, batch: Sequence[ImageRequest]) -> list[bool]:
        """Whether each image of a batch is not there; what is there stays."""
        return [not self._has(request) for request in batch]

    def write(self, image: Image.Image, request: ImageRequest) -> None:
        """Write an image's file."""
        assert self._renderer is not None
        write_image(
            self._config.folder,
            image,
            request,
            fingerprint=self._config.fingerprint,
            computed_in=self._renderer.computed_in,
            adapters=self._config.trained.adapters,
        )

    def _pending(self, start: int, stop: int) -> Iterator[list[ImageRequest]]:
        """Yield the batches of a slice that lack an image.

        They are drawn whole, so that an image's bytes do not tell whether an earlier run was killed in its batch.
        """
        for _, group in groupby(self._config.requests[start:stop], key=lambda item: item.shape):
            batch = list(group)
            if not all(map(self._has, batch)):
                yield batch

    def _row(self, request: ImageRequest) -> dict[str, Any]:
        lost = self._config.lost_words.get(request.prompt)
        return {name: getattr(request, name, None) for name in SCHEMA.names} | {"lost_words": lost}

    def _has(self, request: ImageRequest) -> bool:
        return is_written(self._config.folder, request, fingerprint=self._config.fingerprint)

    def _draw(self, batch: Sequence[ImageRequest], piece: Piece, *, start: int) -> Drawing:
        sampling, trained = self._config.sampling, self._config.trained
        if trained.text is not None and not all(text_id(request, sampling) in self._texts for request in batch):
            self._texts = load_texts(self._upcoming(piece, start), sampling, trained.text)
        self._renderer = self._renderer or Renderer(
            sampling,
            trained,
            compiled_shapes=compiled_shapes(sampling, self._config.requests),
            compiles_decoder=compiles_decoder(sampling, self._config.requests),
        )
        drawing = self._renderer.draw(batch, self._texts)
        for request in batch:
            if request.control is not None:  # before its image, which is not there without
                picture = self._renderer.control_picture(request)
                write_map(self._config.folder, picture, request, fingerprint=self._config.fingerprint)
        return drawing

    def _upcoming(self, piece: Piece, start: int) -> list[ImageRequest]:
        """Return the images to encode prompts for: all of a small job, as other pieces will follow, else the next."""
        stop = min(start + TEXTS_AHEAD, piece.stop)
        if len(self._config.requests) <= TEXTS_AHEAD:
            start, stop = 0, len(self._config.requests)
        size = piece.samples_per_slice
        batches = (
            batch for first in range(start, stop, size) for batch in self._pending(first, min(first + size, stop))
        )
        return [request for batch in batches for request in batch]


class _Writer:
    """Writes a batch while the next is drawn: a GPU is waited for when it has that one already."""

    def __init__(self, worker: SampleWorker, pool: ThreadPoolExecutor) -> None:
        self._worker, self._pool = worker, pool
        self._drawn: tuple[Drawing, list[ImageRequest]] | None = None
        self._writes: list[Future[None]] = []

    def take(self, drawing: Drawing, batch: list[ImageRequest]) -> None:
        """Write the batch before this one, and this one if it is there already."""
        former, self._drawn = self._drawn, (drawing, batch)
        self._write(former)
        if drawing.is_there:
            self._drawn = None
            self._write((drawing, batch))

    def finish(self) -> None:
        """Write what is left, and wait for all files."""
        former, self._drawn = self._drawn, None
        self._write(former)
        self._wait()

    def _write(self, drawn: tuple[Drawing, list[ImageRequest]] | None) -> None:
        if drawn is None:
            return
        drawing, batch = drawn
        images = drawing.images()
        self._wait()
        rows = zip(images, batch, self._worker.missing(batch), strict=True)
        self._writes = [
            self._pool.submit(self._worker.write, image, request) for image, request, lacks in rows if lacks
        ]

    def _wait(self) -> None:
        for write in self._writes:
            write.result()
        self._writes = []


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["number"])
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
