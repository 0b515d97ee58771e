"""A run whose pictures and captions are partly spoilt, with the truth known: what a choice of samples is tried on.

Each picture has its caption as the text beside it, as sets with captions come. Of the three sources one has more than
its share of what is spoilt and one has less. Of spoilt captions half are those of another picture, which costs most.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_file, atomic_write_bytes, exclusive
from toyworld.config import ToyworldConfig
from toyworld.render import render
from toyworld.scenes import Scene, random_scene
from toyworld.shards import Picture, write_img2dataset_shard
from toyworld.spoiling import CAPTION_KINDS, PICTURE_KINDS, spoil_caption, spoil_picture
from toyworld.wording import dense_caption, describe
from toyworld.world import TRUTH_SCHEMA, is_held_out, make_prompts

log = get_logger("toyworld")

# Each source, and how much of it is spoilt: a multiple of the recipe's share.
SOURCES = {"archive": 1.0, "stock": 0.5, "web": 1.5}
SPOILT_PICTURE, SPOILT_CAPTION, IS_SOUND = "spoilt_picture", "spoilt_caption", "is_sound"
SPOILT_SCHEMA = pa.schema(
    [*TRUTH_SCHEMA, (SPOILT_PICTURE, pa.string()), (SPOILT_CAPTION, pa.string()), (IS_SOUND, pa.bool_())]
)
_SWAPPED_PROBABILITY = 0.5
_KEYS_PER_SOURCE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SpoiltSample:
    """One sample: its scene, how picture and caption were spoilt (None: not), and its random stream, which goes on."""

    key: str
    dataset: str
    shard: str
    scene: Scene
    picture_kind: str | None
    caption_kind: str | None
    rng: np.random.Generator


def write_spoilt(config: ToyworldConfig, run: Path) -> None:
    """Write what the demo of curation reads.

    `raw/<source>/` has shards of pictures with their captions; `raw/truth.parquet` a row for each, with its scene, how
    picture and caption were spoilt, and whether both are sound; `raw/prompts.jsonl` unseen scenes, as the world's.
    """
    raw = run / "raw"
    samples: list[SpoiltSample] = []
    with exclusive(raw):
        for name, number, start, stop in _shards(config):
            stem = raw / name / f"{name}_{number:05d}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            drawn = _draw_samples(config, name, number, start=start, stop=stop)
            write_img2dataset_shard(stem, _pictures(config, drawn))
            samples += drawn
        with atomic_file(raw / "truth.parquet") as path:
            pq.write_table(_truth(samples), path)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_prompts(config)]
        atomic_write_bytes(raw / "prompts.jsonl", "".join(lines).encode())
    num_pictures = sum(sample.picture_kind is not None for sample in samples)
    num_captions = sum(sample.caption_kind is not None for sample in samples)
    log.info(
        f"{raw}: {len(samples):,} pictures, {num_pictures:,} of them spoilt, {num_captions:,} with spoilt captions, "
        f"and {config.num_prompts} prompts"
    )


def _shards(config: ToyworldConfig) -> Iterator[tuple[str, int, int, int]]:
    """Yield source, number, and the first and last sample of each shard; sources are of equal size."""
    for place, name in enumerate(SOURCES):
        count = (config.num_spoilt_images + place) // len(SOURCES)
        for number, start in enumerate(range(0, count, config.samples_per_shard)):
            yield name, number, start, min(start + config.samples_per_shard, count)


def _draw_samples(config: ToyworldConfig, name: str, number: int, *, start: int, stop: int) -> list[SpoiltSample]:
    first_key = list(SOURCES).index(name) * _KEYS_PER_SOURCE
    samples = []
    for index in range(start, stop):
        rng = np.random.default_rng([config.seed, zlib.crc32(f"spoilt {name}".encode()), index])
        scene = random_scene(rng)
        while is_held_out(scene):
            scene = random_scene(rng)
        is_picture, is_caption = rng.random(2) < np.multiply(
            SOURCES[name], (config.spoilt_picture_fraction, config.spoilt_caption_fraction)
        )
        samples.append(
            SpoiltSample(
                key=f"{first_key + index:09d}",
                dataset=name,
                shard=f"{name}_{number:05d}",
                scene=scene,
                picture_kind=PICTURE_KINDS[rng.integers(len(PICTURE_KINDS))] if is_picture else None,
                caption_kind=_caption_kind(rng) if is_caption else None,
                rng=rng,
            )
        )
    return samples


def _caption_kind(rng: np.random.Generator) -> str:
    others = [kind for kind in CAPTION_KINDS if kind != "swapped"]
    return "swapped" if rng.random() < _SWAPPED_PROBABILITY else others[rng.integers(len(others))]


def _pictures(config: ToyworldConfig, samples: Sequence[SpoiltSample]) -> Iterator[Picture]:
    for sample in samples:
        rng = sample.rng
        side = int(rng.integers(config.min_side_pixels, config.max_side_pixels + 1))
        image = render(sample.scene, side, side, rng=rng)
        caption = dense_caption(sample.scene, rng)
        if sample.picture_kind is not None:
            image = Image.fromarray(spoil_picture(np.asarray(image), sample.picture_kind, rng=rng))
        if sample.caption_kind is not None:
            caption = spoil_caption(caption, sample.caption_kind, scene=sample.scene, rng=rng)
        yield Picture(key=sample.key, scene=sample.scene, image=image, alt_text=caption, is_broken=False, rng=rng)


def _truth(samples: Sequence[SpoiltSample]) -> pa.Table:
    rows = [
        {
            "key": sample.key,
            "dataset": sample.dataset,
            "shard": sample.shard,
            "scene": sample.scene.to_json(),
            "description": describe(sample.scene),
            SPOILT_PICTURE: sample.picture_kind,
            SPOILT_CAPTION: sample.caption_kind,
            IS_SOUND: sample.picture_kind is None and sample.caption_kind is None,
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=SPOILT_SCHEMA)
