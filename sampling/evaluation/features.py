"""Features of a set of images, computed once through Ray and kept: `<cache>/<network>-<digest>/`."""

# B images, D feature width

import re
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from encoders.batches import Batches
from encoders.devices import choose_device
from encoders.vision import ClipTowers
from errors import TooManyRejectsError, UserError
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig, run_over_shards
from pipelines.raw.images import SampleReject, decode_image
from pipelines.raw.reading import Reading
from pipelines.store.files import atomic_file, remove_temporary_files
from pipelines.store.manifest import MANIFEST_NAME, Fingerprint, ShardDirectory, read_manifest
from pipelines.store.tables import MEND_PART, MEND_SHARD, read_table, sound_table
from sampling.evaluation.config import DECIDES_FEATURES, EvaluationConfig
from sampling.evaluation.distances import Array, Gaussian, Moments
from sampling.evaluation.image_sets import ImageSet, SetImage, read_images
from sampling.evaluation.networks import NetworkSource, load_network
from sampling.evaluation.sizes import SetSizes

FEATURES_VERSION = 2  # raise it when the same images give other features
STATISTICS_NAME = "statistics.safetensors"
FAULTS_NAMED = 5
NON_FINITE = "non_finite_feature"
_ROWS_AT_ONCE = 4096

