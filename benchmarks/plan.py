"""`make bench-plan`: one hundred million samples in ten thousand shards, over 1,024 ranks.

Every rank of such a job starts alike, so a few of them are run here one after the other, each a process of its own that
does what a rank does before its first step: read the manifests and identify the data by them, read the survey, plan,
open the shards around its position, and assemble its part of the first batch. All shards have their index and tar; the
files are links to one index and one sparse tar of each family, so the disk holds them once. The survey itself, made
once for a job, is timed on some shards.
"""

# S shards, K buckets

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines.raw.images import aspect_buckets
from pipelines.store.families import (
    NULL_CAPTION_FILE,
    FamilySchema,
    latent_directory,
    latent_schema,
    text_directory,
    text_schema,
)
from pipelines.store.feature_store import write_index, write_tensors
from pipelines.store.files import atomic_write_json
from pipelines.store.manifest import MANIFEST_NAME, SCHEMA_VERSION, Fingerprint, Manifest, ShardReport
from training.data.assembly import BatchAssembler
from training.data.datasets import Dataset
from training.data.directories import open_directory
from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.reader import BatchReader
from training.data.survey import load_survey, make_survey, save_survey, survey_shards

RESULT = Path(__file__).parent / "results" / "plan.json"
RESOLUTION, CHANNELS, FACTOR, WIDTH, MAX_TOKENS = 256, 4, 8, 4096, 120
BATCH_SIZE = 11_264  # the paper's 11,392, rounded to a multiple of 1,024 ranks
SHARDS_PER_BLOCK = 16
PAYLOAD_GAP = 1024
NUM_SURVEYED, NUM_PLANNED = 200, 1000
FILES = {".tar": "0" * 64, ".parquet": "1" * 64}


