"""The latent family: images of the raw tars to VAE latents in `features/latent-<resolution>/<shard>.tar`."""

# B batch, C latent channels, H W pixels, h w latent height and width

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from encoders.batches import Batches
from encoders.devices import choose_device
from encoders.opening import open_codec
from features.preview import write_preview
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.images import SampleReject, decode_image, nearest_bucket, resize_and_crop
from pipelines.raw.shards import RawSample, RawShard, open_shard
from pipelines.store.families import LATENT_SCHEMA
from pipelines.store.feature_store import FeatureTarWriter, join_shards, payload_crc32, write_index
from pipelines.store.files import atomic_file


@dataclass(frozen=True, kw_only=True)
class LatentWorkerConfig:
    """What a `LatentWorker` needs; it writes `preview_path` when it comes by the start of `preview_shard`.

    Attributes:
        run: where the headers of the raw shards are remembered.
    """

    model: str
    revision: str | None
    dtype: str
    batch_size: int
    device: str
    num_threads: int
    decode_threads: int
    resolution: int
    is_bucketed: bool
    dialect: str
    max_pixels: int
    run: Path
    preview_shard: str
    preview_path: Path
    num_preview_images: int


@dataclass
class _Picture:
    """An image cropped to its bucket, [H, W, 3] until it is encoded, then its latent (mean, std), each [C, h, w].

    Of a reject there is only the index row.
    """

    row: dict[str, Any]
    pixels: np.ndarray | None = None
    latent: tuple[np.ndarray, np.ndarray] | None = None


