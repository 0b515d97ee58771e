"""Pictures of the run's page: captioned images with their truth, and samples with the judge's marks, embedded."""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from errors import MissingFileError
from pipelines.raw.images import decode_image
from pipelines.raw.shard_names import shard_name
from pipelines.raw.shards import open_shard
from pipelines.recipe import DataConfig
from pipelines.run_memory import run_shards
from pipelines.store.png_files import read_picture
from pipelines.store.tables import MEND_SHARD, read_table, sound_table
from toyworld.config import ToyworldConfig
from toyworld.mending import mend_sample, mend_world
from toyworld.scenes import Scene, SceneObject, class_name
from toyworld.scoring import class_of, read_samples, read_verdicts

MAX_SIDE_PIXELS = 160  # of embedded pictures: sharp on a phone, small in the file
MISSES_SHOWN = 4  # one in so many captions shown is a miss, if there are any


@dataclass(frozen=True)
class Mark:
    """One object of a scene, and whether it was found; `fault` says what is wrong."""

    text: str
    is_right: bool
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class CaptionExample:
    """An image of a raw shard with the text it came with, its caption, and the truth."""

    shard: str
    key: str
    picture: str
    alt_text: str
    caption: str
    marks: list[Mark]


@dataclass(frozen=True, kw_only=True)
class SampleExample:
    """A sampled image with its prompt; no marks where the prompt's scene is unknown."""

    key: str
    picture: str
    width: int
    height: int
    prompt: str
    marks: list[Mark]
    num_extra: int


def _object_text(item: SceneObject) -> str:
    return f"{item.size} {item.colour} {item.shape}, {item.position}"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def embed_picture(image: Image.Image) -> str:
    """Return a data URI of the image, made smaller if it is large."""
    image = image.copy()
    image.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def caption_examples(run: Path, data: DataConfig, *, count: int) -> list[CaptionExample]:
    """Return captions spread evenly over all scored ones, a quarter of them misses if there are so many.

    Empty where the captions have not been scored against the toy world's truth.

    Raises:
        MissingFileError: a shard that was captioned is not there any more.
    """
    hits_path = run / "judge" / "captions.parquet"
    if not hits_path.is_file():
        return []
    rows = read_table(hits_path, ["key", "shard", "hits"], mend=MEND_SHARD).to_pylist()
    missed = spread([row for row in rows if not all(row["hits"])], count // MISSES_SHOWN)
    chosen = missed + spread([row for row in rows if all(row["hits"])], count - len(missed))
    chosen.sort(key=lambda row: (row["shard"], row["key"]))
    paths = {shard_name(path): path for path in run_shards(run, data, is_recipe_typed=True)}
    examples = []
    for shard, group in _by_shard(chosen).items():
        if shard not in paths:
            raise MissingFileError(f"data.shards: captions exist for {shard}, but the shard is not there")
        examples += _shard_examples(run, data, paths[shard], group)
    return examples


def _by_shard(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["shard"]].append(row)
    return groups


def _shard_examples(run: Path, data: DataConfig, path: str, rows: Sequence[Mapping[str, Any]]) -> list[CaptionExample]:
    shard = shard_name(path)
    columns = ["key", "alt_text", "caption"]
    captions = read_table(run / "captions" / f"{shard}.parquet", columns, mend=MEND_SHARD)
    texts = {row["key"]: row for row in captions.to_pylist()}
    scenes = _read_scenes(run, shard)
    examples = []
    with open_shard(path, data.reading) as raw:
        samples = {sample.key: sample for sample in raw.samples}
        for row in rows:
            key = row["key"]
            image = decode_image(raw.image_bytes(samples[key]), max_pixels=data.max_pixels)
            marks = [
                Mark(_object_text(item), is_right)
                for item, is_right in zip(scenes[key].objects, row["hits"], strict=True)
            ]
            examples.append(
                CaptionExample(
                    shard=shard,
                    key=key,
                    picture=embed_picture(image),
                    alt_text=texts[key]["alt_text"] or "",
                    caption=texts[key]["caption"],
                    marks=marks,
                )
            )
    return examples


def _read_scenes(run: Path, shard: str) -> dict[str, Scene]:
    path = run / "raw" / "truth.parquet"
    with sound_table(path, mend=mend_world()):
        table = pq.read_table(path, columns=["key", "scene"], filters=[("shard", "=", shard)])
    return {row["key"]: Scene.from_json(row["scene"]) for row in table.to_pylist()}


def sample_examples(config: ToyworldConfig, run: Path, folder: Path) -> list[SampleExample]:
    """Return samples of a folder such as `samples/stage2`, evenly spaced, marked where the judge has seen them."""
    # Prompts of one's own, without a world of known scenes, are nothing to judge by.
    has_scenes = (run / "raw" / "prompts.jsonl").is_file()
    verdicts = {row["file"]: row for row in read_verdicts(config, run, folder)} if has_scenes else {}
    examples = []
    for row in spread(read_samples(folder), config.num_report_examples):
        verdict = verdicts.get(row["file"])
        picture = embed_picture(read_picture(folder / row["file"], mend=mend_sample()))
        examples.append(
            SampleExample(
                key=row["key"],
                picture=picture,
                width=row["width"],
                height=row["height"],
                prompt=_prompt_text(row),
                marks=[_sample_mark(item) for item in verdict["objects"]] if verdict else [],
                num_extra=verdict["num_extra"] if verdict else 0,
            )
        )
    return examples


def _prompt_text(sample: Mapping[str, Any]) -> str:
    """The prompt, or for a class-conditional sample what its class shows."""
    label = class_of(sample["prompt"])
    return sample["prompt"] if label is None else f"{sample['prompt']}: {class_name(label)}"


def _sample_mark(found: Mapping[str, Any]) -> Mark:
    item = SceneObject(found["shape"], found["colour"], found["size"], found["position"])
    # A class says nothing of size and place.
    text = _object_text(item) if item.size else f"{item.colour} {item.shape}"
    if not found["has_position"]:
        return Mark(text, is_right=False, fault="missing")
    wrong = [axis for axis in ("colour", "shape") if not found[f"has_{axis}"]]
    return Mark(text, is_right=not wrong, fault=f"wrong {' and '.join(wrong)}" if wrong else "")
