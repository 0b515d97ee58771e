"""`make bench-reader`: samples per second out of cached feature tars, against webdataset, MDS and a plain copy.

Samples are as large as real ones: captions of about 90 tokens of width 4096, latents of 256px images. Reading means
that a batch's captions and latents stand in host memory as tensors. Nothing is padded and no noise is drawn on any
side; this reader's whole batches, with noise, are a row of their own. Seconds are CPU seconds, so that other jobs on
the machine count less: the best of several turns in which all sides take part, in one process.
"""

# B samples of a batch, L tokens of a caption, D text width

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import webdataset
from rich.console import Console
from rich.table import Table
from safetensors.torch import load

from features.quantization import store_text
from pipelines.store.families import NULL_CAPTION_FILE, latent_directory, latent_schema, text_directory, text_schema
from pipelines.store.feature_store import FeatureTarWriter, write_index, write_tensors
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from training.data.assembly import BatchAssembler, locate_samples
from training.data.batch import Buffers
from training.data.datasets import Dataset
from training.data.directories import open_directory
from training.data.index import FeatureIndex, number_columns
from training.data.plan import Plan
from training.data.reader import BatchReader
from training.data.reading import LocatedSamples
from training.data.survey import Survey, make_survey, survey_shards

RESULT = Path(__file__).parent / "results" / "reader.json"
RESOLUTION, CHANNELS, LATENT_SIZE, WIDTH = 256, 4, 32, 4096
MEAN_TOKENS, TOKENS_DEVIATION, MIN_TOKENS, MAX_TOKENS = 90, 20, 20, 120
BATCH_SIZE = 178  # per GPU, as in the paper (Table 4)
NUM_SHARDS = 2
NUM_ROUNDS = 5
NUM_ASSEMBLED_EPOCHS = 4
COMPACT_STORAGES = ("float8_e4m3", "int8")
MDS_NOTE = "mosaicml-streaming is not installed (it brings torchvision, which nothing here may need): not compared"


