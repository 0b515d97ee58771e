"""The worker of the latent family: images of a raw shard decoded ahead, cropped, encoded, and written as latents.

While a GPU encodes a batch, the next one is decoded, and the latents of the one before come back.
"""

# B batch, C latent channels, H W pixels, h w latent height and width

import contextlib
import functools
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from encoders.batches import Batches
from encoders.devices import choose_device
from encoders.opening import open_codec
from encoders.transfers import one_behind
from features.cropping import Cropping, CutImage, geometry
from features.imported_files import FeatureFiles, FeaturePlaces, open_files
from features.overflow import NON_FINITE_LATENT
from features.preview import write_preview
from features.writer import SliceWriter
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.engine.rejects import NOT_CHOSEN, is_wanted
from pipelines.raw.images import SOFT_SCALE, SampleReject
from pipelines.raw.reading import Reading
from pipelines.raw.shards import RawShard, open_shard
from pipelines.recipe import TableConfig
from pipelines.store.families import latent_schema
from pipelines.store.feature_store import FeatureTarWriter, join_shards, write_index
from pipelines.store.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

# In a report's `details`, where there are any: images that were scaled up so far that they are soft.
NUM_SOFT = "num_soft"
MAX_DECODE_THREADS = 16
# Pixels keep a GPU busy, not images: with fewer it waits for launches, and more of them take memory alone.
CPU_BATCH_SIZE, GPU_BATCH_PIXELS = 32, 16 * 512**2


@dataclass(frozen=True, kw_only=True)
class LatentWorkerConfig:
    """What a `LatentWorker` needs; it writes `preview_path` when it comes by the start of `preview_shard`.

    Attributes:
        family: that it makes; `leads` as `FamilySchema` has it, and `settings` as the family does.
        batch_size: None is what `choose_batch_size` finds.
        decode_threads: None is as many as `choose_decode_threads` finds, with `num_workers_here` on the machine.
        run: where the headers of the raw shards are remembered.
        beside: where each sample has a file beside its image, which `depict` is given; None where nothing is read.
    """

    family: str
    leads: bool
    settings: TableConfig
    model: str
    revision: str | None
    dtype: str
    batch_size: int | None
    is_long_run: bool
    device: str
    num_threads: int
    decode_threads: int | None
    num_workers_here: int | None
    resolution: int
    is_bucketed: bool
    max_upscale: float | None
    patch_size: int
    reading: Reading
    max_pixels: int
    run: Path
    preview_shard: str
    preview_path: Path
    num_preview_images: int
    beside: FeaturePlaces | None = None


class _SampleBytes(NamedTuple):
    """What is read of a sample: its image, and the file beside that."""

    image: bytes = b""
    beside: bytes = b""


# The index row of a sample, so far, and its bytes.
_Read = tuple[dict[str, Any], _SampleBytes]


@dataclass
class _Picture:
    """An image cropped to its bucket, [H, W, 3] until it is encoded, then its latent: mean and maybe std, [C, h, w].

    Of a reject there is only the index row.
    """

    row: dict[str, Any]
    pixels: np.ndarray | None = None
    latent: tuple[np.ndarray, ...] | None = None


def _is_soft(row: dict[str, Any]) -> bool:
    """Whether the image of an index row was scaled up so far that it is visibly soft."""
    return row["reject"] is None and row["resized_width"] > SOFT_SCALE * row["original_width"]


# Pictures with their latents.
_Encoded = list[tuple[_Picture, tuple[np.ndarray, ...]]]


class _Batch(NamedTuple):
    """A batch that has come back: the start of its slice, all pictures of that slice so far, and those encoded."""

    start: int
    pictures: list[_Picture]
    encoded: _Encoded


def _finish(finish: Callable[[], _Encoded], start: int, pictures: list[_Picture]) -> _Batch:
    return _Batch(start, pictures, finish())


