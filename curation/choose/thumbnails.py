"""Small pictures and captions of the samples that a page shows; of all others no image is read."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from curation.choose.picks import Example
from pipelines.columns.choices import Choice
from pipelines.columns.columns_folders import MAIN_CAPTION
from pipelines.columns.evaluation import kind_of
from pipelines.command import Command
from pipelines.engine.pieces import Source
from pipelines.raw.images import SampleReject, decode_image
from pipelines.raw.shard_names import shard_name
from pipelines.raw.shards import describe_shards, open_shard
from pipelines.recipe import DataConfig

THUMBNAIL_PIXELS, THUMBNAIL_QUALITY = 176, 72
CAPTION_CHARACTERS = 400
NUM_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is shown of a sample: a data URL, empty where its image cannot be decoded, and its caption or alt text."""

    image: str
    caption: str


def show_examples(
    examples: Iterable[Example], choice: Choice, *, paths: Sequence[str], command: Command
) -> dict[tuple[str, str], Shown]:
    """Return what is shown of each example, by shard and key; `paths` are those of the raw shards."""
    keys: dict[str, dict[str, None]] = {}
    for example in examples:
        keys.setdefault(example.shard, {})[example.key] = None
    data = command.recipe.table("data", DataConfig)
    # Their headers are remembered, and of large shards read once for all pages and commands.
    needed = [path for path in paths if shard_name(path) in keys]
    sources = {each.source.name: each.source for each in describe_shards(needed, data.reading, run=command.run)}

    def show(shard: str) -> dict[tuple[str, str], Shown]:
        captions = _captions(choice, shard, keys[shard])
        images = _thumbnails(sources[shard], keys[shard], data=data, command=command)
        return {(shard, key): Shown(image=images.get(key, ""), caption=captions.get(key, "")) for key in keys[shard]}

    found: dict[tuple[str, str], Shown] = {}
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for shown in pool.map(show, sorted(keys)):
            found |= shown
    return found


def _captions(choice: Choice, shard: str, keys: Mapping[str, None]) -> dict[str, str]:
    schema = choice.columns.schema()
    names = [name for name in (MAIN_CAPTION, "alt_text") if name in schema.names]
    names = [name for name in names if kind_of(schema.field(name).type) == "text"]
    if not names:
        return {}
    found = {}
    for row in choice.columns.read(shard, names).to_pylist():
        if row["key"] in keys:
            found[row["key"]] = " ".join(next((row[name] for name in names if row[name]), "").split())
    return {key: _cut(text) for key, text in found.items()}


def _cut(text: str) -> str:
    return text if len(text) <= CAPTION_CHARACTERS else f"{text[: CAPTION_CHARACTERS - 1]}…"


def _thumbnails(source: Source, keys: Mapping[str, None], *, data: DataConfig, command: Command) -> dict[str, str]:
    images = {}
    with open_shard(source.path, data.reading, run=command.run, identity=source.identity) as raw:
        wanted = [sample for sample in raw.samples if sample.key in keys and sample.reject is None]
        for sample in wanted:
            try:
                image = decode_image(raw.image_bytes(sample), max_pixels=data.max_pixels)
            except SampleReject:
                continue  # the page says that there is no image
            image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            buffer = io.BytesIO()
            image.save(buffer, format="WEBP", quality=THUMBNAIL_QUALITY)
            images[sample.key] = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return images
