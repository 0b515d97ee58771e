"""Parts `loop_256` and `muon_loop_256`: `python -m training` itself on synthetic features, against the bare step.

The loop is the command as users type it: its reader out of feature tars of full width, DeepSpeed's ZeRO 2, the average
of the weights, the log. The bare step has the compiled network, fp32 master weights, a clipped gradient and AdamW, one
batch of the same reader that lies ready, and nothing else. The loop of flow and Muon, `recipes/speedrun.toml`'s, has no
bare step: on one card nothing of Muon is shared out.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import _foreach_copy_ as foreach_copy_

from benchmarks.gpu.parts import Figures, Size
from benchmarks.gpu.steps import Step, fused_adamw, measure_step, our_network, our_objective
from benchmarks.gpu.training import XL_256
from benchmarks.reader import RESOLUTION, WIDTH, write_run
from benchmarks.train import GIGABYTE, GRADIENT_CLIP, MAX_TOKENS, Case
from pipelines.store.families import latent_directory, latent_schema, text_directory, text_schema
from pipelines.store.manifest import Fingerprint, ShardDirectory
from training.data.assembly import BatchAssembler
from training.data.batch import PackedBatch
from training.data.datasets import Dataset
from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.reader import BatchReader
from training.data.survey import make_survey, survey_shards

TINY_LOOP = Case(width=144, num_layers=1, pixels=RESOLUTION, batch_size=4, caption_channels=WIDTH)
# Of a device with less memory than masters, moments, average and the activations of batch 176 take.
SMALL_DEVICE_GIGABYTES, SMALL_DEVICE_BATCH = 100, 132
NUM_BATCHES = 4  # of an epoch: epochs differ, and all of it is in the page cache anyway
LOG_EVERY, TINY_LOG_EVERY = 10, 1
NUM_WARM_UP_LINES, NUM_LINES = 1, 3  # of metrics
VAE = {"model": "random/vae", "revision": None, "scaling_factor": 0.18215, "shift_factor": 0.0}
TEXT = {"model": "random/t5", "revision": None, "max_tokens": MAX_TOKENS, "d_text": WIDTH, "storage": "bfloat16"}
RECIPE = """
[features]
text_model = "random/t5"
vae_model = "random/vae"
max_tokens = {max_tokens}
[features.stage2]
shards = ["shard_*"]
resolution = {resolution}
[model]
num_layers = {num_layers}
num_heads = {num_heads}
head_dim = {head_dim}
[training]
dtype = "bf16"
zero_stage = 2
num_processes = 1
global_batch_size = {batch_size}
gradient_accumulation_steps = 1
keep_activations = "all"
num_steps = 100_000
log_every = {log_every}
checkpoint_every = 100_000
caption_dropout = 0.0
[training.stage2]
network = "pixart"
starts_from = "scratch"
"""
FLOW_MUON = """
process = "flow"
optimizer = "muon"
muon_learning_rate = 3e-4
"""


def loop_256(size: Size) -> Figures:
    """256px, batch 176, or 132 where memory is short."""
    case = _case(size)
    with tempfile.TemporaryDirectory(prefix="bench-loop-") as folder:
        dataset = _write_features(Path(folder) / "run", case)
        loop = _loop_figures("loop_256", Path(folder), case, size=size)
        size.keep(loop)
        bare = measure_step(
            lambda: _bare_step(case, _first_batch(dataset, case), device=size.device), device=size.device
        )
    bare_speed, loop_speed = case.batch_size / bare.seconds, loop["loop_256_images_per_second"]
    assert isinstance(loop_speed, float)
    return {
        "loop_256_bare_images_per_second": round(bare_speed, 2),
        "loop_256_bare_peak_gigabytes": round(bare.peak_gigabytes, 1),
        "loop_256_ratio": round(loop_speed / bare_speed, 4),
    }


def muon_loop_256(size: Size) -> Figures:
    """The same of flow and Muon."""
    case = _case(size)
    with tempfile.TemporaryDirectory(prefix="bench-loop-") as folder:
        _write_features(Path(folder) / "run", case)
        return _loop_figures("muon_loop_256", Path(folder), case, size=size, settings=FLOW_MUON)


def _case(size: Size) -> Case:
    return TINY_LOOP if size.is_tiny else _fitting(XL_256)


def _loop_figures(name: str, folder: Path, case: Case, *, size: Size, settings: str = "") -> Figures:
    """Train on the features in `folder`; `settings` are lines added to the stage."""
    lines = _run_loop(folder, case, is_tiny=size.is_tiny, settings=settings)
    _await_memory(size.device)
    counted = lines[NUM_WARM_UP_LINES:]
    return {
        f"{name}_batch": case.batch_size,
        f"{name}_images_per_second": round(statistics.median(line["images_per_second"] for line in counted), 2),
        f"{name}_mfu": counted[-1]["mfu"],
        f"{name}_data_wait_fraction": round(max(line["data_wait_fraction"] for line in counted), 4),
        f"{name}_peak_gigabytes": round(lines[-1]["peak_memory_gigabytes"], 1),
    }


def _fitting(case: Case) -> Case:
    is_small = torch.cuda.get_device_properties(0).total_memory / GIGABYTE < SMALL_DEVICE_GIGABYTES
    return replace(case, batch_size=SMALL_DEVICE_BATCH) if is_small else case


def _write_features(run: Path, case: Case) -> Dataset:
    """Write the features of a few batches, with the manifests that a stage asks for."""
    dataset = write_run(run, NUM_BATCHES * case.batch_size, "bfloat16")
    buckets = [f"{RESOLUTION}x{RESOLUTION}"]
    extras = {
        latent_directory(run, RESOLUTION): {
            "family": latent_schema().spec(),
            "vae": VAE,
            "resolution": RESOLUTION,
            "buckets": buckets,
        },
        text_directory(run): {"family": text_schema("bfloat16", WIDTH).spec(), "text": TEXT},
    }
    for path, extra in extras.items():
        ShardDirectory(path).write_manifest(Fingerprint.of({}), dataset.shards, upstream={}, extra=extra)
    return dataset


def _run_loop(folder: Path, case: Case, *, is_tiny: bool, settings: str) -> list[dict]:
    """Train until enough lines of metrics are there, and end it; returns the lines.

    It is killed: a checkpoint of all that XL/2 has in fp32 would take longer than what is measured.
    """
    num_lines = NUM_WARM_UP_LINES + (1 if is_tiny else NUM_LINES)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        RECIPE.format(
            max_tokens=MAX_TOKENS,
            resolution=RESOLUTION,
            num_layers=case.num_layers,
            num_heads=case.width // case.head_dim,
            head_dim=case.head_dim,
            batch_size=case.batch_size,
            log_every=TINY_LOG_EVERY if is_tiny else LOG_EVERY,
        )
        + settings
    )
    command = [sys.executable, "-m", "training", "--recipe", str(recipe), "--run", str(folder / "run")]
    metrics = folder / "run" / "training" / "stage2" / "metrics.jsonl"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--stage", "stage2"], stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                is_over = process.poll() is not None
                lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
                if len(lines) >= num_lines:
                    return [json.loads(line) for line in lines[:num_lines]]
                if is_over:
                    raise RuntimeError(f"python -m training has ended: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()


def _await_memory(device: str, *, limit_seconds: float = 10.0) -> None:
    """Wait until the ranks, which leave with their launcher, have given the device's memory back."""
    end_seconds = time.monotonic() + limit_seconds
    while device == "cuda" and time.monotonic() < end_seconds:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        if free_bytes > 0.9 * total_bytes:
            return
        time.sleep(0.1)


