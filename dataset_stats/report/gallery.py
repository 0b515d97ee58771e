"""Example images with their texts for the report."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataset_stats.captions import Address, RawOpening, read_rows
from dataset_stats.example_places import ROW_BITS
from pipelines.engine.pieces import Source
from pipelines.raw.images import SampleReject, decode_image
from pipelines.raw.shard_names import shard_name
from pipelines.raw.shards import open_shard
from pipelines.store.tables import MEND_SHARD, read_table_schema

THUMBNAIL_PIXELS = 288
THUMBNAIL_QUALITY = 78
MAX_GALLERY_SHARDS = 6
MAX_ROWS = 1 << ROW_BITS


@dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """One sampled image; `image` is a data URL, empty where the raw shard is not at hand."""

    key: str
    shard: str
    image: str
    texts: dict[str, str]  # by caption set, "alt text" where no set shows it


def sample_gallery(
    sources: Mapping[str, Sequence[Source]],
    raw_shards: Sequence[str],
    *,
    opening: RawOpening,
    num_images: int,
    seed: int,
    max_pixels: int,
) -> list[GalleryItem]:
    """Sampled images with the texts that the sets have about them; the same seed gives the same sample.

    Only sets over this pipeline's captions take part, since only there the key leads back to the image.
    """
    by_shard: dict[str, dict[str, Address]] = {}
    for name, shard_sources in sources.items():
        for source in shard_sources:
            address = Address.parse(source.path)
            if address.layout == "captions":
                by_shard.setdefault(address.shard, {})[name] = address
    if not by_shard or not num_images:
        return []
    rng = random.Random(seed)
    raw_paths = {shard_name(path): path for path in raw_shards}
    shards = _choose_shards(by_shard, rng)
    items: list[GalleryItem] = []
    for number, shard in enumerate(shards):
        share = (num_images - len(items)) // (len(shards) - number)
        chosen = _choose_texts(by_shard[shard], share, rng, opening=opening)
        raw_path = raw_paths.get(shard)
        images = _thumbnails(raw_path, [*chosen], opening=opening, max_pixels=max_pixels) if raw_path else {}
        items += [
            GalleryItem(key=key, shard=shard, image=images.get(key, ""), texts=texts) for key, texts in chosen.items()
        ]
    return items


def _choose_shards(by_shard: Mapping[str, Mapping[str, Address]], rng: random.Random) -> list[str]:
    """Shards with several texts per image first, since comparing them is what the gallery is for."""
    most = max(len(sets) for sets in by_shard.values())
    rich = sorted(shard for shard, sets in by_shard.items() if len(sets) == most)
    others = sorted(by_shard.keys() - set(rich))
    chosen = rng.sample(rich, min(MAX_GALLERY_SHARDS - min(2, len(others)), len(rich)))
    return sorted(chosen) + sorted(rng.sample(others, min(MAX_GALLERY_SHARDS - len(chosen), len(others))))


def _choose_texts(
    sets: Mapping[str, Address], count: int, rng: random.Random, *, opening: RawOpening
) -> dict[str, dict[str, str]]:
    """Return the texts of some samples of a shard, by key and set, of which every set has one."""
    addresses = dict(sets)
    any_address = next(iter(sets.values()))
    if all(address.column != "alt_text" for address in sets.values()) and _has_alt_texts(any_address.path):
        addresses = {"alt text": replace(any_address, column="alt_text"), **addresses}
    texts: dict[str, dict[str, str]] = {}
    for name, address in addresses.items():
        for block in read_rows(address, 0, MAX_ROWS, opening=opening):
            for row in block:
                if row.reject is None and row.text:
                    texts.setdefault(row.key, {})[name] = row.text
    complete = sorted(key for key, found in texts.items() if all(name in found for name in sets))
    return {key: texts[key] for key in sorted(rng.sample(complete, min(count, len(complete))))}


def _has_alt_texts(path: str) -> bool:
    return "alt_text" in read_table_schema(Path(path), mend=MEND_SHARD).names


def _thumbnails(raw_path: str, keys: Sequence[str], *, opening: RawOpening, max_pixels: int) -> dict[str, str]:
    images = {}
    with open_shard(raw_path, opening.reading, run=opening.run) as raw:
        by_key = {sample.key: sample for sample in raw.samples if sample.reject is None}
        for key in keys:
            if key not in by_key:
                continue
            try:
                image = decode_image(raw.image_bytes(by_key[key]), max_pixels=max_pixels)
            except SampleReject:
                continue  # its row says so; the gallery shows the text alone
            image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            buffer = io.BytesIO()
            image.save(buffer, format="WEBP", quality=THUMBNAIL_QUALITY)
            images[key] = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return images