log = get_logger("evaluation")

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("feature", pa.list_(pa.float32())),
        ("clip_score", pa.float32()),
        ("reject", pa.string()),
        ("detail", pa.string()),
        # As the image came, and as the network saw it.
        *((name, pa.int32()) for name in ("width", "height", "seen_width", "seen_height")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class FeatureWorkerConfig:
    """What a `FeatureWorker` needs; no reading means that sources are lists of files."""

    network: NetworkSource
    reading: Reading | None
    max_pixels: int
    batch_size: int
    decode_threads: int
    device: str
    num_threads: int


@dataclass
class _Picture:
    row: dict[str, Any]
    prompt: str | None = None
    pixels: np.ndarray | None = None  # [3, H, W], until the network has seen it


class FeatureWorker:
    """Writes one row per image: its feature, its CLIP score where it has a prompt, or why it has none."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, config: FeatureWorkerConfig) -> None:
        import torch

        self._config = config
        torch.set_num_threads(config.num_threads)
        device = choose_device(config.device, key="evaluation.device")
        # TF32 would round convolutions to ten bits on some GPUs and not on others.
        torch.backends.cudnn.allow_tf32 = False
        self._network = load_network(config.network, device=device)
        self._batches = Batches(config.batch_size)
        self._threads = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._wait_seconds = 0.0

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the features of images [piece.start, piece.stop)."""
        self._wait_seconds, start_seconds = 0.0, time.perf_counter()
        num_read, rejected = 0, Counter()
        with atomic_file(piece.output(".parquet")) as path, pq.ParquetWriter(path, SCHEMA) as writer:
            for start, stop in piece.slices():
                images = read_images(piece.source, start, stop, reading=self._config.reading)
                rows = self._slice_rows(images)
                # A slice is a row group, however the source is cut into pieces.
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                num_read += len(rows)
                rejected.update(row["reject"] for row in rows if row.get("reject") is not None)
        return PieceReport(
            num_read=num_read,
            num_kept=num_read - rejected.total(),
            rejected=dict(rejected),
            wait_seconds=self._wait_seconds,
            busy_seconds=time.perf_counter() - start_seconds - self._wait_seconds,
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Put the tables of a source's pieces behind each other."""
        with pq.ParquetWriter(outputs[".parquet"], SCHEMA) as writer:
            for part in parts:
                with sound_table(part[".parquet"], mend=MEND_PART):
                    table = pq.ParquetFile(part[".parquet"])
                    for group in range(table.num_row_groups):
                        writer.write_table(_in_schema(table.read_row_group(group)))

    def _slice_rows(self, images: Iterator[SetImage]) -> list[dict[str, Any]]:
        pictures: list[_Picture] = []
        waiting: list[_Picture] = []
        for picture in self._decode_ahead(images):
            pictures.append(picture)
            if picture.pixels is not None:
                waiting.append(picture)
            if len(waiting) == self._batches.size:
                self._see(waiting)
                waiting = []
        self._see(waiting)
        return [picture.row for picture in pictures]

    def _decode_ahead(self, images: Iterator[SetImage]) -> Iterator[_Picture]:
        """Decode and resize in threads, two batches ahead of the network."""
        futures: deque[Future[_Picture]] = deque()
        for image in images:
            futures.append(self._threads.submit(self._prepare, image))
            if len(futures) > 2 * self._batches.size:
                yield self._wait(futures.popleft())
        while futures:
            yield self._wait(futures.popleft())

    def _wait(self, future: Future[_Picture]) -> _Picture:
        start_seconds = time.perf_counter()
        picture = future.result()
        self._wait_seconds += time.perf_counter() - start_seconds
        return picture

    def _prepare(self, image: SetImage) -> _Picture:
        if image.reject is not None:
            return _Picture({"key": image.key, "reject": image.reject})
        try:
            decoded = decode_image(image.data, max_pixels=self._config.max_pixels)
        except SampleReject as reject:
            return _Picture({"key": image.key, "reject": reject.reason, "detail": reject.detail})
        pixels = self._network.prepare(decoded)
        sizes = {"width": decoded.width, "height": decoded.height}
        seen = {"seen_width": pixels.shape[2], "seen_height": pixels.shape[1]}
        return _Picture({"key": image.key} | sizes | seen, prompt=image.prompt, pixels=pixels)

    def _see(self, pictures: Sequence[_Picture]) -> None:
        if not pictures:
            return
        for picture, (feature, score) in zip(pictures, self._batches.run(pictures, self._see_batch), strict=True):
            picture.pixels = None
            if np.isfinite(feature).all():
                picture.row |= {"feature": feature, "clip_score": score}
            else:
                picture.row["reject"] = NON_FINITE

    def _see_batch(self, pictures: Sequence[_Picture]) -> list[tuple[np.ndarray, float | None]]:
        import torch

        with torch.inference_mode():
            pixels = np.stack([picture.pixels for picture in pictures if picture.pixels is not None])
            features = self._network.features(torch.from_numpy(pixels)).float()  # [B, D]
            scores: list[float | None] = [None] * len(pictures)
            prompts = [picture.prompt for picture in pictures if picture.prompt is not None]
            if isinstance(self._network, ClipTowers) and len(prompts) == len(pictures):
                cosines = (features * self._network.text_features(prompts)).sum(dim=1)
                scores = [100 * cosine for cosine in cosines.clamp(min=0).tolist()]
        return list(zip(features.cpu().numpy(), scores, strict=True))


def _in_schema(table: pa.Table) -> pa.Table:
    """Return a table with all of today's columns: parts of an interrupted run may be older."""
    for field in SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(SCHEMA.names)


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of a set on disk, and what became of each image.

    Attributes:
        faults: the first unusable images, as "name: reason".
    """

    images: ImageSet
    network: NetworkSource
    folder: Path
    num_images: int
    rejected: dict[str, int]
    faults: list[str]

    def _tables(self) -> Iterator[pa.RecordBatch]:
        for source in self.images.sources:
            path = self.folder / f"{source.name}.parquet"
            with sound_table(path, mend=MEND_SHARD):
                yield from pq.ParquetFile(path).iter_batches(_ROWS_AT_ONCE, columns=["feature", "clip_score"])

    def _blocks(self) -> Iterator[np.ndarray]:
        for table in self._tables():
            column = table.column("feature").drop_null()
            if len(column):
                yield column.flatten().to_numpy().reshape(len(column), -1)

    def gaussian(self) -> Gaussian:
        """Return mean and covariance, read from disk where they have been computed before."""
        path = self.folder / STATISTICS_NAME
        remove_temporary_files(self.folder, STATISTICS_NAME)
        if path.is_file():
            try:
                tensors = load_file(path)
                return Gaussian(tensors["mean"], tensors["covariance"], int(tensors["num_images"]))
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                log.warning(f"{path} is damaged ({error}): mean and covariance are computed again")
        blocks = self._blocks()
        first = next(blocks)
        moments = Moments(first.shape[1]).add(first)
        for block in blocks:
            moments.add(block)
        gaussian = moments.gaussian()
        tensors = {"mean": gaussian.mean, "covariance": gaussian.covariance, "num_images": np.array(self.num_images)}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary)
        return gaussian

    def embeddings(self) -> Array:
        """Return all features [N, D]."""
        return np.concatenate(list(self._blocks())).astype(np.float64)

    def sizes(self) -> SetSizes | None:
        """Return the sizes of the usable images; None where the features are of before those were written down."""
        names = ["width", "height", "seen_width", "seen_height"]
        paths = [self.folder / f"{source.name}.parquet" for source in self.images.sources]
        if any(not {*names} <= {*pq.read_schema(path).names} for path in paths):
            return None
        table = pa.concat_tables(pq.read_table(path, columns=[*names, "reject"]) for path in paths)
        usable = table.filter(pc.field("reject").is_null())
        if usable["width"].null_count:
            return None
        found = usable.group_by(names).aggregate([([], "count_all")]).to_pylist()
        counts: Counter[tuple[int, int]] = Counter()
        for row in found:
            counts[row["width"], row["height"]] += row["count_all"]
        target = (found[0]["seen_width"], found[0]["seen_height"])
        network = self.network
        return SetSizes(target=target, counts=counts, resized_to=network.resized_to, cropped=network.cropped)

    def clip_score(self) -> float | None:
        """Return the mean CLIP score; None where the images have no prompts or the network is not CLIP."""
        scores = np.concatenate([table.column("clip_score").drop_null().to_numpy() for table in self._tables()])
        return float(scores.astype(np.float64).mean()) if len(scores) else None


def compute_features(
    images: ImageSet, network: NetworkSource, *, cache: Path, config: EvaluationConfig, engine: EngineConfig
) -> Features:
    """Compute what is missing of a set's features, and return them.

    Raises:
        UserError: more than evaluation.max_reject_fraction of the images are unusable, or fewer than two are left.
    """
    fingerprint = Fingerprint.of(
        {
            "version": FEATURES_VERSION,
            "network": network.source.identity,
            "resizer": network.resizer,
            "images": images.identity,
            **config.fingerprint_fields(DECIDES_FEATURES),
        }
    )
    folder, fingerprint = _folder_of(fingerprint, network, cache=cache)
    worker_config = FeatureWorkerConfig(
        network=network,
        reading=images.reading,
        max_pixels=config.max_pixels,
        batch_size=config.batch_size,
        decode_threads=config.decode_threads,
        device=config.device,
        num_threads=max(1, int(engine.cpus_per_worker)),
    )
    output = ShardDirectory(folder)
    try:
        manifest = run_over_shards(
            FeatureWorker,
            worker_config,
            sources=images.sources,
            output=output,
            fingerprint=fingerprint,
            engine=engine,
            max_reject_fraction=config.max_reject_fraction,
            room="evaluation",
            few_samples=config.max_images_in_process,
            memory_settings={
                "evaluation.batch_size": config.batch_size,
                "evaluation.decode_threads": config.decode_threads,
                "evaluation.max_pixels": config.max_pixels,
            },
            extra={"images": images.name, "network": network.source.location},
        )
    except TooManyRejectsError as error:
        faults = _read_faults(folder, images)
        raise UserError(f"{images.name}: {error}; such as {_describe_faults(faults, network)}") from None
    faults = _read_faults(folder, images) if manifest.rejected else []
    if faults:
        num_unusable = sum(manifest.rejected.values())
        log.warning(f"{images.name}: {num_unusable:,} unusable images, such as {_describe_faults(faults, network)}")
    if manifest.num_kept < 2:
        raise UserError(f"{images.name}: {manifest.num_kept} usable images, a distance needs at least 2")
    return Features(
        images=images,
        network=network,
        folder=folder,
        num_images=manifest.num_kept,
        rejected=manifest.rejected,
        faults=faults,
    )


def _folder_of(fingerprint: Fingerprint, network: NetworkSource, *, cache: Path) -> tuple[Path, Fingerprint]:
    """Return where a set's features lie or will lie; maybe known by a fingerprint that has defaults written out."""
    folder = cache / f"{network.key}-{fingerprint.digest[:16]}"
    if folder.is_dir():
        return folder, fingerprint
    defaults = EvaluationConfig.fingerprint_defaults(DECIDES_FEATURES)
    for path in sorted(cache.glob(f"{network.key}-*/{MANIFEST_NAME}")):
        if re.fullmatch(r"[0-9a-f]{16}", path.parent.name.removeprefix(f"{network.key}-")) is None:
            continue  # somebody's copy
        try:
            found = read_manifest(path.parent).fingerprint
        except UserError as error:
            log.warning(f"{str(error).partition(';')[0]}; features of its images are not known")
            continue
        if {**defaults, **found.fields} == {**defaults, **fingerprint.fields}:
            return path.parent, found
    return folder, fingerprint


def _read_faults(folder: Path, images: ImageSet) -> list[str]:
    faults: list[str] = []
    paths = [folder / f"{source.name}.parquet" for source in images.sources]
    for path in filter(Path.is_file, paths):
        rows = read_table(path, ["key", "reject"], mend=MEND_SHARD).to_pylist()
        faults += [f"{row['key']}: {row['reject']}" for row in rows if row["reject"] is not None]
    return faults[:FAULTS_NAMED]


def _describe_faults(faults: Sequence[str], network: NetworkSource) -> str:
    described = "; ".join(faults)
    if NON_FINITE in described:
        described += f" (the weights of {network.source.location} are at fault, put them there anew)"
    return described
