"""A small run folder for feature tests: raw tars, captions as the captioning stage leaves them, tiny encoders."""

import io
import sys
import tarfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_encoders import save_codec, save_text_encoder

import features.__main__ as features_main
from pipelines.raw.shards import open_shard, shard_source
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport

WORDS = ("red", "blue", "circle", "star", "on the left", "small", "large", "a green square", "and", "striped")


def picture(seed: int, *, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth coloured image, different for every seed."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def caption_of(index: int) -> str:
    return " ".join(np.random.default_rng(index).choice(WORDS, 1 + index % 7))


def write_raw(path: Path, samples: Sequence[Mapping[str, bytes | str]]) -> None:
    """Write a tar; each sample maps extensions to contents, with its key under `key`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for sample in samples:
            for extension, content in sample.items():
                if extension == "key":
                    continue
                data = content if isinstance(content, bytes) else content.encode()
                info = tarfile.TarInfo(f"{sample['key']}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_captions(run: Path, raw_paths: Sequence[Path], *, rejects: Mapping[str, str], prompt: str = "p") -> None:
    """Write what captioning would: one Parquet row per sample of each tar, markers and manifest."""
    directory = ShardDirectory(run / "captions")
    directory.path.mkdir(parents=True, exist_ok=True)
    fingerprint = Fingerprint.of({"prompt": prompt})
    for path in raw_paths:
        source = shard_source(str(path))
        with open_shard(str(path)) as raw:
            keys = [sample.key for sample in raw.samples]
        texts = [caption_of(index) for index in range(len(keys))]
        reasons = [rejects.get(key) for key in keys]
        table = pa.table(
            {
                "key": keys,
                "shard": [source.name] * len(keys),
                "alt_text": [None if index % 4 == 3 else f"IMG_{index}.jpg" for index in range(len(keys))],
                "caption": [None if reason else text for text, reason in zip(texts, reasons, strict=True)],
                "reject": pa.array(reasons, pa.string()),
            }
        )
        output = directory.file(source.name, ".parquet")
        pq.write_table(table, output)
        rejected = {reason: reasons.count(reason) for reason in set(reasons) if reason}
        report = ShardReport(
            name=source.name,
            source=source.identity,
            num_read=len(keys),
            num_kept=len(keys) - sum(rejected.values()),
            rejected=rejected,
            files={".parquet": sha256_file(output)},
        )
        directory.write_marker(report, fingerprint)
    names = [path.stem for path in raw_paths]
    directory.write_manifest(fingerprint, names, upstream={}, extra={})


RECIPE = """
[data]
shards = "{run}/raw/*.tar"
[engine]
in_process = true
samples_per_slice = 8
[features]
text_model = "TEXT"
text_dtype = "float32"
max_tokens = 40
text_batch_tokens = 60
vae_model = "VAE"
vae_batch_size = 3
device = "cpu"
max_reject_fraction = 0.5
num_preview_images = 3
[features.stage1]
shards = ["imagenet_*"]
resolution = 32
text = false
[features.stage2]
shards = ["laion_*"]
resolution = 32
[features.stage3]
shards = ["laion_*"]
resolution = 48
buckets = true
"""


def write_run(folder: Path, *, num_shards: int = 2, samples_per_shard: int = 20) -> Path:
    """Write raw shards `laion_*` with captions, models and `recipe.toml`; returns the run's folder."""
    run = folder / "run"
    paths = []
    for shard in range(num_shards):
        samples = []
        for index in range(samples_per_shard):
            image = picture(100 * shard + index, width=40 + 8 * (index % 5), height=40)
            samples.append({"key": f"{shard:03d}{index:05d}", "png": encoded(image), "txt": "t", "json": "{}"})
        paths.append(run / "raw" / f"laion_{shard:05d}.tar")
        write_raw(paths[-1], samples)
    write_captions(run, paths, rejects={"00000002": "loop"})
    write_recipe(folder)
    return run


def extract(run: Path, *overrides: str, stage: int = 2, plan: bool = False) -> None:
    """Run the room's main as its command line does."""
    arguments = ["features", "--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", str(stage)]
    arguments += [part for override in overrides for part in ("--set", override)] + ["--plan"] * plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        features_main.main()


def write_recipe(folder: Path) -> Path:
    text, vae = save_text_encoder(folder / "t5"), save_codec(folder / "vae")
    recipe = RECIPE.replace("TEXT", str(text)).replace("VAE", str(vae))
    tomllib.loads(recipe)
    (folder / "recipe.toml").write_text(recipe)
    return folder / "recipe.toml"
