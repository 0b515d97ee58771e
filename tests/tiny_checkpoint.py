"""Checkpoints with the files of real ones, each of a few bytes: for what looks at them without loading them."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# The keys that every version has written, beside steps and ranks.
TRAINER: dict[str, Any] = {
    "stage": "stage2",
    "kind": "pixart",
    "weights": "ema",
    "plan_fingerprint": "0123",
    "fingerprint": {},
    "resolution": 32,
    "buckets": [],
    "vae": {},
    "text": None,
    "num_samples_seen": 0,
    "elapsed_seconds": 1.0,
    "skipped_steps": 0,
    "skipped_in_a_row": 0,
}


# Of a network such as that of `training_run.RECIPE`.
CONFIG = {
    "_class_name": "PixArtTransformer2DModel",
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def write_checkpoint(
    stage: Path, step: int, *, zero_stage: int = 0, num_ranks: int = 1, trainer: Mapping[str, Any] | None = None
) -> Path:
    """Write a whole `step-<step>/` as bf16 training of `zero_stage` leaves it, not `latest`; returns its folder."""
    folder = stage / f"step-{step}"
    (folder / "model").mkdir(parents=True)
    save_file({"weight": np.arange(6, dtype=np.float32)}, folder / "model" / "diffusion_pytorch_model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    write_state(folder / "deepspeed", zero_stage=zero_stage, num_ranks=num_ranks)
    settings = {"num_steps": 12, "zero_stage": zero_stage, "num_ranks": num_ranks, "dtype": "bf16"}
    (folder / "trainer.json").write_text(json.dumps(TRAINER | {"step": step} | settings | dict(trainer or {})))
    return folder


def write_state(folder: Path, *, zero_stage: int = 0, num_ranks: int = 1) -> None:
    """Write DeepSpeed's files of all ranks, under the names it gives them."""
    folder.mkdir()
    shards = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(num_ranks)]
    weights = [f"{shard}_model_states.pt" for shard in shards] if zero_stage == 3 else ["mp_rank_00_model_states.pt"]
    optimizer = [f"bf16_{shard}_optim_states.pt" for shard in shards] if zero_stage > 0 else []
    for name in weights + optimizer:
        write_torch_file(folder / name)


def write_universal(folder: Path) -> None:
    """Write the files of a state in DeepSpeed's universal form, of two weights."""
    for name in ("final.weight", "final.bias"):
        (folder / "zero" / name).mkdir(parents=True)
        for part in ("fp32", "exp_avg", "exp_avg_sq"):
            write_torch_file(folder / "zero" / name / f"{part}.pt")
    write_torch_file(folder / "zero" / "optimizer_state.pt")
    write_torch_file(folder / "mp_rank_00_model_states.pt")


def write_torch_file(path: Path) -> None:
    """Write a zip file as `torch.save` does: stored, with a checksum of each record."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", b"\x80\x02}.")
        archive.writestr(f"{path.stem}/data/0", bytes(range(256)) * 4)
