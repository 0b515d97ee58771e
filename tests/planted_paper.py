"""Runs as `make paper` leaves them, with figures of one's choice: what the judge saw, logs of trainings, statistics."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from toyworld.scoring import VERDICT_SCHEMA

NUM_PROMPTS, NUM_OBJECTS = 200, 2


def plant_world(folder: Path, *, nouns: Mapping[str, tuple[float, float]]) -> None:
    """The world's statistics, of each set VN/DN and nouns per image; no shards, as nobody looks at any."""
    world = folder / "world"
    world.mkdir(parents=True, exist_ok=True)
    sets = {
        name: {
            "valid_distinct_nouns": round(100 * valid),
            "distinct_nouns": 100,
            "valid_fraction": valid,
            "total_nouns": 1000,
            "nouns_per_image": per_image,
        }
        for name, (valid, per_image) in nouns.items()
    }
    laion = {"named_in_alt_text": 0.15, "named_in_caption": 0.99, "objects": 5000, "invented_per_caption": 0.003}
    summary = {"dataset_stats": sets, "captioning": {"by_dataset": {"laion": laion}}, "seconds": {"world": 8.0}}
    (world / "summary.json").write_text(json.dumps(summary))


def plant_samples(run: Path, name: str, *, share: float, axes: float | None = None, seed: int = 0) -> None:
    """Pictures that the judge has seen, of whose objects so many are right; `axes` is the score of all axes."""
    chosen = random.Random(f"{name} {seed}")
    rows, samples = [], []
    for number in range(NUM_PROMPTS):
        item = {"shape": "star", "colour": "red", "size": "small", "position": "top"}
        found = [chosen.random() < share for _ in range(NUM_OBJECTS)]
        objects = [{**item, "has_position": is_there, "has_colour": True, "has_shape": True} for is_there in found]
        key = f"prompt_{number:04}"
        row = {"key": key, "file": f"{key}.png", "prompt": f"prompt {number}"}
        samples.append(row)
        rows.append({**row, "objects": objects, "num_extra": 0, "is_right": all(found)})
    folder = run / "samples" / name
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(samples), folder / "samples.parquet")
    for row in samples[::25]:
        Image.new("RGB", (16, 16), "red").save(folder / row["file"])
    (run / "judge").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA), run / "judge" / f"{name}.parquet")
    score = share if axes is None else axes
    names = ("colour_binding", "shape_binding", "spatial", "complex", "count")
    figures = [{"name": axis, "score": score, "num_images": NUM_PROMPTS} for axis in names]
    (run / "judge" / f"{name}.json").write_text(json.dumps({"axes": figures}))


def plant_training(run: Path, stage: str, *, num_steps: int, seconds_per_step: float, gigabytes: float = 0.7) -> None:
    """The log of a stage, a line every ten steps."""
    folder = run / "training" / stage
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step,
            "num_samples_seen": 64 * step,
            "loss": 0.1,
            "elapsed_seconds": seconds_per_step * step,
            "peak_memory_gigabytes": gigabytes,
            "device_days": 2 * seconds_per_step * step / 86_400,
            "dollars": 0.001,
            "co2_kilograms": 0.0001,
        }
        for step in range(10, num_steps + 1, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
