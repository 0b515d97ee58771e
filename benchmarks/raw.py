"""`make bench-raw`: what a sample costs to be found and read, image and text, by the way in which raw shards come.

Each way is read as a command does: its shards are looked at (headers, files, identity), then opened one after another
and every image and text is read. A second command finds what the first has remembered.
The page cache is warm for all ways.
"""

import argparse
import io
import json
import shutil
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines.raw.patterns import expand_shards
from pipelines.raw.shards import describe_shards, open_shard

RESULT = Path(__file__).parent / "results" / "raw.json"
NUM_SAMPLES = 50_000  # of two files each
NUM_ONE_SAMPLE_SHARDS = 400
IMAGE_BYTES = 8_000
NUM_ROUNDS = 3
ROW_GROUP_ROWS = 1_000


def write_samples(folder: Path, num_samples: int) -> dict[str, Path]:
    """Write the same samples in each way; returns what is typed as SHARDS of each."""
    images = np.random.default_rng(0).bytes(IMAGE_BYTES + num_samples)
    samples = [(f"{i:08d}", images[i : i + IMAGE_BYTES], f"caption {i} of a picture") for i in range(num_samples)]
    places = {name: folder / name for name in ("tar", "folder", "one_sample_tars", "parquet")}
    for place in places.values():
        place.mkdir()
    write_tar(places["tar"] / "photos.tar", samples)
    for key, image, text in samples:
        (places["folder"] / f"{key}.jpg").write_bytes(image)
        (places["folder"] / f"{key}.txt").write_text(text)
    for sample in samples[:NUM_ONE_SAMPLE_SHARDS]:
        write_tar(places["one_sample_tars"] / f"shard_{sample[0]}.tar", [sample])
    keys, payloads, texts = zip(*samples, strict=True)
    table = pa.table({"key": keys, "image": payloads, "text": texts})
    pq.write_table(table, places["parquet"] / "photos.parquet", row_group_size=ROW_GROUP_ROWS)
    return places


def write_tar(path: Path, samples: list[tuple[str, bytes, str]]) -> None:
    """Write samples of key, image and text."""
    with tarfile.open(path, "w") as tar:
        for key, image, text in samples:
            for extension, data in (("jpg", image), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def read_all(place: Path, run: Path) -> int:
    """Read every image and text, as a command of `run` does; returns the number of samples."""
    num_read = 0
    for shard in describe_shards(expand_shards(str(place)), run=run):
        with open_shard(shard.source.path, run=run, identity=shard.source.identity) as raw:
            for sample in raw.samples:
                assert len(raw.image_bytes(sample)) == IMAGE_BYTES and raw.alt_text(sample), sample.key
                num_read += 1
    return num_read


def seconds_per_sample(place: Path, run: Path) -> tuple[float, float]:
    """Return the wall-clock seconds of a sample in a first command, and in the next."""
    shutil.rmtree(run, ignore_errors=True)
    seconds = []
    for _ in range(2):
        start_seconds = time.perf_counter()
        num_read = read_all(place, run)
        seconds.append((time.perf_counter() - start_seconds) / num_read)
    return seconds[0], seconds[1]


def compare(folder: Path, num_samples: int) -> dict[str, object]:
    """Return microseconds a sample of each way, the best of some rounds in turns, and how many times one tar it is."""
    places = write_samples(folder, num_samples)
    best: dict[str, tuple[float, float]] = {}
    for _ in range(NUM_ROUNDS):
        for name, place in places.items():
            found = seconds_per_sample(place, folder / "run")
            first, second = best.get(name, found)
            best[name] = min(first, found[0]), min(second, found[1])
    ratios = {f"ratio_{name}": round(best[name][0] / best["tar"][0], 2) for name in places if name != "tar"}
    return {
        **ratios,
        "microseconds_first": {name: round(1e6 * seconds, 1) for name, (seconds, _) in best.items()},
        "microseconds_again": {name: round(1e6 * seconds, 1) for name, (_, seconds) in best.items()},
        "num_samples": num_samples,
        "num_one_sample_tars": NUM_ONE_SAMPLE_SHARDS,
        "image_bytes": IMAGE_BYTES,
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/raw.json."""
    parser = argparse.ArgumentParser(description="Samples from tars, folders and Parquet, per sample against one tar.")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="samples, of two files each in a folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-raw-") as folder:
        result = compare(Path(folder), options.samples)
    result |= {name: version(name) for name in ("pyarrow", "numpy")}
    table = Table("way", "µs a sample", "next command", "times one tar")
    first, again = result["microseconds_first"], result["microseconds_again"]
    assert isinstance(first, dict) and isinstance(again, dict)
    for name in first:
        table.add_row(name, f"{first[name]:,}", f"{again[name]:,}", f"{result.get(f'ratio_{name}', 1.0)}")
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
