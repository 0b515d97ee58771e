"""`make buckets STAGE=3`: what bucketing will do to the images of a stage, from their headers alone."""

import csv
import sys
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table

from encoders.latents import LatentSpec
from encoders.weights import resolve_model
from features.jobs import FeatureInputs, bucket_sizes, codec_of, read_inputs
from pipelines.command import parse_command, run_command
from pipelines.engine.pieces import Source
from pipelines.engine.progress import console, get_logger, progress_bar
from pipelines.raw.images import SOFT_SCALE, SampleReject, nearest_bucket, plan_crop, require_large_enough
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard, open_shard
from pipelines.raw.sizes import measure_image
from pipelines.store.files import atomic_file, remove_temporary_files, take_away

log = get_logger("features")

NUM_READERS = 8
MAX_REJECTS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A sample that will have no latent, and why."""

    shard: str
    key: str
    reason: str


@dataclass(kw_only=True)
class BucketReport:
    """What headers say about the images of a stage.

    Attributes:
        crops: by bucket (height, width), of each image the part of its pixels that is cut away.
        scales: by bucket, of each image the factor it is scaled by before that; above 1 is upscaling.
        rejects: samples without a usable image, as far as headers tell.
    """

    crops: dict[tuple[int, int], "array[float]"] = field(default_factory=dict)
    scales: dict[tuple[int, int], "array[float]"] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Images that have a bucket."""
        return sum(map(len, self.crops.values()))

    def count(self, bucket: tuple[int, int], *, crop: float, scale: float) -> None:
        """Add one image."""
        self.crops.setdefault(bucket, array("f")).append(crop)
        self.scales.setdefault(bucket, array("f")).append(scale)

    def add(self, other: "BucketReport") -> None:
        """Take in the report of another shard."""
        for bucket in other.crops:
            self.crops.setdefault(bucket, array("f")).extend(other.crops[bucket])
            self.scales.setdefault(bucket, array("f")).extend(other.scales[bucket])
        self.rejects += other.rejects


def stage_codec(inputs: FeatureInputs) -> LatentSpec:
    """Return the spec of the codec whose patches decide the buckets; raises as `codec_of` does."""
    return codec_of(resolve_model(inputs.features.vae_model, inputs.features.vae_revision), inputs)


def report_buckets(inputs: FeatureInputs) -> BucketReport:
    """Read the header of every image of a stage's raw shards.

    Raises:
        UserError, StorageError: a tar cannot be read or has changed; names it.
    """
    report, multiple = BucketReport(), stage_codec(inputs).factor * inputs.patch_size
    num_samples = sum(source.num_samples for source in inputs.raw)
    with ThreadPoolExecutor(NUM_READERS) as pool, progress_bar("features buckets", num_samples) as progress:
        shards = pool.map(lambda source: _report_shard(source, inputs, multiple=multiple), inputs.raw)
        for source, shard in zip(inputs.raw, shards, strict=True):
            report.add(shard)
            progress.advance(source.num_samples)
    assert report.num_images + len(report.rejects) == num_samples, "every sample has a bucket or a reason"
    return report


def _report_shard(source: Source, inputs: FeatureInputs, *, multiple: int) -> BucketReport:
    report = BucketReport()
    resolution, max_pixels = inputs.features.resolution, inputs.data.max_pixels
    with open_shard(source.path, inputs.data.reading, run=inputs.run, identity=source.identity) as raw:
        for sample in raw.samples:
            try:
                width, height = _measure(raw, sample, max_pixels=max_pixels)
                bucket = (
                    nearest_bucket(width, height, resolution, multiple=multiple)
                    if inputs.features.buckets
                    else (resolution, resolution)
                )
                crop = plan_crop(width, height, bucket[1], bucket[0], max_pixels=max_pixels)
                require_large_enough(crop, inputs.features.max_upscale)
            except SampleReject as reject:
                report.rejects.append(Reject(shard=raw.name, key=sample.key, reason=reject.reason))
                continue
            cut = 1.0 - bucket[0] * bucket[1] / (crop.resized_width * crop.resized_height)
            report.count(bucket, crop=cut, scale=crop.scale)
    return report


def _measure(raw: RawShard, sample: RawSample, *, max_pixels: int) -> tuple[int, int]:
    """Return width and height of a sample's image; raises `SampleReject` where extraction will."""
    if sample.reject is not None:
        raise SampleReject(sample.reject)
    if raw.has_labels and raw.label(sample) is None:
        raise SampleReject("no_label")
    return measure_image(raw, sample, max_pixels=max_pixels)


def print_buckets(inputs: FeatureInputs, report: BucketReport) -> None:
    """Print one row per bucket, the totals, upscaling that will be visible, and the rejects."""
    features = inputs.features
    title = f"buckets, {inputs.stage_name}: {', '.join(features.shards)} at {features.resolution} pixels"
    table = Table("bucket", "height/width", title=title, title_justify="left")
    for heading in ("images", "share", "crop %", "worst", "upscale %", "worst"):
        table.add_column(heading, justify="right")
    for height, width in bucket_sizes(inputs, stage_codec(inputs)):
        crops, scales = (values.get((height, width), array("f")) for values in (report.crops, report.scales))
        share = f"{len(crops) / max(1, report.num_images):.1%}"
        table.add_row(f"{height}x{width}", f"{height / width:.2f}", f"{len(crops):,}", share, *_figures(crops, scales))
    console.print(table)
    num_samples = sum(source.num_samples for source in inputs.raw)
    console.print(f"{report.num_images:,} images + {len(report.rejects):,} rejects = {num_samples:,} samples")
    scales = [scale for bucket in report.scales.values() for scale in bucket]
    if num_soft := sum(scale > SOFT_SCALE for scale in scales):
        log.warning(
            f"{num_soft:,} images ({num_soft / len(scales):.1%}) are scaled up by more than {SOFT_SCALE - 1:.0%}: "
            f"they are too small for {features.resolution} pixels and will look soft"
        )


def _figures(crops: Sequence[float], scales: Sequence[float]) -> Iterator[str]:
    upscales = [max(0.0, scale - 1.0) for scale in scales]
    for values in (crops, upscales):
        yield f"{100 * np.mean(values):.1f}" if values else "-"
        yield f"{100 * max(values):.1f}" if values else "-"


def list_rejects(rejects: Sequence[Reject], path: Path) -> None:
    """Print shard, key and reason of each reject; many of them go to the CSV file `path` instead."""
    remove_temporary_files(path.parent, path.name)
    take_away(path)
    if len(rejects) <= MAX_REJECTS_SHOWN:
        for reject in rejects:
            console.print(f"rejected: {reject.shard} {reject.key} {reject.reason}", soft_wrap=True)
        return
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("shard", "key", "reason"))
        writer.writerows((reject.shard, reject.key, reject.reason) for reject in rejects)
    console.print(f"the {len(rejects):,} rejects, with shard, key and reason: {path}", soft_wrap=True)


def main() -> None:
    """Print the bucket report of one stage."""
    command = parse_command(
        "features.buckets", "What bucketing will do to a stage's images.", has_stages=True, stage_table="features"
    )
    inputs = read_inputs(command)
    command.remember()
    report = report_buckets(inputs)
    print_buckets(inputs, report)
    list_rejects(report.rejects, inputs.run / f"buckets-{inputs.stage_name}-rejects.csv")


if __name__ == "__main__":
    sys.exit(run_command("features", main))
