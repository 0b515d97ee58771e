"""A tiny run for codec stages: crops of random images in two buckets, a recipe, and commands to train on them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import training_run
from safetensors.torch import load_file
from torch import Tensor

from pipelines.store.families import PIXELS, image_directory, pixel_schema
from pipelines.store.feature_store import FeatureTarWriter, write_index
from pipelines.store.manifest import Fingerprint, ShardDirectory

RESOLUTION, BUCKETS = 32, ["32x32", "24x40"]
RECIPE = """
[features.vae]
resolution = 32
buckets = true
text = false
families = { pixels = { multiple = 8 } }

[training]
num_processes = 2
threads_per_process = 1
dtype = "fp32"
global_batch_size = 8
num_steps = 8
learning_rate = 2e-3
weight_decay = 0.0
gradient_clip = 1.0
ema_decay = 0.8
log_every = 1
checkpoint_every = 4
preview_crops = 3
preview_every = 8
keep_checkpoints = 9

[training.vae]
network = "vae"
objective = "reconstruct"

[training.vae.codec]
block_channels = [8, 16]
layers_per_block = 1
latent_channels = 3
norm_groups = 2
middle_attention = false

[training.vae.reconstruction]
mse_weight = 1.0
l1_weight = 0.3
kl_weight = 1e-4
num_statistics_samples = 12
discriminator_weight = 0.5
discriminator_from_step = 3
discriminator_channels = 8
"""


def make_codec_run(folder: Path) -> Path:
    """Write `recipe.toml` and crops of two shards; returns the run's folder."""
    run = folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE)
    directory, family = ShardDirectory(image_directory(run, PIXELS, RESOLUTION)), pixel_schema()
    directory.path.mkdir(parents=True, exist_ok=True)
    fingerprint = Fingerprint.of({"family": PIXELS, "buckets": True})
    shards = {"images_0": 24, "images_1": 16}
    for name, num_samples in shards.items():
        random, rows = np.random.default_rng(num_samples), []
        with FeatureTarWriter(directory.file(name, ".tar")) as tar:
            for i in range(num_samples):
                bucket = BUCKETS[i % 2]
                height, width = map(int, bucket.split("x"))
                coarse = random.integers(0, 256, (3, height // 8, width // 8), dtype=np.uint8)
                rows.append({"key": f"{name}_{i:03d}", "shard": name, "bucket": bucket, "reject": None})
                family.write(tar, [rows[-1]], [(coarse.repeat(8, 1).repeat(8, 2),)])
        write_index(directory.file(name, ".parquet"), rows, family.columns)
        training_run._finish(directory, name, rows, fingerprint)
    extra = {"family": family.spec(), "resolution": RESOLUTION, "buckets": BUCKETS, "settings": {"multiple": 8}}
    directory.write_manifest(fingerprint, list(shards), upstream={}, extra=extra)
    return run


def copy_of(run: Path, folder: Path) -> Path:
    """Return another run with the same features."""
    shutil.copytree(run.parent, folder)
    return folder / "run"


def weights(run: Path, step: int, stage: str = "vae") -> dict[str, Tensor]:
    return load_file(run / "training" / stage / f"step-{step}" / "model" / "diffusion_pytorch_model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (run / "training" / "vae" / "metrics.jsonl").read_text().splitlines()))
