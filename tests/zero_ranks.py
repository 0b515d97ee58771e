"""One of two ranks that try ZeRO stages in turn; `test_training_zero.py` starts them and reads what rank 0 prints.

Usage: python zero_ranks.py FOLDER dtype zero_stage...
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state

from pixart.diffusion import Diffusion
from pixart.model import PixArt, PixArtConfig
from training.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from training.config import StageTraining
from training.ema import EMA
from training.zero import ZeroModel, initialize_ranks

CONFIG = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=8, sample_size=4)
GLOBAL_BATCH = 8


def new_model(settings: StageTraining) -> tuple[ZeroModel, EMA]:
    torch.manual_seed(0)
    network = PixArt(CONFIG)
    torch.nn.init.normal_(network.blocks[0].cross_attention.out.weight, std=0.1)
    model = ZeroModel(network, settings)
    return model, EMA(model, 0.9)


def train_step(model: ZeroModel, ema: EMA, step: int, *, scale: float = 1.0) -> dict[str, float]:
    """Train on this rank's half of a batch; returns the loss over both halves and the gradient's norm."""
    generator = torch.Generator().manual_seed(step)
    latents, noise = (torch.randn(GLOBAL_BATCH, 4, 4, 4, generator=generator) for _ in range(2))
    text = torch.randn(GLOBAL_BATCH, 6, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (GLOBAL_BATCH,), generator=generator)
    diffusion = Diffusion()
    noisy = diffusion.q_sample(latents, noise, timesteps).to(model.dtype)
    num_micro_batches = model.settings.gradient_accumulation_steps
    num_parts = dist.get_world_size() * num_micro_batches
    total = torch.zeros((), dtype=torch.float64)
    for i in range(num_micro_batches):
        mine = slice(dist.get_rank() * num_micro_batches + i, None, num_parts)
        output = model.engine(noisy[mine], timesteps[mine], text[mine].to(model.dtype))
        loss = diffusion.loss(output, noise[mine], timesteps[mine]).total.mean()
        model.backward(loss * scale, is_last=i + 1 == num_micro_batches)
        total += loss.detach() / num_parts
    update = model.update(model.settings.learning_rate)
    if not update.is_skipped:
        ema.update()
    dist.all_reduce(total)
    return {"loss": float(total), "norm": update.gradient_norm, "skipped": update.is_skipped}


def is_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def try_stage(folder: Path, dtype: str, zero_stage: int) -> dict[str, Any]:
    settings = StageTraining(
        dtype=dtype, zero_stage=zero_stage, global_batch_size=GLOBAL_BATCH, learning_rate=1e-2, gradient_clip=0.01
    )
    model, ema = new_model(settings)
    steps = [train_step(model, ema, step) for step in range(4)]
    by_hand = ema.gather()
    trainer = {"step": 4, "num_steps": 9, "zero_stage": zero_stage, "num_ranks": dist.get_world_size()}
    save_checkpoint(folder, model=model, ema=ema, trainer=trainer, num_kept=1)
    dist.barrier()
    on = [train_step(model, ema, step) for step in range(4, 6)]

    resumed, resumed_ema = new_model(settings)
    load_checkpoint(open_checkpoint(folder / "step-4"), model=resumed, ema=resumed_ema)
    loaded = resumed_ema.gather()
    again = [train_step(resumed, resumed_ema, step) for step in range(4, 6)]
    same_masters = is_same(model.gather_masters(), resumed.gather_masters())
    same_ema = is_same(ema.gather(), resumed_ema.gather())

    unmoved = resumed.gather_masters()
    skipped = train_step(resumed, resumed_ema, 6, scale=float("inf"))
    same_after_skip = is_same(unmoved, resumed.gather_masters())
    accumulating = new_model(settings.model_copy(update={"gradient_accumulation_steps": 2}))
    accumulated = [train_step(*accumulating, step) for step in range(2)]
    huge, huge_ema = new_model(settings)
    shout = train_step(huge, huge_ema, 0, scale=1e6)
    return {
        "losses": [step["loss"] for step in steps],
        "norms": [step["norm"] for step in steps],
        "accumulated": [[step["loss"], step["norm"]] for step in accumulated],
        "ema": {name: float(value.double().norm()) for name, value in by_hand.items()},
        "is_ema_fp32": all(value.dtype == torch.float32 for value in by_hand.values()),
        "ema_survives_disk": is_same(by_hand, loaded),
        "resumes_exactly": on == again and same_masters and same_ema,
        "refuses_foreign_pickles": refuses_foreign_pickles(huge, folder / "step-4"),
        "skips_infinite": bool(skipped["skipped"]) and same_after_skip,
        "huge_norm": shout["norm"],
        "huge_first_moment": moment_norm(huge),
    }


def refuses_foreign_pickles(model: ZeroModel, checkpoint: Path) -> bool:
    """Whether state that holds more than tensors and DeepSpeed's own records is not unpickled."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in (checkpoint / "deepspeed").glob("*model_states.pt"):
            torch.save({"module": checkpoint}, path)
    dist.barrier()
    try:
        model.load_state(checkpoint, "deepspeed")
    except pickle.UnpicklingError as error:
        return "PosixPath" in str(error)
    return False


def moment_norm(model: ZeroModel) -> float:
    """Norm of Adam's first moment over all weights: (1 - beta1) times the clipped gradient's after one step."""
    if model.is_sharded:
        moments = [safe_get_full_optimizer_state(weight, "exp_avg") for weight in model.engine.module.parameters()]
    else:
        optimizer = model.engine.optimizer
        states = getattr(optimizer, "optimizer", optimizer).state.values()
        moments = [state["exp_avg"] for state in states]
    return float(torch.cat([moment.flatten().double() for moment in moments]).norm())


if __name__ == "__main__":
    initialize_ranks()
    folder, dtype, *stages = sys.argv[1:]
    for stage in stages:
        result = try_stage(Path(folder) / f"{dtype}-{stage}", dtype, int(stage))
        if dist.get_rank() == 0:
            (Path(folder) / f"{dtype}-{stage}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