def write_run(run: Path, num_samples: int, storage: str) -> Dataset:
    """Write the features of `num_samples` samples in two shards, and open them."""
    random = np.random.default_rng(0)
    latents = ShardDirectory(latent_directory(run, RESOLUTION))
    text = ShardDirectory(text_directory(run))
    families = {latents: latent_schema(), text: text_schema(storage, WIDTH)}
    for directory in families:
        directory.path.mkdir(parents=True)
    write_tensors(text.path / NULL_CAPTION_FILE, {"embedding_0": np.zeros((1, WIDTH), np.uint16)})
    names = [f"shard_{shard:05d}" for shard in range(NUM_SHARDS)]
    for name in names:
        keys = [f"{name}_{i:05d}" for i in range(num_samples // NUM_SHARDS)]
        with (
            FeatureTarWriter(latents.file(name, ".tar")) as latent_tar,
            FeatureTarWriter(text.file(name, ".tar")) as tar,
        ):
            latent_rows = [_write_latent(latent_tar, key, random) for key in keys]
            text_rows = [_write_caption(tar, key, random, storage) for key in keys]
        for directory, rows in ((latents, latent_rows), (text, text_rows)):
            write_index(directory.file(name, ".parquet"), rows, families[directory].columns)
            report = ShardReport(name=name, source="generated", num_read=len(keys), num_kept=len(keys))
            directory.write_marker(report, Fingerprint.of({}))
    for directory, family in families.items():
        directory.write_manifest(Fingerprint.of({}), names, upstream={}, extra={"family": family.spec()})
    return Dataset(
        run=str(run),
        directories=[open_directory(str(directory.path)) for directory in families],
        shards=names,
    )


def _write_latent(tar: FeatureTarWriter, key: str, random: np.random.Generator) -> dict[str, object]:
    shape = (CHANNELS, LATENT_SIZE, LATENT_SIZE)
    mean, std = (random.standard_normal(shape).astype(np.float16) for _ in range(2))
    row: dict[str, object] = {"key": key, "bucket": f"{RESOLUTION}x{RESOLUTION}"}
    latent_schema().write(tar, [row], [(mean, std)])
    return row


def _write_caption(tar: FeatureTarWriter, key: str, random: np.random.Generator, storage: str) -> dict[str, object]:
    length = int(np.clip(round(random.normal(MEAN_TOKENS, TOKENS_DEVIATION)), MIN_TOKENS, MAX_TOKENS))
    stored = store_text(torch.from_numpy(random.standard_normal((length, WIDTH), dtype=np.float32)), storage)
    row: dict[str, object] = {"key": key, "caption_index": 0, "weight": 1.0}
    text_schema(storage, WIDTH).write(
        tar, [row], [[part for part in (stored.values, stored.scale) if part is not None]]
    )
    return row


class Reading:
    """This reader's part of a benchmark: the samples of one epoch in the plan's order, in batches."""

    def __init__(self, dataset: Dataset, *, checks_payloads: bool = False) -> None:
        self.index = FeatureIndex([dataset])
        self._families = [directory.family for directory in dataset.directories]
        self.survey = make_survey(self.index, survey_shards(self.index, range(len(self.index))))
        self.plan = Plan(self.survey.counts, batch_size=BATCH_SIZE, seed=0, shards_per_block=16)
        self.assembler = _assembler(dataset, self.survey, checks_payloads=checks_payloads)
        self.num_batches = self.survey.num_samples[0] // BATCH_SIZE
        self._shards = {shard: self.index.open(shard) for shard in range(len(self.index))}
        self._buffers = Buffers(is_pinned=False)
        self._draws, self._is_dropped = np.full(BATCH_SIZE, 0.5), np.zeros(BATCH_SIZE, dtype=bool)

    def read(self) -> None:
        """Plan, find and copy the payloads of every batch."""
        for step in range(self.num_batches):
            samples = self.samples(step)
            self.assembler.read(self._buffers, samples, is_dropped=self._is_dropped)

    def samples(self, step: int) -> LocatedSamples:
        """Return the samples of a step."""
        bucket = self.survey.buckets[0]
        positions = range(BATCH_SIZE)
        return locate_samples(self.plan.batch(step), positions, self._shards, bucket=bucket, draws=self._draws)

    def assemble(self) -> None:
        """Make whole batches, noise and all, in the reader's thread, for several epochs; let go of them at once."""
        steps = range(NUM_ASSEMBLED_EPOCHS * self.num_batches)
        with BatchReader(self.plan, self.index, self.assembler, steps=steps, rank=0, num_ranks=1) as reader:
            for _ in reader:
                pass

    def payloads(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yield tar, offset and bytes of every payload, in the order in which they are read."""
        for step in range(self.num_batches):
            samples = self.samples(step)
            for i, shard in enumerate(samples.shards):
                for family in self._families:
                    row = dict(zip(number_columns(family), samples.rows[family.name][i].tolist(), strict=True))
                    for tensor in family.tensors:
                        yield shard.tars[family.name], row[tensor.offset], tensor.end(row) - row[tensor.offset]


def _assembler(dataset: Dataset, survey: Survey, *, checks_payloads: bool) -> BatchAssembler:
    return BatchAssembler(
        dataset, buckets=survey.buckets, seed=0, stream=2, caption_dropout=0.0, checks_payloads=checks_payloads
    )


def read_webdataset(dataset: Dataset) -> None:
    """Decode the same tars with stock webdataset and safetensors: latents and captions in step, joined by key."""
    pipelines = [
        webdataset.WebDataset(  # pyright: ignore[reportAttributeAccessIssue]
            [directory.url(name, ".tar") for name in dataset.shards], shardshuffle=False, empty_check=False
        )
        .map(_decode)
        .batched(BATCH_SIZE, collation_fn=list)
        for directory in dataset.directories
    ]
    for latents, captions in zip(*pipelines, strict=True):
        assert [key for key, _ in latents] == [key for key, _ in captions]


def _decode(sample: dict[str, bytes]) -> tuple[str, dict[str, torch.Tensor]]:
    return str(sample["__key__"]), load(sample["safetensors"])


def copy_mapped(payloads: Sequence[tuple[np.ndarray, int, int]], target: np.ndarray) -> None:
    """Copy every payload out of the mapped tars with numpy, and do nothing else."""
    position = 0
    for tar, offset, num_bytes in payloads:
        if position + num_bytes > len(target):
            position = 0
        target[position : position + num_bytes] = tar[offset : offset + num_bytes]
        position += num_bytes


def copy_memory(source: np.ndarray, target: np.ndarray) -> None:
    """Copy as many bytes from an array that never was a file, a batch at a time."""
    for start in range(0, len(source), len(target)):
        chunk = source[start : start + len(target)]
        target[: len(chunk)] = chunk


def best_seconds(sides: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Time all sides in turns; the best of each. Right before it is timed a side runs once untimed.

    Otherwise each would start in the processor's caches that another side has left behind.
    """
    seconds = dict.fromkeys(sides, float("inf"))
    for _ in range(NUM_ROUNDS):
        for name, run in sides.items():
            run()
            start_seconds = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - start_seconds)
    return seconds


def compare(folder: Path, num_samples: int) -> dict[str, object]:
    """Return samples per second of all sides, and the ratios."""
    dataset = write_run(folder / "bfloat16", num_samples, "bfloat16")
    reading, checked = Reading(dataset), Reading(dataset, checks_payloads=True)
    payloads = list(reading.payloads())
    num_bytes = sum(payload[-1] for payload in payloads)
    num_samples = reading.num_batches * BATCH_SIZE
    target = np.empty(num_bytes // reading.num_batches, np.uint8)
    source = np.ones(num_bytes, np.uint8)
    compact = {storage: Reading(write_run(folder / storage, num_samples, storage)) for storage in COMPACT_STORAGES}
    seconds = best_seconds(
        {
            "webdataset": lambda: read_webdataset(dataset),
            "reader": reading.read,
            "copy of the mapped tars": lambda: copy_mapped(payloads, target),
            "copy of memory": lambda: copy_memory(source, target),
            "reader, CRC-32 checked": checked.read,
            "reader, whole batches with noise": reading.assemble,
            **{f"reader, {storage} captions": reader.read for storage, reader in compact.items()},
        }
    )
    seconds["reader, whole batches with noise"] /= NUM_ASSEMBLED_EPOCHS
    return {
        "ratio_webdataset": round(seconds["webdataset"] / seconds["reader"], 2),
        "ratio_mds": None,
        "ratio_memcpy": round(seconds["copy of the mapped tars"] / seconds["reader"], 3),
        "ratio_memcpy_memory": round(seconds["copy of memory"] / seconds["reader"], 3),
        "samples_per_second": {name: round(num_samples / value) for name, value in seconds.items()},
        "num_samples": num_samples,
        "megabytes_per_sample": round(num_bytes / num_samples / 1e6, 3),
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/reader.json."""
    parser = argparse.ArgumentParser(description="Feature reading against webdataset and a plain copy.")
    parser.add_argument("--samples", type=int, default=8 * BATCH_SIZE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    if importlib.util.find_spec("streaming") is None:
        console.print(MDS_NOTE)
    with tempfile.TemporaryDirectory(prefix="bench-reader-") as folder:
        result = compare(Path(folder), options.samples)
    result |= {name: version(name) for name in ("webdataset", "safetensors", "torch", "numpy")}
    table = Table("side", "samples/s", "against the reader")
    speeds = result["samples_per_second"]
    assert isinstance(speeds, dict)
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:,}", f"{speeds['reader'] / speed:.2f}")
    console.print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