def _first_batch(dataset: Dataset, case: Case) -> PackedBatch:
    """Return the first batch of a reader, in memory of its own."""
    index = FeatureIndex([dataset])
    survey = make_survey(index, survey_shards(index, range(len(index))))
    plan = Plan(survey.counts, batch_size=case.batch_size, seed=0, shards_per_block=16)
    assembler = BatchAssembler(dataset, buckets=survey.buckets, seed=0, stream=2, caption_dropout=0.0)
    with BatchReader(plan, index, assembler, steps=range(1), rank=0, num_ranks=1) as reader:
        return next(iter(reader))


def _bare_step(case: Case, packed: PackedBatch, *, device: str) -> Step:
    """Return a step of the compiled network with fp32 masters."""
    network = our_network(case, device=device)
    masters = nn.ParameterList([nn.Parameter(weight.detach().float()) for weight in network.parameters()])
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = fused_adamw(masters)
    objective = our_objective(device=device)
    batch = packed.to(torch.device(device))

    def step() -> Tensor:
        loss = objective.loss({"network": network}, batch).total.mean()
        loss.backward()
        with torch.no_grad():
            gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
            foreach_copy_([master.grad for master in masters], gradients)
            nn.utils.clip_grad_norm_(masters, GRADIENT_CLIP)
            optimizer.step()
            foreach_copy_(list(network.parameters()), list(masters))
        network.zero_grad()
        return loss.detach()

    return step