def rows_of(num_samples: int) -> Iterator[tuple[dict[str, object], dict[str, object]]]:
    """Yield index rows of latents and caption of each sample of a shard; buckets in turn."""
    sizes = aspect_buckets(RESOLUTION, multiple=2 * FACTOR)
    latent_end, text_end = 0, 0
    random = np.random.default_rng(0)
    for i in range(num_samples):
        height, width = sizes[i % len(sizes)]
        nbytes = CHANNELS * (height // FACTOR) * (width // FACTOR) * 2
        num_tokens = int(random.integers(40, MAX_TOKENS))
        latent = {
            "key": f"{i:09d}",
            "mean_offset": latent_end + PAYLOAD_GAP,
            "std_offset": latent_end + PAYLOAD_GAP + nbytes,
            "channels": CHANNELS,
            "height": height // FACTOR,
            "width": width // FACTOR,
            "bucket": f"{height}x{width}",
        }
        caption = {"key": f"{i:09d}", "offset": text_end + PAYLOAD_GAP, "num_tokens": num_tokens, "weight": 1.0}
        latent_end += PAYLOAD_GAP + 2 * nbytes
        text_end += PAYLOAD_GAP + num_tokens * WIDTH * 2
        yield latent, caption


def write_run(run: Path, *, num_shards: int, samples_per_shard: int) -> list[str]:
    """Write both feature directories; returns the names of the shards."""
    names = [f"shard_{shard:06d}" for shard in range(num_shards)]
    latents, captions = zip(*rows_of(samples_per_shard), strict=True)
    latent_bytes = latents[-1]["std_offset"] + 2 * CHANNELS * (RESOLUTION // FACTOR) ** 2 * 4
    text_bytes = captions[-1]["offset"] + MAX_TOKENS * WIDTH * 2
    for directory, rows, family, num_bytes in (
        (latent_directory(run, RESOLUTION), latents, latent_schema(), latent_bytes),
        (text_directory(run), captions, text_schema("bfloat16", WIDTH), text_bytes),
    ):
        directory.mkdir(parents=True)
        write_index(run / "one.parquet", rows, family.columns)
        (run / "one.tar").touch()
        os.truncate(run / "one.tar", num_bytes)
        for name in names:
            for suffix in FILES:
                (directory / f"{name}{suffix}").hardlink_to(run / f"one{suffix}")
        (run / "one.parquet").unlink()
        (run / "one.tar").unlink()
        write_manifest(directory, names, samples_per_shard, family=family)
    write_tensors(text_directory(run) / NULL_CAPTION_FILE, {"embedding_0": np.zeros((1, WIDTH), np.uint16)})
    return names


def write_manifest(directory: Path, names: list[str], samples_per_shard: int, *, family: FamilySchema) -> None:
    """Write a manifest as `ShardDirectory.write_manifest` does, without ten thousand markers."""
    reports = {
        name: ShardReport(
            name=name, source="0" * 64, num_read=samples_per_shard, num_kept=samples_per_shard, files=FILES
        )
        for name in names
    }
    num_samples = len(names) * samples_per_shard
    manifest = Manifest(
        fingerprint=Fingerprint.of({}),
        upstream={},
        num_read=num_samples,
        num_kept=num_samples,
        rejected={},
        shards=reports,
        extra={"family": family.spec()},
    )
    atomic_write_json(directory / MANIFEST_NAME, {"schema": SCHEMA_VERSION, **dataclasses.asdict(manifest)})


def open_dataset(run: Path) -> Dataset:
    """Open the feature directories by their manifests."""
    latents = open_directory(str(latent_directory(run, RESOLUTION)))
    return Dataset(
        run=str(run),
        directories=[latents, open_directory(str(text_directory(run)))],
        shards=sorted(latents.manifest.shards),
    )


def run_rank(run: Path, *, rank: int, num_ranks: int, start_seconds: float) -> None:
    """Do what a rank does up to its first batch, and print the figures; `start_seconds` is when it was started."""
    ready_seconds = time.time()
    dataset = open_dataset(run)
    dataset.fingerprint_fields()
    survey = load_survey(run / "survey.json", identity="bench")
    assert survey is not None
    plan = Plan(survey.counts, batch_size=BATCH_SIZE, seed=0, shards_per_block=SHARDS_PER_BLOCK)
    assembler = BatchAssembler(dataset, buckets=survey.buckets, seed=0, stream=2, caption_dropout=0.1)
    known_seconds = time.time()
    steps = range(100)
    with BatchReader(plan, FeatureIndex([dataset]), assembler, steps=steps, rank=rank, num_ranks=num_ranks) as reader:
        assert len(next(iter(reader)).keys) == BATCH_SIZE // num_ranks
        first_seconds = time.time()
    figures = {
        "seconds_first_batch": round(first_seconds - start_seconds, 2),
        "seconds_imports": round(ready_seconds - start_seconds, 2),
        "seconds_manifests_and_survey": round(known_seconds - ready_seconds, 2),
        "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
    }
    print(json.dumps(figures))


def measure_rank(run: Path, *, rank: int, num_ranks: int) -> dict[str, float]:
    """Run one rank in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan", "--rank", str(rank), "--ranks", str(num_ranks)]
    done = subprocess.run(
        [*command, "--run", str(run), "--started", str(time.time())], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_survey(run: Path, *, num_shards: int) -> float:
    """Write the survey of all shards, which are alike; returns the seconds that one shard's part of it takes."""
    index = FeatureIndex([open_dataset(run)])
    start_seconds = time.perf_counter()
    some = survey_shards(index, range(NUM_SURVEYED))
    seconds = time.perf_counter() - start_seconds
    save_survey(
        make_survey(index, [some[i % NUM_SURVEYED] for i in range(num_shards)]), run / "survey.json", identity="bench"
    )
    return seconds / NUM_SURVEYED


def measure_plan(run: Path, *, has_weights: bool) -> float:
    """Return the seconds it takes one rank to plan an epoch, from a stretch of consecutive steps.

    Weights are a different one in each cell, so that no cell has as many draws as samples.
    """
    survey = load_survey(run / "survey.json", identity="bench")
    assert survey is not None
    weights = np.random.default_rng(0).exponential(size=np.shape(survey.counts[0])) if has_weights else None
    plan = Plan(
        survey.counts,
        sample_weights=[None if weights is None else weights * survey.counts[0]],
        batch_size=BATCH_SIZE,
        seed=0,
        shards_per_block=SHARDS_PER_BLOCK,
    )
    start_seconds = time.perf_counter()
    for step in range(NUM_PLANNED):
        plan.batch(step)
    return (time.perf_counter() - start_seconds) / NUM_PLANNED * survey.num_samples[0] / BATCH_SIZE


def compare(run: Path, *, num_shards: int, samples_per_shard: int, num_ranks: int) -> dict[str, object]:
    """Build the run and measure everything."""
    write_run(run, num_shards=num_shards, samples_per_shard=samples_per_shard)
    survey_seconds = measure_survey(run, num_shards=num_shards)
    ranks = {rank: measure_rank(run, rank=rank, num_ranks=num_ranks) for rank in (0, num_ranks // 3, num_ranks - 1)}
    slowest = max(ranks.values(), key=lambda figures: figures["seconds_first_batch"])
    return {
        "seconds_first_batch": slowest["seconds_first_batch"],
        "gigabytes_per_rank": max(figures["gigabytes"] for figures in ranks.values()),
        "seconds_plan_per_epoch": round(measure_plan(run, has_weights=False), 1),
        "seconds_plan_per_epoch_of_weights": round(measure_plan(run, has_weights=True), 1),
        "seconds_survey_one_process": round(survey_seconds * num_shards, 1),
        "seconds_survey_all_ranks": round(survey_seconds * -(-num_shards // num_ranks), 2),
        "ranks": ranks,
        "survey_megabytes": round((run / "survey.json").stat().st_size / 1e6, 2),
        "num_samples": num_shards * samples_per_shard,
        "num_shards": num_shards,
        "num_ranks": num_ranks,
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/plan.json."""
    parser = argparse.ArgumentParser(description="Start of a rank on 100M samples in 10,000 shards.")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.run, rank=options.rank, num_ranks=options.ranks, start_seconds=options.started)
        return
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        result = compare(
            Path(folder),
            num_shards=options.shards,
            samples_per_shard=options.samples_per_shard,
            num_ranks=options.ranks,
        )
    table = Table("figure", "value", "bar")
    table.add_row("slowest rank's first batch, imports and all", f"{result['seconds_first_batch']} s", "10 s")
    table.add_row("most memory of a rank", f"{result['gigabytes_per_rank']} GB", "2 GB")
    table.add_row("planning an epoch, each rank, while it trains", f"{result['seconds_plan_per_epoch']} s", "")
    table.add_row("the same with weights", f"{result['seconds_plan_per_epoch_of_weights']} s", "")
    table.add_row("survey, once a job, made by the launcher alone", f"{result['seconds_survey_one_process']} s", "")
    table.add_row("survey, once a job, shared by all ranks", f"{result['seconds_survey_all_ranks']} s", "")
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