def choose_decode_threads(num_workers: int | None) -> int:
    """Return how many threads decode images of a worker: its share of this machine's cores, of which 16 are enough.

    With two threads an H100 waits for images of 256px for most of the time. Without a number of workers, as on a
    cluster, whose machines have several GPUs and many cores, it is all cores up to that number.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_DECODE_THREADS, num_cores // (num_workers or 1)))


def choose_batch_size(device_type: str, resolution: int) -> int:
    """Return how many images of `resolution` squared pixels are encoded at once."""
    return max(1, GPU_BATCH_PIXELS // resolution**2) if device_type == "cuda" else CPU_BATCH_SIZE


class LatentWorker:
    """Encodes the images of a shard; one tar member per image kept, one index row per sample."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: LatentWorkerConfig) -> None:
        import torch

        torch.set_num_threads(config.num_threads)
        self.config = config
        device = choose_device(config.device, key="features.device")
        self._codec = open_codec(
            config.model, config.revision, device=device, dtype=config.dtype, is_long_run=config.is_long_run
        )
        self._family = latent_schema(has_std=self._codec.spec.has_std, name=config.family, leads=config.leads)
        self._cropping = Cropping(
            resolution=config.resolution,
            multiple=self._codec.spec.factor * config.patch_size if config.is_bucketed else None,
            max_upscale=config.max_upscale,
            max_pixels=config.max_pixels,
        )
        self._batches = Batches(config.batch_size or choose_batch_size(device.type, config.resolution))
        num_threads = config.decode_threads or choose_decode_threads(config.num_workers_here)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._wait_seconds = 0.0

    def depict(self, image: CutImage) -> np.ndarray:
        """Return the picture that is encoded of an image, uint8 [H, W, 3]: here the image itself. Called in threads.

        Raises:
            SampleReject: there is none.
        """
        return image.pixels

    def depict_batch(self, pictures: "Tensor") -> "Tensor":
        """Return what is encoded of what `depict` gave of several images, uint8 [B, 3, H, W] both, on any device.

        This is for networks: one batch at a time, in the thread that encodes.
        """
        return pictures

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        self._wait_seconds, start_seconds = 0.0, time.perf_counter()
        rows: list[dict[str, Any]] = []
        details: dict[str, Any] = {}
        source, run, beside = piece.source, self.config.run, self.config.beside
        # A source that is known by the files beside its images has another identity than its shard.
        identity = source.identity if beside is None else None
        with (
            open_shard(source.path, self.config.reading, run=run, identity=identity) as raw,
            contextlib.nullcontext() if beside is None else open_files(beside, source.name) as files,
            atomic_file(piece.output(".tar")) as tar_path,
            FeatureTarWriter(tar_path) as tar,
            SliceWriter() as writer,
        ):
            decoded = self._decode_ahead(self._read(raw, files, piece))
            for _, pictures in zip(piece.slices(), self._encode_slices(decoded, piece), strict=True):
                writer.write(functools.partial(self._store_slice, pictures, tar, rows=rows))
            if piece.start == 0 and raw.name == self.config.preview_shard:
                details |= self._preview(self._read(raw, files, self._previewed(piece)))
        with atomic_file(piece.output(".parquet")) as index_path:
            write_index(index_path, rows, self._family.columns)
        if num_soft := sum(map(_is_soft, rows)):
            details[NUM_SOFT] = num_soft
        rejected = Counter(row["reject"] for row in rows if row.get("reject") is not None)
        return PieceReport(
            num_read=len(rows),
            num_kept=len(rows) - rejected.total(),
            rejected=dict(rejected),
            details=details,
            wait_seconds=self._wait_seconds,
            busy_seconds=time.perf_counter() - start_seconds - self._wait_seconds,
        )

    def _encode_slices(self, decoded: Iterator[_Picture], piece: Piece) -> Iterator[list[_Picture]]:
        """Yield one picture per sample of each slice, in order; the device has begun with the next slice by then."""
        batches = one_behind(self._start_batches(decoded, piece))
        for _, of_slice in itertools.groupby(batches, key=lambda batch: batch.start):
            pictures: list[_Picture] = []
            for batch in of_slice:
                pictures = batch.pictures
                for picture, latent in batch.encoded:
                    picture.latent, picture.pixels = latent, None
            yield pictures

    def _start_batches(self, decoded: Iterator[_Picture], piece: Piece) -> Iterator[Callable[[], _Batch]]:
        """Start encoding whenever there are enough decoded samples of one size and slice.

        A batch holds images of one size, and never leaves its slice; each slice has one, be it empty.
        """
        for start, stop in replace(piece, on_slice=None).slices():  # a slice that has begun is not done
            pictures: list[_Picture] = []
            num_batches = 0
            for finish in self._start_slice(itertools.islice(decoded, stop - start), pictures):
                num_batches += 1
                yield functools.partial(_finish, finish, start, pictures)
            if not num_batches:
                yield functools.partial(_finish, list, start, pictures)

    def _start_slice(self, decoded: Iterable[_Picture], pictures: list[_Picture]) -> Iterator[Callable[[], _Encoded]]:
        """Start encoding the pictures of a slice, which are all added to `pictures`."""
        waiting: dict[tuple[int, ...], list[_Picture]] = {}
        for picture in decoded:
            pictures.append(picture)
            if picture.pixels is None:
                continue
            batch = waiting.setdefault(picture.pixels.shape, [])
            batch.append(picture)
            if len(batch) >= self._batches.size:
                yield from self._batches.each(waiting.pop(picture.pixels.shape), self._start_batch)
        for batch in waiting.values():
            yield from self._batches.each(batch, self._start_batch)

    def _read(self, raw: RawShard, files: FeatureFiles | None, piece: Piece) -> Iterator[_Read]:
        """Yield the index row of each sample and its bytes, none of a reject; files are read by this thread alone."""
        for index, sample in enumerate(raw.samples[piece.start : piece.stop], piece.start):
            reject = sample.reject if is_wanted(piece, index) else NOT_CHOSEN
            row = {"key": sample.key, "shard": raw.name, "label": None, "reject": reject}
            data = _SampleBytes()
            if reject is None:
                try:
                    data = _SampleBytes(raw.image_bytes(sample), b"" if files is None else files.read(sample.key))
                except SampleReject as reject:
                    row["reject"] = reject.reason
                row["label"] = raw.label(sample)
                if row["label"] is None and raw.has_labels:
                    row["reject"] = "no_label"
            yield row, data

    def _decode_ahead(self, read: Iterable[_Read]) -> Iterator[_Picture]:
        """Decode in threads, two batches ahead of the device."""
        futures: deque[Future[_Picture]] = deque()
        for row, data in read:
            futures.append(self._threads.submit(self._prepare, row, data))
            if len(futures) > 2 * self._batches.size:
                yield self._wait(futures.popleft())
        while futures:
            yield self._wait(futures.popleft())

    def _wait(self, future: Future[_Picture]) -> _Picture:
        start_seconds = time.perf_counter()
        picture = future.result()
        self._wait_seconds += time.perf_counter() - start_seconds
        return picture

    def _start_batch(self, pictures: Sequence[_Picture]) -> Callable[[], _Encoded]:
        import torch

        images = np.stack([picture.pixels for picture in pictures if picture.pixels is not None])  # [B, H, W, 3]
        finish = self._codec.start(self.depict_batch(torch.from_numpy(images).permute(0, 3, 1, 2)))

        def finish_batch() -> _Encoded:
            arrays = [moment.half().numpy() for moment in finish() if moment is not None]  # [B, C, h, w] each
            return list(zip(pictures, zip(*arrays, strict=True), strict=True))

        return finish_batch

    def _previewed(self, piece: Piece) -> Piece:  # the same samples however a shard is cut
        stop = 2 * self.config.num_preview_images if piece.wanted is None else piece.samples_per_slice
        return replace(piece, stop=min(stop, piece.source.num_samples))

    def _preview(self, read: Iterable[_Read]) -> dict[str, Any]:
        """Write originals, what is made of them and its reconstructions; returns the mean PSNR, nothing without any."""
        columns: list[list[np.ndarray]] = []
        for cut in (cut for row, data in read if (cut := self._cut(row, data)) is not None):
            with contextlib.suppress(SampleReject):
                columns.append([cut.pixels, self._whole_depiction(cut)])
            if len(columns) == self.config.num_preview_images:
                break
        if self.config.leads:
            columns = [column[1:] for column in columns]
        psnr_db = write_preview(self.config.preview_path, columns, self._codec)
        return {} if psnr_db is None else {"preview_psnr_db": psnr_db}

    def _whole_depiction(self, cut: CutImage) -> np.ndarray:
        import torch

        picture = torch.from_numpy(self.depict(cut)).permute(2, 0, 1)[None]  # [1, 3, H, W]
        return self.depict_batch(picture)[0].permute(1, 2, 0).cpu().numpy()

    def _prepare(self, row: dict[str, Any], data: _SampleBytes) -> _Picture:
        cut = self._cut(row, data)
        if cut is None:
            return _Picture(row)
        try:
            return _Picture(row, self.depict(cut))
        except SampleReject as reject:
            return _Picture(row | {"reject": reject.reason})

    def _cut(self, row: dict[str, Any], data: _SampleBytes) -> CutImage | None:
        """Decode, resize and crop an image and put its geometry into its row; None of a reject."""
        if row["reject"] is not None:
            return None
        try:
            cut = self._cropping.cut(data.image, beside=data.beside)
        except SampleReject as reject:
            row["reject"] = reject.reason
            return None
        row |= geometry(cut)
        return cut

    def _store_slice(self, pictures: Sequence[_Picture], tar: FeatureTarWriter, *, rows: list[dict[str, Any]]) -> None:
        """Write the latents of a slice; adds their index rows to `rows`."""
        for picture in pictures:
            rows.append(self._store(picture, tar))
            picture.latent = None

    def _store(self, picture: _Picture, tar: FeatureTarWriter) -> dict[str, Any]:
        """Write one latent; returns its index row."""
        if picture.latent is None:
            return picture.row
        # float16 overflows at 65504, far beyond any sound latent; what does is inf here and rejected like nan.
        if not all(np.isfinite(array).all() for array in picture.latent):
            return picture.row | {"reject": NON_FINITE_LATENT}
        row = dict(picture.row)
        self._family.write(tar, [row], [picture.latent])
        return row
