"""Raw shards as their makers ship them: img2dataset tars, SA-1B tars and ImageNet-style tars, with repeatable bytes."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.store.files import atomic_file, atomic_write_json
from toyworld.render import ANCHORS, OBJECT_RGB, RADIUS_FRACTIONS
from toyworld.scenes import Scene, SceneObject, class_label

JPEG_QUALITY = 95
WRITTEN_AT_SECONDS = 1_700_000_000  # what a maker's clock would have said; fixed, so that rewriting gives equal bytes
KEPT_FRACTION_OF_BROKEN = 0.4
ORIGINAL_SCALES = (1.0, 1.5, 2.0, 4.0)
MASK_COLOUR_DISTANCE = 40
IMG2DATASET_SUFFIXES = (".tar", ".parquet", "_stats.json")
TAR_ONLY_SUFFIXES = (".tar",)
IMG2DATASET_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A scene that has been drawn, and what goes beside it in a shard; `rng` continues the sample's own stream."""

    key: str
    scene: Scene
    image: Image.Image
    alt_text: str
    is_broken: bool
    rng: np.random.Generator


def write_img2dataset_shard(stem: Path, pictures: Iterable[Picture]) -> None:
    """Write `<stem>.tar`, `.parquet` and `_stats.json` as img2dataset's webdataset writer lays them out.

    Members of a sample are `.jpg`, `.json`, `.txt` (webdataset sorts them); the JSON, the text and the Parquet row say
    the same. Broken pictures are cut short and still have status `success`, as a download that lost its tail does.
    """
    rows: list[dict[str, Any]] = []
    with atomic_file(_with_suffix(stem, ".parquet")) as parquet_path:
        with _open_tar(_with_suffix(stem, ".tar")) as tar:
            for picture in pictures:
                data = _encode_jpeg(picture.image)
                if picture.is_broken:
                    data = data[: int(len(data) * KEPT_FRACTION_OF_BROKEN)]
                row = _img2dataset_row(picture, data)
                _add_member(tar, f"{picture.key}.jpg", data)
                _add_member(tar, f"{picture.key}.json", json.dumps(row, indent=4).encode())
                _add_member(tar, f"{picture.key}.txt", picture.alt_text.encode())
                rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows, schema=IMG2DATASET_SCHEMA), parquet_path)
    atomic_write_json(_with_suffix(stem, "_stats.json"), _img2dataset_stats(len(rows)))


def _img2dataset_row(picture: Picture, data: bytes) -> dict[str, Any]:
    scale = ORIGINAL_SCALES[picture.rng.integers(len(ORIGINAL_SCALES))]
    digest = hashlib.sha256(data).hexdigest()
    return {
        "caption": picture.alt_text,
        "url": f"https://img{int(digest[0], 16)}.example.com/{digest[1:3]}/{digest[3:15]}.jpg",
        "key": picture.key,
        "status": "success",
        "error_message": None,
        "width": picture.image.width,
        "height": picture.image.height,
        "original_width": round(picture.image.width * scale),
        "original_height": round(picture.image.height * scale),
        "exif": "{}",
        "sha256": digest,
    }


def _img2dataset_stats(num_images: int) -> dict[str, Any]:
    return {
        "count": num_images,
        "successes": num_images,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 1.0,
        "start_time": float(WRITTEN_AT_SECONDS),
        "end_time": WRITTEN_AT_SECONDS + 1.0,
        "status_dict": {"success": num_images},
    }


def write_sa1b_shard(stem: Path, pictures: Iterable[Picture]) -> None:
    """Write `<stem>.tar` in SA-1B's layout: `./sa_N.jpg` and `./sa_N.json` with one mask per object."""
    with _open_tar(_with_suffix(stem, ".tar")) as tar:
        for picture in pictures:
            _add_member(tar, f"./{picture.key}.jpg", _encode_jpeg(picture.image))
            _add_member(tar, f"./{picture.key}.json", json.dumps(_sa1b_record(picture)).encode())


def _sa1b_record(picture: Picture) -> dict[str, Any]:
    image_id = int(picture.key.removeprefix("sa_"))
    return {
        "image": {
            "image_id": image_id,
            "width": picture.image.width,
            "height": picture.image.height,
            "file_name": f"{picture.key}.jpg",
        },
        "annotations": [
            _sa1b_annotation(picture, item, annotation_id=1000 * image_id + number)
            for number, item in enumerate(picture.scene.objects)
        ],
    }


def _sa1b_annotation(picture: Picture, item: SceneObject, *, annotation_id: int) -> dict[str, Any]:
    mask = object_mask(picture.image, item)
    ys, xs = np.nonzero(mask)
    point = picture.rng.integers(len(xs))
    return {
        "bbox": [float(xs.min()), float(ys.min()), float(np.ptp(xs) + 1), float(np.ptp(ys) + 1)],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": encode_rle(mask)},
        "predicted_iou": round(float(picture.rng.uniform(0.88, 1.05)), 6),
        "point_coords": [[float(xs[point]), float(ys[point])]],
        "crop_box": [0.0, 0.0, float(picture.image.width), float(picture.image.height)],
        "id": annotation_id,
        "stability_score": round(float(picture.rng.uniform(0.95, 1.0)), 6),
    }


def object_mask(image: Image.Image, item: SceneObject) -> np.ndarray:
    """Return which pixels an object covers (bool, height x width): those of its colour, around its anchor."""
    pixels = np.asarray(image, dtype=np.int16)
    height, width, _ = pixels.shape
    x, y = ANCHORS[item.position][0] * width, ANCHORS[item.position][1] * height
    reach = 1.5 * RADIUS_FRACTIONS[item.size] * min(width, height)
    rows, columns = np.ogrid[:height, :width]
    is_near = (abs(columns + 0.5 - x) <= reach) & (abs(rows + 0.5 - y) <= reach)
    return is_near & (abs(pixels - OBJECT_RGB[item.colour]).max(axis=2) <= MASK_COLOUR_DISTANCE)


def encode_rle(mask: np.ndarray) -> str:
    """Return COCO's compressed run lengths of a bool mask (height x width), as in SA-1B's `segmentation.counts`.

    Runs go down the columns and start with zeros; from the fourth on each is stored as the difference to the one two
    before it, in groups of five bits, low group first, with a bit for "more follows", offset by 48 into ASCII.
    """
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    if runs[-1] == 0:
        runs.pop()
    text = bytearray()
    for position, run in enumerate(runs):
        value = run - runs[position - 2] if position > 2 else run
        is_more = True
        while is_more:
            bits = value & 31
            value >>= 5
            is_more = value != (-1 if bits & 16 else 0)
            text.append((bits | (32 if is_more else 0)) + 48)
    return text.decode("ascii")


def write_imagenet_shard(stem: Path, pictures: Iterable[Picture]) -> None:
    """Write `<stem>.tar` in webdataset's ImageNet style: `.cls` (the class as decimal text) and `.jpg`."""
    with _open_tar(_with_suffix(stem, ".tar")) as tar:
        for picture in pictures:
            _add_member(tar, f"{picture.key}.cls", str(class_label(picture.scene)).encode())
            _add_member(tar, f"{picture.key}.jpg", _encode_jpeg(picture.image))


def _with_suffix(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    with atomic_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        yield tar


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mtime = WRITTEN_AT_SECONDS
    member.mode = 0o444
    member.uname = member.gname = "bigdata"
    tar.addfile(member, io.BytesIO(data))
