"""One of the ranks that train by Muon, stage after stage; `test_training_muon_ranks.py` starts them and compares.

Usage: python -m muon_ranks FOLDER CASE..., each the JSON of a `Case`.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_checkpoint import TRAINER
from torch import Tensor
from zero_ranks import CONFIG, Weights, everything, is_same, mean_loss, new_network

from pipelines.store.checkpoints import open_checkpoint
from pixart.model import PixArt
from training.config import StageTraining
from training.loop import conversions
from training.loop.conversions import needs_universal
from training.loop.ema import EMA
from training.loop.measure import UpdateMeter, total_norm
from training.loop.optimizers import muon, turns
from training.loop.optimizers.newton_schulz import orthogonalized
from training.loop.state import load_checkpoint, save_checkpoint
from training.loop.zero import ZeroModel, initialize_ranks
from training.stages.trainable import trainable_of

BATCH_SIZE = 12  # for one, two and three ranks, and for two micro-batches of each
EMA_DECAY = 0.8
# Warm-up, as the schedule gives it; a number of steps is trained, one for each.
RATES = (5e-3, 1e-2, 1e-2, 5e-3)
# Steps after a checkpoint.
AFTER = (len(RATES), len(RATES) + 1)
MATRICES = ["blocks.*.mlp.*.weight", "blocks.0.attention.query.weight"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a stage trains.

    Attributes:
        name: of its files.
        values: of settings.
        saves: whether it is to be resumed, and to go on on other ranks.
        from_case: which one it goes on from, after all of its steps.
        is_gentle: whether `gentle` stands where matrices are orthogonalised.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    saves: bool = False
    from_case: str | None = None
    is_gentle: bool = True

    @property
    def settings(self) -> StageTraining:
        values: dict[str, Any] = {
            "network": "pixart",
            "optimizer": "muon",
            "dtype": "fp32",
            "learning_rate": max(RATES),
            "muon_learning_rate": 3 * max(RATES),
            "weight_decay": 0.1,
            "gradient_clip": 0.01,
            "global_batch_size": BATCH_SIZE,
        }
        return StageTraining(**(values | self.values))


def gentle(matrices: Tensor) -> Tensor:
    """Move singular values of matrices [K, m, n] towards one, by a single step of Newton's and Schulz's.

    As it should, it takes whole matrices; but of five steps a difference in the last bit, of bf16, comes out 500 times
    as large where a matrix is nearly singular, so that nothing sharp could be said of what goes in.
    """
    x = matrices.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    return (1.5 * x - 0.5 * x @ x.mT @ x).bfloat16()


def network_of(settings: StageTraining) -> PixArt:
    network = new_network()
    # At zero, as it begins, no gradient would come to the blocks.
    torch.nn.init.normal_(network.get_parameter("final.weight"), std=0.3)
    trainable_of(settings).prepare(network, seed=0, dtype=torch.float32, key="training.trains")
    return network


def batch_of(step: int) -> list[Tensor]:
    """Latents, noise, texts and timesteps of a global batch."""
    generator = torch.Generator().manual_seed(step)
    latents, noise = (torch.randn(BATCH_SIZE, 4, 4, 4, generator=generator) for _ in range(2))
    text = torch.randn(BATCH_SIZE, 6, CONFIG.caption_channels, generator=generator)
    return [latents, noise, text, torch.randint(0, 1000, (BATCH_SIZE,), generator=generator)]


def open_model(settings: StageTraining, *, loads_universal: bool = False) -> tuple[ZeroModel, EMA]:
    model = ZeroModel(network_of(settings), settings, loads_universal=loads_universal)
    return model, EMA(model, EMA_DECAY)


def train_step(model: ZeroModel, ema: EMA, step: int, *, scale: float = 1.0, is_ruined: bool = False) -> dict[str, Any]:
    """Train on this rank's part of a batch; returns the gradient's norm, and whether the step was skipped."""
    number = model.settings.num_micro_batches
    for i in range(number):
        mine = slice(dist.get_rank() * number + i, None, dist.get_world_size() * number)
        model.backward(mean_loss(model, batch_of(step), mine) * scale, is_last=i + 1 == number)
    update = model.update(RATES[step % len(RATES)], is_ruined=torch.tensor(is_ruined))
    ema.update(is_skipped=update.is_skipped)
    return {"norm": float(update.gradient_norm), "skipped": bool(update.is_skipped)}


def moments_of(model: ZeroModel) -> Weights:
    """Return averages of gradients, whole, by the names of weights."""
    moments = [moment.clone() for moment in model.first_moments()]
    with model.masters_as(moments):
        return model.gather_masters()


def measured_step(model: ZeroModel, ema: EMA, step: int) -> tuple[dict[str, Any], list[float]]:
    """Train with a meter; returns the norms of update and gradient as it has them, and the update's from copies."""
    masters = [master.detach().clone() for master in model.masters]
    meter = UpdateMeter(model)
    found = train_step(model, ema, step)
    changes = [new.detach() - old for new, old in zip(model.masters, masters, strict=True)]
    return found, [*meter.norms(), total_norm(model, changes)]


