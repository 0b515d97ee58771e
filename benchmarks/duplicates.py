"""`make bench-duplicates`: near hashes by bands against all pairs, time and memory of many, what is found of copies.

Hashes are drawn so that their bits agree more often than by chance, as those of pictures do, with a twentieth of them
copied and up to four bits turned. Ten million are grouped in a process of its own, whose peak memory is taken, and a
million with cropped views; a hundred million are reckoned from that. Then planted copies of toy pictures and of
pictures like photographs are looked for, through the same code as `make columns`.
"""

import argparse
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit
from PIL import Image
from rich.console import Console
from rich.table import Table

from curation.cores import num_cores
from curation.duplicates.banding import MAX_EXTRA_BLOCKS, Bands, NearHashes, choose_bands, dealt, expected_work
from curation.duplicates.finding import Looking, find_duplicates
from curation.duplicates.gathering import Part, Samples, gather
from curation.hashing import EXACT_BYTES, THUMBNAIL_BYTES, exact_hash, perceptual_hashes, thumbnail
from toyworld.copies import COPIES, Planted, photo_likes, plant, toy_pictures

RESULT = Path(__file__).parent / "results" / "duplicates.json"
RADIUS = 4
NUM_ALL_PAIRS = 200_000
NUM_MANY = 10_000_000
NUM_RECKONED = 100_000_000
NUM_VIEWS = 15
CROPS_PART = 10  # with sixteen times the queries, so many times fewer samples
COPIED_SHARE = 0.05
NUM_LATENT = 24
NUM_THUMBNAILS = 1 << 12
ROWS_AT_ONCE = 1 << 18
NUM_TOYS, NUM_PHOTOS = 2_000, 800


