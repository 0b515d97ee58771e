"""The toy world on disk: which scenes are written to which raw shard, their truth, and unseen prompts to sample from.

Sample `i` of a dataset is a function of (seed, dataset, i) alone, so larger counts add samples and move none. Scenes
are split by what their objects are and where they stand: prompts hold a tenth of all arrangements, and no shard does.
"""

import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.engine.progress import ProgressBar, get_logger, progress_bar
from pipelines.store.files import (
    atomic_file,
    atomic_write_bytes,
    discard,
    exclusive,
    is_file_itself,
    remove_temporary_files,
    sha256_file,
)
from pipelines.store.manifest import (
    MANIFEST_NAME,
    MARKER_FOLDER,
    Fingerprint,
    ShardDirectory,
    ShardReport,
    read_manifest,
)
from pipelines.store.summary import update_summary
from toyworld.config import ToyworldConfig
from toyworld.render import render
from toyworld.scenes import Scene, random_scene
from toyworld.shards import (
    IMG2DATASET_SUFFIXES,
    TAR_ONLY_SUFFIXES,
    Picture,
    write_imagenet_shard,
    write_img2dataset_shard,
    write_sa1b_shard,
)
from toyworld.wording import alt_text, dense_caption, describe

log = get_logger("toyworld")

WORLD_VERSION = 1  # raise it when scenes, rendering, wording or layouts change, so that old shards are rewritten
HELD_OUT_PERCENT = 10
SAMPLES_PER_IMG2DATASET_KEY_RANGE = 10_000
PROMPT_ASPECT_RATIOS = (1.0, 4 / 3, 3 / 4, 2.0, 1 / 2)
TRUTH_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "dataset", "shard", "scene", "description")])

PictureWriter = Callable[[Path, Iterable[Picture]], None]


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """One raw dataset: its size, its layout on disk and how its samples are numbered.

    `first_key_range` keeps keys of the two img2dataset datasets apart, whose shards are both numbered from zero.
    """

    name: str
    num_images: int
    shard_digits: int
    write: PictureWriter
    suffixes: tuple[str, ...]
    num_objects: int | None = None
    first_key_range: int = 0
    has_broken_images: bool = False

    def shards(self, samples_per_shard: int) -> list["PlannedShard"]:
        """Cut the dataset into shards, the last one perhaps shorter."""
        starts = range(0, self.num_images, samples_per_shard)
        return [
            PlannedShard(self, number, start, min(start + samples_per_shard, self.num_images))
            for number, start in enumerate(starts)
        ]


@dataclass(frozen=True)
class PlannedShard:
    """The samples [start, stop) of a dataset, in one tar."""

    dataset: RawDataset
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Shard name, such as `laion_00000`."""
        return f"{self.dataset.name}_{self.number:0{self.dataset.shard_digits}d}"

    @property
    def path(self) -> str:
        """Path below the raw folder, without suffix."""
        return f"{self.dataset.name}/{self.name}"

    @property
    def identity(self) -> str:
        """What the shard is made from."""
        return f"{self.dataset.name}[{self.start}:{self.stop}]"

    def key(self, index: int) -> str:
        """Key of sample `index` of the dataset, as the layout numbers its samples."""
        if self.dataset.write is write_sa1b_shard:
            return f"sa_{index + 1}"
        if self.dataset.write is write_imagenet_shard:
            return f"{index:07d}"
        key_range = self.dataset.first_key_range + self.number
        return f"{key_range * SAMPLES_PER_IMG2DATASET_KEY_RANGE + index - self.start:09d}"


def datasets(config: ToyworldConfig) -> list[RawDataset]:
    """Return the four datasets of the world at the recipe's sizes."""
    return [
        RawDataset(
            name="laion",
            num_images=config.num_laion,
            shard_digits=5,
            write=write_img2dataset_shard,
            suffixes=IMG2DATASET_SUFFIXES,
            has_broken_images=True,
        ),
        RawDataset(
            name="sa", num_images=config.num_sa, shard_digits=6, write=write_sa1b_shard, suffixes=TAR_ONLY_SUFFIXES
        ),
        RawDataset(
            name="hq",
            num_images=config.num_hq,
            shard_digits=5,
            write=write_img2dataset_shard,
            suffixes=IMG2DATASET_SUFFIXES,
            first_key_range=50_000,
        ),
        RawDataset(
            name="imagenet",
            num_images=config.num_imagenet,
            shard_digits=6,
            write=write_imagenet_shard,
            suffixes=TAR_ONLY_SUFFIXES,
            num_objects=1,
        ),
    ]


