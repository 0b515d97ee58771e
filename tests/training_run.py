"""A tiny run for the training tests: feature directories with random tensors, a recipe, and commands to train on it."""

import json
import subprocess
from pathlib import Path

import numpy as np
import torch
from warm_python import WarmProcess

from features.quantization import store_text
from pipelines.store.families import (
    NULL_CAPTION_FILE,
    image_directory,
    latent_directory,
    latent_schema,
    text_directory,
    text_schema,
)
from pipelines.store.feature_store import FeatureTarWriter, write_index, write_tensors
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport

REPOSITORY = Path(__file__).resolve().parent.parent
CHANNELS, D_TEXT, MAX_TOKENS, NUM_CLASSES = 4, 16, 12, 5
VAE = {"model": "toy/vae", "revision": None, "scaling_factor": 0.5, "shift_factor": 0.1}
TEXT = {"model": "toy/t5", "revision": None, "max_tokens": MAX_TOKENS, "d_text": D_TEXT}
RECIPE = """
[features]
text_model = "toy/t5"
vae_model = "toy/vae"
max_tokens = 12

[features.stage1]
shards = ["imagenet_*"]
resolution = 32
text = false

[features.stage2]
shards = ["laion_*"]
resolution = 32

[features.stage3]
shards = ["hq_*"]
resolution = 64
buckets = true

[model]
num_layers = 2
num_heads = 2
head_dim = 8
num_classes = 5

[training]
num_processes = 2
threads_per_process = 1
dtype = "fp32"
zero_stage = 0
global_batch_size = 8
num_steps = 12
learning_rate = 1e-3
gradient_clip = 1.0
ema_decay = 0.9
log_every = 2
checkpoint_every = 6

[training.stage1]
network = "dit"

[training.stage2]
network = "pixart"
starts_from = "stage1"

[training.stage3]
network = "pixart"
starts_from = "stage2"
interpolation_scale = 2.0
"""


