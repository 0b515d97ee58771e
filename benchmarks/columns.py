"""`make bench-columns`: all scores that need no network, in one pass over JPEGs of 512 pixels, on two cores.

Pictures like photographs, in tars, are measured as `make columns` does in one process, from raw shards to finished
columns. Beside it, in turns, one thread decodes the same files by PIL and does nothing else, which no pass can spare.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from curation.choosing import chosen_scores
from curation.columns import make_columns
from curation.config import ColumnsConfig
from curation.job import ColumnsJob
from pipelines.engine.run import EngineConfig
from pipelines.raw.patterns import expand_shards
from pipelines.raw.shards import describe_shards
from pipelines.recipe import DataConfig
from toyworld.copies import as_file, photo_likes

RESULT = Path(__file__).parent / "results" / "columns.json"
SCORES = ("pixels", "hashes")
SIDE_PIXELS = 512
QUALITY = 90
NUM_IMAGES = 2_000
NUM_DIFFERENT = 64
IMAGES_PER_SHARD = 500
NUM_CORES = 2
NUM_ROUNDS = 3
BAR = 350  # images a second


def write_shards(folder: Path, num_images: int) -> list[bytes]:
    """Write tars of pictures, square as they are cut for training, some of them often; return the different files."""
    files = []
    for image in photo_likes(NUM_DIFFERENT, side=SIDE_PIXELS):
        files.append(as_file(image.resize((SIDE_PIXELS, SIDE_PIXELS)), "JPEG", quality=QUALITY))
    for first in range(0, num_images, IMAGES_PER_SHARD):
        with tarfile.open(folder / f"{first // IMAGES_PER_SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + IMAGES_PER_SHARD, num_images)):
                data = files[number % NUM_DIFFERENT]
                info = tarfile.TarInfo(f"{number:08d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return files


def measure_columns(raw: Path, run: Path) -> tuple[float, float]:
    """Make all columns of shards; return seconds of the clock and of the CPU."""
    config, data = ColumnsConfig(scores=SCORES), DataConfig(shards=str(raw))
    clock, cpu = time.perf_counter(), time.process_time()
    shards = describe_shards(expand_shards(str(raw)), data.reading, run=run)
    job = ColumnsJob(
        config=config,
        data=data,
        workers=EngineConfig(in_process=True),
        scores=chosen_scores(config, run),
        sources=[shard.source for shard in shards],
        run=run,
    )
    made = make_columns(job)
    assert all(not manifest.rejected for manifest in made.manifests.values())
    return time.perf_counter() - clock, time.process_time() - cpu


def decode_all(files: list[bytes], num_images: int) -> tuple[float, float]:
    """Decode as many images by PIL, one after another; return seconds of the clock and of the CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    for number in range(num_images):
        Image.open(io.BytesIO(files[number % len(files)])).convert("RGB")
    return time.perf_counter() - clock, time.process_time() - cpu


def compare(folder: Path, num_images: int) -> dict[str, Any]:
    """Return images a second of both, the best of some rounds in turns."""
    raw = folder / "raw"
    raw.mkdir()
    files = write_shards(raw, num_images)
    measure_columns(raw, folder / "run-compiles")
    ours, decoding = [], []
    for number in range(NUM_ROUNDS):
        ours.append(measure_columns(raw, folder / f"run-{number}"))
        decoding.append(decode_all(files, num_images))
    seconds, cpu_seconds = (min(each) for each in zip(*ours, strict=True))
    decode_cpu_seconds = min(cpu for _, cpu in decoding)
    return {
        "images_per_second": round(num_images / seconds),
        "images_per_cpu_second": round(num_images / cpu_seconds),
        "decoded_per_cpu_second": round(num_images / decode_cpu_seconds),
        "ratio_decode": round(decode_cpu_seconds / cpu_seconds, 2),
        "bar": BAR,
        "num_images": num_images,
        "kilobytes_per_image": round(sum(map(len, files)) / len(files) / 1e3, 1),
        "num_cores": NUM_CORES,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/columns.json."""
    parser = argparse.ArgumentParser(description="All columns that need no network, beside decoding alone.")
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="images of the shards")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    with tempfile.TemporaryDirectory(prefix="bench-columns-") as folder:
        result = compare(Path(folder), options.images)
    result |= {name: version(name) for name in ("pillow", "numpy")}
    table = Table("figure", "value")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