def is_held_out(scene: Scene) -> bool:
    """Whether the arrangement of objects is kept out of all shards, for prompts; the background does not matter."""
    arrangement = sorted((item.shape, item.colour, item.size, item.position) for item in scene.objects)
    digest = hashlib.sha256(json.dumps(arrangement).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def _sample_rng(seed: int, purpose: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), index])


def _draw_scene(rng: np.random.Generator, *, num_objects: int | None = None, held_out: bool = False) -> Scene:
    while True:
        scene = random_scene(rng, num_objects=num_objects)
        if is_held_out(scene) == held_out:
            return scene


def draw_sample(config: ToyworldConfig, dataset: RawDataset, index: int) -> tuple[Scene, np.random.Generator]:
    """Return the scene of a training sample and its random stream, which drawing and wording continue."""
    rng = _sample_rng(config.seed, dataset.name, index)
    return _draw_scene(rng, num_objects=dataset.num_objects), rng


def _draw_size(config: ToyworldConfig, dataset: RawDataset, rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels."""
    if dataset.name != "hq":
        side = int(rng.integers(config.min_side_pixels, config.max_side_pixels + 1))
        return side, side
    side = rng.uniform(config.hq_min_side_pixels, config.hq_max_side_pixels)
    limit = np.log(config.hq_max_aspect_ratio)
    stretch = np.exp(rng.uniform(-limit, limit) / 2)
    return round(side * stretch), round(side / stretch)


def _draw_pictures(config: ToyworldConfig, shard: PlannedShard, progress: ProgressBar) -> Iterator[Picture]:
    for index in range(shard.start, shard.stop):
        scene, rng = draw_sample(config, shard.dataset, index)
        width, height = _draw_size(config, shard.dataset, rng)
        text = alt_text(scene, rng)
        is_broken = shard.dataset.has_broken_images and rng.random() < config.broken_fraction
        yield Picture(
            key=shard.key(index),
            scene=scene,
            image=render(scene, width, height, rng=rng),
            alt_text=text,
            is_broken=is_broken,
            rng=rng,
        )
        progress.advance()


def make_prompts(config: ToyworldConfig) -> list[dict[str, Any]]:
    """Return the rows of `prompts.jsonl`: key, dense caption, aspect ratio (width / height) and its unseen scene."""
    rows = []
    for index in range(config.num_prompts):
        rng = _sample_rng(config.seed, "prompts", index)
        scene = _draw_scene(rng, held_out=True)
        rows.append(
            {
                "key": f"prompt_{index:04d}",
                "prompt": dense_caption(scene, rng),
                "aspect_ratio": round(PROMPT_ASPECT_RATIOS[index % len(PROMPT_ASPECT_RATIOS)], 4),
                "scene": json.loads(scene.to_json()),
            }
        )
    return rows


def plan_world(config: ToyworldConfig) -> list[PlannedShard]:
    """Return every raw shard that the recipe asks for."""
    return [shard for dataset in datasets(config) for shard in dataset.shards(config.samples_per_shard)]


def write_world(config: ToyworldConfig, run: Path) -> None:
    """Write `run/raw`: the shards of all datasets, `truth.parquet` and `prompts.jsonl`.

    Finished shards are kept; a second run with the same settings writes nothing. Shards that an earlier recipe wrote
    and this one does not ask for are removed, so that no stage picks them up.
    """
    raw = ShardDirectory(run / "raw")
    fingerprint = _fingerprint(config)
    planned = plan_world(config)
    pending = [shard for shard in planned if not raw.is_done(shard.path, shard.identity, fingerprint)]
    if not pending and _is_complete(raw, planned, fingerprint, config):
        log.info(f"nothing to do: {len(planned)} shards and {config.num_prompts} prompts of {raw.path} are done")
        return
    with exclusive(raw.path):
        _write_pending(config, run, raw, planned, fingerprint=fingerprint, pending=pending)


def _write_pending(
    config: ToyworldConfig,
    run: Path,
    raw: ShardDirectory,
    planned: list[PlannedShard],
    *,
    fingerprint: Fingerprint,
    pending: list[PlannedShard],
) -> None:
    start_seconds = time.monotonic()
    _require_own(raw, planned)
    _clear(raw, planned)
    _remove_unplanned(raw, planned)
    with progress_bar("toyworld draws", sum(shard.stop - shard.start for shard in pending)) as progress:
        for shard in pending:
            _write_shard(config, shard, raw, fingerprint=fingerprint, progress=progress)
    _write_truth(raw.path / "truth.parquet", config, planned)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_prompts(config)]
    atomic_write_bytes(raw.path / "prompts.jsonl", "".join(lines).encode())
    names = [shard.path for shard in planned]
    hashes = {name: sha256_file(raw.path / name) for name in ("truth.parquet", "prompts.jsonl")}
    extra = {"num_prompts": config.num_prompts, "held_out_percent": HELD_OUT_PERCENT, "files": hashes}
    manifest = raw.write_manifest(fingerprint, names, upstream={}, extra=extra)
    update_summary(run, "seconds.world", round(time.monotonic() - start_seconds, 1))
    counts = {dataset.name: dataset.num_images for dataset in datasets(config)}
    update_summary(run, "counts.world", {"read": manifest.num_read, "kept": manifest.num_kept, "rejected": {}})
    drawn = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    log.info(f"wrote {len(pending)} shards to {raw.path} ({drawn}) and {config.num_prompts} prompts")


def _fingerprint(config: ToyworldConfig) -> Fingerprint:
    # Counts are in the shards' identities instead: a larger world keeps the full shards it has.
    names = ("seed", "min_side_pixels", "max_side_pixels", "hq_min_side_pixels", "hq_max_side_pixels")
    names += ("hq_max_aspect_ratio", "broken_fraction")
    return Fingerprint.of({"version": WORLD_VERSION, **{name: getattr(config, name) for name in names}})


def _is_complete(
    raw: ShardDirectory, planned: list[PlannedShard], fingerprint: Fingerprint, config: ToyworldConfig
) -> bool:
    files = (MANIFEST_NAME, "truth.parquet", "prompts.jsonl")
    if not all((raw.path / name).is_file() for name in files):
        return False
    manifest = read_manifest(raw.path)
    return (
        manifest.fingerprint.digest == fingerprint.digest
        and set(manifest.shards) == {shard.path for shard in planned}
        and manifest.extra.get("num_prompts") == config.num_prompts
    )


def _require_own(raw: ShardDirectory, planned: list[PlannedShard]) -> None:
    """Refuse to draw over tars that somebody else has put here: where this has never drawn, none are its own."""
    if (raw.path / MARKER_FOLDER).is_dir() or (raw.path / MANIFEST_NAME).is_file():
        return
    for shard in planned:
        for path in (raw.file(shard.path, suffix) for suffix in shard.dataset.suffixes):
            if path.exists():
                raise UserError(f"{path} is there, and not of the toy world: name another run, or move it away")


def _clear(raw: ShardDirectory, planned: list[PlannedShard]) -> None:
    """Remove what killed runs left half-written; from now on the folder is known as this room's."""
    (raw.path / MARKER_FOLDER).mkdir(parents=True, exist_ok=True)
    remove_temporary_files(raw.path, is_held=True)
    for name in sorted({shard.dataset.name for shard in planned}):
        remove_temporary_files(raw.path / name, is_held=True)
        remove_temporary_files(raw.path / MARKER_FOLDER / name, is_held=True)


def _remove_unplanned(raw: ShardDirectory, planned: list[PlannedShard]) -> None:
    """Remove the shards of larger worlds: the files of which a marker tells, if they are as they were written."""
    wanted = {shard.path for shard in planned}
    for name in raw.marked():
        report = raw.any_report(name)
        if name in wanted or re.fullmatch(r"(laion|sa|hq|imagenet)/\1_\d+", name) is None:
            continue
        files = {raw.file(name, suffix): digest for suffix, digest in report.files.items()}
        raw.clear_marker(name)
        for path in (path for path, digest in files.items() if is_file_itself(path)):
            if sha256_file(path) == files[path]:
                discard(path)
            else:
                log.warning(f"{path} stays: it has changed since it was drawn")
        log.info(f"removed {raw.path / name}, which the recipe no longer asks for")


def _write_shard(
    config: ToyworldConfig,
    shard: PlannedShard,
    raw: ShardDirectory,
    *,
    fingerprint: Fingerprint,
    progress: ProgressBar,
) -> None:
    raw.clear_marker(shard.path)
    shard.dataset.write(raw.path / shard.path, _draw_pictures(config, shard, progress))
    num_images = shard.stop - shard.start
    report = ShardReport(
        name=shard.path,
        source=shard.identity,
        num_read=num_images,
        num_kept=num_images,
        files={suffix: sha256_file(raw.file(shard.path, suffix)) for suffix in shard.dataset.suffixes},
    )
    raw.write_marker(report, fingerprint)


def _write_truth(path: Path, config: ToyworldConfig, planned: list[PlannedShard]) -> None:
    rows = []
    for shard in planned:
        for index in range(shard.start, shard.stop):
            scene, _ = draw_sample(config, shard.dataset, index)
            rows.append(
                {
                    "key": shard.key(index),
                    "dataset": shard.dataset.name,
                    "shard": shard.name,
                    "scene": scene.to_json(),
                    "description": describe(scene),
                }
            )
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA), temporary)