def draw_hashes(num: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes, uint64 [num], and the number of the original of each: signs of a few mixed numbers, and noise."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((NUM_LATENT, 64), np.float32)
    num_originals = round(num / (1 + COPIED_SHARE))
    hashes = np.empty(num, np.uint64)
    for start in range(0, num_originals, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, num_originals - start)
        latent = rng.standard_normal((rows, NUM_LATENT), np.float32) @ mix
        bits = latent + 2 * rng.standard_normal((rows, 64), np.float32) > 0
        hashes[start : start + rows] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    originals = np.arange(num)
    originals[num_originals:] = rng.choice(num_originals, num - num_originals, replace=False)
    copies = hashes[originals[num_originals:]]
    for _ in range(RADIUS):
        turned = np.uint64(1) << rng.integers(64, size=len(copies), dtype=np.uint64)
        copies ^= np.where(rng.random(len(copies)) < 0.5, turned, np.uint64(0))
    hashes[num_originals:] = copies
    return hashes, originals


@njit(nogil=True)
def all_pairs(hashes: np.ndarray, radius: int) -> int:
    """Return how many pairs are near, each compared with each."""
    num = 0
    for first in range(len(hashes)):
        for second in range(first + 1, len(hashes)):
            value = hashes[first] ^ hashes[second]
            value -= (value >> np.uint64(1)) & np.uint64(0x5555555555555555)
            value = (value & np.uint64(0x3333333333333333)) + ((value >> np.uint64(2)) & np.uint64(0x3333333333333333))
            value = (value + (value >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
            num += ((value * np.uint64(0x0101010101010101)) >> np.uint64(56)) <= radius
    return num


def compare_with_all_pairs(num: int) -> dict[str, Any]:
    """Return CPU seconds of both ways, one thread each, on the same hashes; both must find as many."""
    hashes = np.unique(draw_hashes(num)[0])
    all_pairs(hashes[:100], RADIUS)
    NearHashes(hashes[:1000], RADIUS).pairs()
    start = time.process_time()
    expected = all_pairs(hashes, RADIUS)
    middle = time.process_time()
    found = len(NearHashes(hashes, RADIUS).pairs())
    by_bands = time.process_time() - middle
    assert found == expected, (found, expected)
    return {
        "ratio_all_pairs": round((middle - start) / by_bands, 1),
        "num_hashes": len(hashes),
        "num_pairs": found,
        "cpu_seconds_all_pairs": round(middle - start, 2),
        "cpu_seconds_bands": round(by_bands, 2),
    }


@dataclass(frozen=True, kw_only=True)
class DrawnSamples(Samples):
    """Samples whose thumbnails are drawn: one of some thousand for each original."""

    originals: np.ndarray

    def thumbnails(self, involved: np.ndarray) -> np.ndarray:
        """Return noise, the same for all copies of an original."""
        rng = np.random.default_rng(1)
        some = rng.integers(0, 256, (NUM_THUMBNAILS, THUMBNAIL_BYTES), np.uint8)
        path = self.scratch / "thumbnails"
        rows = np.flatnonzero(involved) if involved.any() else np.zeros(1, np.int64)
        with path.open("wb") as file:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                file.write(some[self.originals[rows[start : start + ROWS_AT_ONCE]] % NUM_THUMBNAILS].tobytes())
        return np.memmap(path, np.uint8, "c").view(np.ndarray).reshape(-1, THUMBNAIL_BYTES)


def group_many(num: int, crops: bool) -> dict[str, Any]:
    """Group drawn samples in this process; return seconds, peak memory, and how many copies are found."""
    with tempfile.TemporaryDirectory(prefix="bench-duplicates-") as folder:
        hashes, originals = draw_hashes(num)
        rng = np.random.default_rng(2)
        path = Path(folder) / "views"
        with path.open("wb") as file:
            for _ in range(NUM_VIEWS if crops else 0):
                # A quarter of the bits turned: spread as hashes are, and hardly ever near one.
                turned = rng.integers(0, 1 << 64, size=(2, num), dtype=np.uint64)
                file.write(dealt(rng.permutation(hashes) ^ turned[0] & turned[1]).tobytes())
        none = np.empty(0, np.uint64)
        samples = DrawnSamples(
            parts=[],
            starts=np.array([0, num]),
            hashes=hashes,
            exact=np.stack([np.arange(num, dtype=np.uint64), hashes], axis=1),
            preferred=np.arange(num, dtype=np.uint32),
            num_unknown=0,
            views=np.memmap(path, np.uint64, "c").view(np.ndarray) if crops else none,
            mirrored=none,
            scratch=Path(folder),
            originals=originals,
        )
        looking = Looking(radius=RADIUS, crops=crops, mirror=False)
        small = np.arange(1000)
        few = replace(
            samples,
            starts=np.array([0, 1000]),
            hashes=hashes[:1000],
            exact=samples.exact[:1000],
            preferred=samples.preferred[:1000],
            views=samples.views[: 1000 * NUM_VIEWS],
            originals=small,
        )
        find_duplicates(few, looking, num_threads=1)  # compiles
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        groups = find_duplicates(samples, looking, num_threads=num_cores())
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        is_copy = originals != np.arange(num)
        found = groups.kind > 0
        unique, per_hash = dealt(np.unique(hashes)), NUM_VIEWS + 1 if crops else 1
        bands = choose_bands(unique, RADIUS, queries_per_hash=per_hash)
        now, then = (
            min(
                expected_work(Bands.of(RADIUS, blocks), unique, scale, queries_per_hash=per_hash)
                for blocks in range(RADIUS + 1, RADIUS + 1 + MAX_EXTRA_BLOCKS + 1)
            )
            for scale in (num, NUM_RECKONED)
        )
        return {
            "num_samples": num,
            "crops": crops,
            "num_bands": len(bands.chosen),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "peak_gigabytes": round(after.ru_maxrss * 1024 / 1e9, 2),
            "recall_of_copies": round(float(found[is_copy].mean()), 5),
            "duplicates_that_are_none": int((found & ~is_copy).sum()),
            "reckoned_100m_cpu_hours": round(cpu_seconds * then / now / 3600, 2),
            "reckoned_100m_gigabytes": round(after.ru_maxrss * 1024 / 1e9 * NUM_RECKONED / num, 1),
        }


def in_process(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Return what a function gives in a process of its own, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def find_planted(planted: Sequence[Planted], *, mirror: bool) -> dict[str, float]:
    """Return recall and precision of copies, without `mirror` of those that no mirror shows."""
    planted = [each for each in planted if mirror or each.kind != "mirrored"]
    images = [Image.open(io.BytesIO(each.data)).convert("RGB") for each in planted]
    small = np.stack([thumbnail(np.asarray(image)) for image in images])
    exact = pa.array([exact_hash(each.data) for each in planted], pa.binary(EXACT_BYTES))
    table = pa.table(
        {
            "key": [str(row) for row in range(len(planted))],
            "hashes.exact_hash": exact,
            "hashes.perceptual_hash": perceptual_hashes(small),
            "hashes.thumbnail": pa.array([each.tobytes() for each in small], pa.binary(THUMBNAIL_BYTES)),
        }
    )
    sizes = np.array([image.width * image.height for image in images], np.float64)
    part = Part(name="", run=0, read=lambda: table, preferences=lambda keys: sizes)
    with tempfile.TemporaryDirectory(prefix="bench-duplicates-") as folder:
        samples = gather([part], Path(folder), crops=True, mirror=mirror, num_threads=num_cores())
        groups = find_duplicates(samples, Looking(radius=RADIUS, crops=True, mirror=mirror), num_threads=num_cores())
    originals = np.array([each.original for each in planted])
    is_right = (groups.kind > 0) & (originals[groups.leader] == originals)
    num_copies = sum(each.kind != "original" for each in planted)
    return {
        "recall": round(float(is_right.sum() / num_copies), 4),
        "precision": round(float(is_right.sum() / max(1, (groups.kind > 0).sum())), 4),
        "num_copies": num_copies,
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/duplicates.json."""
    parser = argparse.ArgumentParser(description="Near duplicates: bands against all pairs, many hashes, and copies.")
    parser.add_argument("--hashes", type=int, default=NUM_MANY, help="samples that are grouped, with drawn hashes")
    options = parser.parse_args()
    result: dict[str, Any] = compare_with_all_pairs(NUM_ALL_PAIRS)
    result["many"] = [
        in_process(group_many, options.hashes, False),
        in_process(group_many, options.hashes // CROPS_PART, True),
    ]
    result["planted"] = {}
    for name, pictures in (("toy", toy_pictures(NUM_TOYS)), ("like photographs", photo_likes(NUM_PHOTOS))):
        planted = plant(pictures, kinds=list(COPIES))
        result["planted"][name] = find_planted(planted, mirror=False)
        result["planted"][f"{name}, mirrored ones, too"] = find_planted(planted, mirror=True)
    result |= {name: version(name) for name in ("numpy", "numba")}
    result["python"] = sys.version.split()[0]
    table = Table("what", "figures")
    table.add_row("bands against all pairs", f"{result['ratio_all_pairs']} times, {result['num_hashes']:,} hashes")
    for many in result["many"]:
        table.add_row(f"{many['num_samples']:,} samples{', crops' if many['crops'] else ''}", str(many))
    for name, found in result["planted"].items():
        table.add_row(name, str(found))
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