def write_latents(
    run: Path,
    resolution: int,
    shards: dict[str, int],
    *,
    buckets: list[str],
    is_bucketed: bool,
    has_std: bool = True,
    has_sizes: bool = False,
    control: str | None = None,
) -> None:
    """Write `shards` (name -> number of samples) of random latents; every seventh sample is a reject.

    With `has_sizes` the index says how large image i was: 3 times its bucket and i pixels more. With `control`, a kind,
    they are a family of control images.
    """
    name = "latents" if control is None else f"control-{control}"
    folder = latent_directory(run, resolution) if control is None else image_directory(run, name, resolution)
    directory = ShardDirectory(folder)
    directory.path.mkdir(parents=True, exist_ok=True)
    family = latent_schema(has_std=has_std, name=name, leads=control is None)
    fingerprint = Fingerprint.of({"family": name, "resolution": resolution, "buckets": is_bucketed})
    for name, num_samples in shards.items():
        random = np.random.default_rng(len(name) * 1000 + num_samples + (0 if control is None else 7))
        rows = []
        with FeatureTarWriter(directory.file(name, ".tar")) as tar:
            for i in range(num_samples):
                row = {"key": f"{name}_{i:03d}", "shard": name, "reject": "undecodable"}
                if i % 7 != 6:
                    bucket = buckets[i % len(buckets)]
                    height, width = (int(side) // 8 for side in bucket.split("x"))
                    mean = random.standard_normal((CHANNELS, height, width)).astype(np.float16)
                    std = np.full_like(mean, 0.1)
                    family.write(tar, [row], [(mean, std) if has_std else (mean,)])
                    row |= {
                        "bucket": bucket,
                        "label": i % NUM_CLASSES if name.startswith("imagenet") else None,
                        "reject": None,
                    }
                    if has_sizes:
                        row |= {"original_height": 24 * height + i, "original_width": 24 * width + i}
                rows.append(row)
        write_index(directory.file(name, ".parquet"), rows, family.columns)
        _finish(directory, name, rows, fingerprint)
    extra = {"vae": VAE, "resolution": resolution, "buckets": buckets}
    if not has_std or control is not None:  # else the manifest is one of before it named its family
        extra["family"] = family.spec()
    if control is not None:
        extra["control"] = {"kind": control, "settings": {}}
    directory.write_manifest(fingerprint, list(shards), upstream={}, extra=extra)


def write_text(
    run: Path,
    shards: dict[str, int],
    *,
    max_tokens: int = MAX_TOKENS,
    storage: str = "bfloat16",
    revision: str | None = None,
    columns: tuple[str, ...] = ("caption",),
    seed: int = 0,
) -> None:
    """Write captions of random embeddings: one or two per sample, none for every eleventh."""
    directory = ShardDirectory(text_directory(run, columns))
    directory.path.mkdir(parents=True, exist_ok=True)
    settings = {"max_tokens": max_tokens, "storage": storage, "revision": revision}
    fingerprint = Fingerprint.of({"family": "text", "caption_columns": list(columns), **settings})
    write_tensors(directory.path / NULL_CAPTION_FILE, {"embedding_0": np.full((2, D_TEXT), 0x3F80, np.uint16)})
    for name, num_samples in shards.items():
        random = np.random.default_rng(len(name) * 77 + num_samples + seed)
        rows, samples = [], []
        with FeatureTarWriter(directory.file(name, ".tar")) as tar:
            for i in range(num_samples):
                key = f"{name}_{i:03d}"
                if i % 11 == 10:
                    rows.append({"key": key, "shard": name, "caption_index": 0, "reject": "empty"})
                    samples.append(rows[-1])
                    continue
                shapes = [(int(random.integers(1, max_tokens)), D_TEXT) for _ in range(1 + i % 2)]
                embeddings = [torch.from_numpy(random.standard_normal(shape)) for shape in shapes]
                rows += write_captions(tar, key, embeddings, storage=storage, shard=name)
                samples.append(rows[-1])
        write_index(directory.file(name, ".parquet"), rows, text_schema(storage, D_TEXT).columns)
        _finish(directory, name, samples, fingerprint)
    directory.write_manifest(fingerprint, list(shards), upstream={}, extra={"text": TEXT | settings})


def write_captions(
    tar: FeatureTarWriter, key: str, embeddings: list[torch.Tensor], *, storage: str, shard: str
) -> list[dict]:
    """Write one sample's captions; returns their index rows. The first is drawn three times as often as the others."""
    stored = [store_text(embedding, storage) for embedding in embeddings]
    rows = [
        {"key": key, "shard": shard, "caption_index": j, "weight": 3.0 if j == 0 else 1.0, "reject": None}
        for j in range(len(stored))
    ]
    payloads = [[part for part in (text.values, text.scale) if part is not None] for text in stored]
    text_schema(storage, D_TEXT).write(tar, rows, payloads)
    return rows


def _finish(directory: ShardDirectory, name: str, rows: list[dict], fingerprint: Fingerprint) -> None:
    rejects = [row["reject"] for row in rows if row["reject"] is not None]
    report = ShardReport(
        name=name,
        source="test",
        num_read=len(rows),
        num_kept=len(rows) - len(rejects),
        rejected={reason: rejects.count(reason) for reason in set(rejects)},
        files={suffix: sha256_file(directory.file(name, suffix)) for suffix in (".tar", ".parquet")},
    )
    directory.write_marker(report, fingerprint)


def make_run(folder: Path) -> Path:
    """Write `recipe.toml` and the features of all three stages; returns the run's folder."""
    run = folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE)
    write_latents(run, 32, {"imagenet_0": 30, "laion_0": 40, "laion_1": 23}, buckets=["32x32"], is_bucketed=False)
    write_latents(run, 64, {"hq_0": 60}, buckets=["64x64", "80x48", "48x80"], is_bucketed=True)
    write_text(run, {"laion_0": 40, "laion_1": 23, "hq_0": 60})
    return run


def arguments(run: Path, stage: int | str, **settings: object) -> list[str]:
    """Command line of a stage; `settings` become `--set training.<name>=<value>`, `starts_from` the stage's own."""
    recipe = run.parent / "recipe.toml"
    flags = ["--recipe", str(recipe), "--run", str(run), "--stage", str(stage)]
    for name, value in settings.items():
        table = "training.{stage}" if name == "starts_from" else "training"
        flags += ["--set", f"{table}.{name}={json.dumps(value)}"]
    return flags


def start(run: Path, stage: int | str, **settings: object) -> WarmProcess:
    return WarmProcess("training", arguments(run, stage, **settings))


def train(run: Path, stage: int | str, *, status: int = 0, **settings: object) -> str:
    """Run a stage to its end and return what it said."""
    return finish(start(run, stage, **settings), status=status)


def finish(process: subprocess.Popen[str] | WarmProcess, *, status: int = 0, timeout_seconds: float = 120) -> str:
    """Wait for a command to end with `status`; returns what it said, unwrapped."""
    _, said = process.communicate(timeout=timeout_seconds)
    assert process.returncode == status, said
    return " ".join(said.split())


def all_metrics(run: Path, stage: int) -> list[dict]:
    """Lines of training and of validation."""
    lines = (run / "training" / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def metrics(run: Path, stage: int) -> list[dict]:
    return [line for line in all_metrics(run, stage) if "loss" in line]


def validations(run: Path, stage: int) -> list[dict]:
    return [line for line in all_metrics(run, stage) if "validation_loss" in line]