def is_skipping(model: ZeroModel, ema: EMA) -> bool:
    """Whether an infinite gradient, and a finite one of a ruined step, change nothing at all."""
    before = everything(model, ema)
    skipped = [train_step(model, ema, 0, scale=float("inf")), train_step(model, ema, 0, is_ruined=True)]
    same = all(torch.equal(old, new) for old, new in zip(before, everything(model, ema), strict=True))
    return same and all(step["skipped"] for step in skipped)


def is_resuming(folder: Path, model: ZeroModel, ema: EMA) -> bool:
    """Whether the next two steps are the same, to the bit, from the checkpoint in a folder; both train them."""
    resumed, resumed_ema = open_model(model.settings)
    load_checkpoint(open_checkpoint(folder), model=resumed, ema=resumed_ema)
    on = [train_step(model, ema, step) for step in AFTER]
    again = [train_step(resumed, resumed_ema, step) for step in AFTER]
    same = [
        torch.equal(one, other)
        for one, other in zip(everything(model, ema), everything(resumed, resumed_ema), strict=True)
    ]
    return on == again and all(same)


def state_bytes(model: ZeroModel) -> int:
    """Bytes of all that an optimizer keeps on this rank, as storages."""
    values = [value for state in model.optimizer.state.values() for value in state.values()]
    return sum(value.untyped_storage().nbytes() for value in values)


def save(folder: Path, model: ZeroModel, ema: EMA) -> Path:
    settings = model.settings
    trainer = TRAINER | {"step": len(RATES), "num_steps": 9, "num_ranks": dist.get_world_size(), "weight_layout": 2}
    trainer |= {"zero_stage": settings.zero_stage, "dtype": settings.dtype}
    trainer["fingerprint"] = {"training.optimizer": "muon"}
    save_checkpoint(folder, model=model, ema=ema, trainer=trainer, num_kept=1)
    dist.barrier()
    return folder / f"step-{len(RATES)}"


def keep_after(folder: Path, case: Case, model: ZeroModel) -> None:
    """Keep the weights that a case has at its end."""
    weights = model.gather_masters()
    if dist.get_rank() == 0:
        torch.save(weights, folder / f"{case.name}-after.pt")


def try_case(folder: Path, case: Case) -> dict[str, Any]:
    """Train a case's steps, or go on from another one's; what is gathered is kept beside."""
    settings = case.settings
    former = None if case.from_case is None else open_checkpoint(folder / case.from_case / f"step-{len(RATES)}")
    is_elastic = former is not None and needs_universal(former, dist.get_world_size())
    model, ema = open_model(settings, loads_universal=is_elastic)
    result: dict[str, Any] = {"is_elastic": is_elastic}
    if former is not None:
        load_checkpoint(former, model=model, ema=ema)
        result |= {"state_bytes": state_bytes(model), "elements": sum(master.numel() for master in model.masters)}
        loaded = {"masters": model.gather_masters(), "moments": moments_of(model), "ema": ema.gather()}
        if dist.get_rank() == 0:
            kept = torch.load(folder / f"{case.from_case}.pt", weights_only=True)
            result["loads_exactly"] = all(is_same(loaded[name], kept[name]) for name in loaded)
        for step in AFTER:
            train_step(model, ema, step)
        keep_after(folder, case, model)
        return result
    steps = [measured_step(model, ema, step) for step in range(len(RATES))]
    gathered = {"masters": model.gather_masters(), "moments": moments_of(model), "ema": ema.gather()}
    if dist.get_rank() == 0:
        torch.save(gathered, folder / f"{case.name}.pt")
    result |= {"steps": [step for step, _ in steps], "measured": [norms for _, norms in steps]}
    result |= {"state_bytes": state_bytes(model), "elements": sum(master.numel() for master in model.masters)}
    if case.saves:
        result["resumes_exactly"] = is_resuming(save(folder / case.name, model, ema), model, ema)
        keep_after(folder, case, model)
        result["skips"] = is_skipping(model, ema)
    return result


def make_universal(source: Path, output: Path) -> None:
    """Convert as the loop does, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    folders = ["--input_folder", str(source), "--output_folder", str(output)]
    numbers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    with mock.patch.object(sys, "argv", ["ds_to_universal", *folders, *numbers]), quiet():
        ds_to_universal.main(ds_to_universal.parse_arguments())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def main() -> None:
    initialize_ranks()
    folder, *texts = sys.argv[1:]
    # Pieces of several matrices, and of one.
    turns.TAKEN_AT_ONCE = muon.TAKEN_AT_ONCE = 1500
    conversions._make_universal = make_universal
    for text in texts:
        case = Case(**json.loads(text))
        turns.orthogonalized = gentle if case.is_gentle else orthogonalized
        result = try_case(Path(folder), case)
        if dist.get_rank() == 0:
            (Path(folder) / f"{case.name}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