class LatentWorker:
    """Encodes the images of a shard; one tar member per image kept, one index row per sample."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: LatentWorkerConfig) -> None:
        import torch

        torch.set_num_threads(config.num_threads)
        self._config = config
        device = choose_device(config.device, key="features.device")
        self._codec = open_codec(config.model, config.revision, device=device, dtype=config.dtype)
        self._batches = Batches(config.batch_size)
        self._threads = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._wait_seconds = 0.0

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        self._wait_seconds, start_seconds = 0.0, time.perf_counter()
        rows: list[dict[str, Any]] = []
        details: dict[str, Any] = {}
        source, run = piece.source, self._config.run
        with (
            open_shard(source.path, self._config.dialect, run=run, identity=source.identity) as raw,
            atomic_file(piece.output(".tar")) as tar_path,
            FeatureTarWriter(tar_path) as tar,
        ):
            for start, stop in piece.slices():
                pictures = self._encode_slice(raw, raw.samples[start:stop])
                rows += [_store(picture, tar) for picture in pictures]
            if piece.start == 0 and raw.name == self._config.preview_shard:
                details = self._preview(raw)
        with atomic_file(piece.output(".parquet")) as index_path:
            write_index(index_path, rows, LATENT_SCHEMA)
        rejected = Counter(row["reject"] for row in rows if row.get("reject") is not None)
        return PieceReport(
            num_read=len(rows),
            num_kept=len(rows) - rejected.total(),
            rejected=dict(rejected),
            details=details,
            wait_seconds=self._wait_seconds,
            busy_seconds=time.perf_counter() - start_seconds - self._wait_seconds,
        )

    def _encode_slice(self, raw: RawShard, samples: Sequence[RawSample]) -> list[_Picture]:
        """Return one picture per sample, in order; a batch holds images of one size, and never leaves the slice."""
        pictures: list[_Picture] = []
        waiting: dict[tuple[int, ...], list[_Picture]] = {}
        for picture in self._decode_ahead(raw, samples):
            pictures.append(picture)
            if picture.pixels is None:
                continue
            batch = waiting.setdefault(picture.pixels.shape, [])
            batch.append(picture)
            if len(batch) >= self._batches.size:
                self._encode(waiting.pop(picture.pixels.shape))
        for batch in waiting.values():
            self._encode(batch)
        return pictures

    def _decode_ahead(self, raw: RawShard, samples: Sequence[RawSample]) -> Iterator[_Picture]:
        """Decode in threads, two batches ahead of the device; the tar itself is read by this thread alone."""
        # Some samples of the shard have a class, so the others lack theirs.
        is_labelled = any("cls" in sample.members for sample in raw.samples)
        futures: deque[Future[_Picture]] = deque()
        for sample in samples:
            row = {"key": sample.key, "shard": raw.name, "label": None, "reject": sample.reject}
            data = b""
            if sample.reject is None:
                data = raw.image_bytes(sample)
                row["label"] = raw.label(sample)
                if row["label"] is None and is_labelled:
                    row["reject"] = "no_label"
            futures.append(self._threads.submit(_prepare, row, data, self._config))
            if len(futures) > 2 * self._batches.size:
                yield self._wait(futures.popleft())
        while futures:
            yield self._wait(futures.popleft())

    def _wait(self, future: Future[_Picture]) -> _Picture:
        start_seconds = time.perf_counter()
        picture = future.result()
        self._wait_seconds += time.perf_counter() - start_seconds
        return picture

    def _encode(self, pictures: Sequence[_Picture]) -> None:
        for picture, latent in zip(pictures, self._batches.run(pictures, self._encode_batch), strict=True):
            picture.latent = latent
            picture.pixels = None

    def _encode_batch(self, pictures: Sequence[_Picture]) -> list[tuple[np.ndarray, np.ndarray]]:
        import torch

        images = np.stack([picture.pixels for picture in pictures if picture.pixels is not None])  # [B, H, W, 3]
        mean, std = self._codec.encode(torch.from_numpy(images).permute(0, 3, 1, 2))  # [B, C, h, w]
        assert std is not None, "latents are stored with their deviation"
        return list(zip(mean.half().numpy(), std.half().numpy(), strict=True))

    def _preview(self, raw: RawShard) -> dict[str, Any]:
        """Write originals above their reconstructions; returns the mean PSNR, and nothing if no image is usable."""
        originals: list[np.ndarray] = []
        for picture in self._decode_ahead(raw, raw.samples[: 2 * self._config.num_preview_images]):
            if picture.pixels is not None and len(originals) < self._config.num_preview_images:
                originals.append(picture.pixels)
        if not originals:
            return {}
        return {"preview_psnr_db": write_preview(self._config.preview_path, originals, self._codec)}


def _prepare(row: dict[str, Any], data: bytes, config: LatentWorkerConfig) -> _Picture:
    if row["reject"] is not None:
        return _Picture(row)
    try:
        image = decode_image(data, max_pixels=config.max_pixels)
        height, width = config.resolution, config.resolution
        if config.is_bucketed:
            height, width = nearest_bucket(image.width, image.height, config.resolution)
        cropped, crop = resize_and_crop(image, width, height, max_pixels=config.max_pixels)
    except SampleReject as reject:
        return _Picture(row | {"reject": reject.reason})
    geometry = {
        "bucket": f"{height}x{width}",
        "original_width": image.width,
        "original_height": image.height,
        "resized_width": crop.resized_width,
        "resized_height": crop.resized_height,
        "crop_x": crop.x,
        "crop_y": crop.y,
    }
    return _Picture(row | geometry, np.array(cropped))


def _store(picture: _Picture, tar: FeatureTarWriter) -> dict[str, Any]:
    """Write one latent; returns its index row."""
    if picture.latent is None:
        return picture.row
    mean, std = picture.latent
    # float16 overflows at 65504, far beyond any sound latent; what does is inf here and rejected like nan.
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        return picture.row | {"reject": "non_finite_latent"}
    offsets = tar.add(picture.row["key"], {"mean": mean, "std": std})
    channels, height, width = mean.shape
    return picture.row | {
        "mean_offset": offsets["mean"],
        "std_offset": offsets["std"],
        "nbytes": mean.nbytes,
        "crc32": payload_crc32(mean, std),
        "channels": channels,
        "height": height,
        "width": width,
    }
