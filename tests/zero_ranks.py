"""One of the ranks that try ZeRO stages in turn; `test_training_zero.py` starts them and reads what rank 0 prints.

Usage: python zero_ranks.py FOLDER dtype zero_stage...
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_checkpoint import TRAINER
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from errors import UserError
from pipelines.store.checkpoints import open_checkpoint
from pixart.model import PixArt, PixArtConfig
from pixart.processes.ddpm import DDPM
from training.config import KeepActivations, StageTraining
from training.loop import measure
from training.loop.averages import Averages
from training.loop.ema import EMA
from training.loop.kept_averages import make_average
from training.loop.measure import UpdateMeter, total_norm
from training.loop.optimizers import adamw
from training.loop.power_average import exponent_of
from training.loop.state import load_checkpoint, save_checkpoint
from training.loop.zero import ZeroModel, initialize_ranks

CONFIG = PixArtConfig(num_layers=2, num_heads=2, head_dim=8, caption_channels=8, sample_size=4)
GLOBAL_BATCH = 8
EMA_DECAY = 0.9
PIECE_SIZE = 512
LINEAR = torch.nn.functional.linear
Weights = dict[str, Tensor]  # by name; gathered ones only on rank 0, elsewhere empty


def new_network() -> PixArt:
    torch.manual_seed(0)
    network = PixArt(CONFIG)
    torch.nn.init.normal_(network.get_parameter("blocks.0.cross_attention.out.weight"), std=0.1)
    return network


def new_model(settings: StageTraining) -> tuple[ZeroModel, EMA]:
    model = ZeroModel(new_network(), settings)
    return model, EMA(model, EMA_DECAY)


def batch_of(step: int) -> list[Tensor]:
    """Latents, noise, texts and timesteps of a global batch."""
    generator = torch.Generator().manual_seed(step)
    latents, noise = (torch.randn(GLOBAL_BATCH, 4, 4, 4, generator=generator) for _ in range(2))
    text = torch.randn(GLOBAL_BATCH, 6, 8, generator=generator)
    return [latents, noise, text, torch.randint(0, 1000, (GLOBAL_BATCH,), generator=generator)]


def mean_loss(model: ZeroModel, batch: list[Tensor], mine: slice, *, network: str = "") -> Tensor:
    """Return the loss of the network, or of one inside it by its name."""
    latents, noise, text, timesteps = (values[mine] for values in batch)
    process = DDPM()
    noisy = process.noisy(latents, noise, timesteps).to(model.dtype)
    asked = getattr(model.engine, network) if network else model.engine
    output = asked(noisy, timesteps, text.to(model.dtype))
    return process.loss(output, latents, noise, timesteps).total.mean()


def train_step(
    model: ZeroModel,
    ema: EMA,
    step: int,
    *,
    scale: float = 1.0,
    rate: float | None = None,
    is_ruined: bool = False,
) -> dict[str, float]:
    """Train on this rank's half of a batch; returns the loss over both halves and the gradient's norm."""
    batch = batch_of(step)
    num_micro_batches = model.settings.num_micro_batches
    num_parts = dist.get_world_size() * num_micro_batches
    total = torch.zeros((), dtype=torch.float64)
    for i in range(num_micro_batches):
        loss = mean_loss(model, batch, slice(dist.get_rank() * num_micro_batches + i, None, num_parts))
        model.backward(loss * scale, is_last=i + 1 == num_micro_batches)
        total += loss.detach() / num_parts
    update = model.update(model.settings.learning_rate if rate is None else rate, is_ruined=torch.tensor(is_ruined))
    ema.update(is_skipped=update.is_skipped)
    dist.all_reduce(total)
    return {"loss": float(total), "norm": float(update.gradient_norm), "skipped": bool(update.is_skipped)}


def norm_of_repeats(settings: StageTraining, num_repeats: int) -> float:
    """Return the norm of the mean gradient of one micro-batch given so many times: whatever the number, the same."""
    repeated = {"gradient_accumulation_steps": num_repeats, "global_batch_size": GLOBAL_BATCH * num_repeats}
    model, _ = new_model(settings.model_copy(update=repeated))
    for i in range(num_repeats):
        loss = mean_loss(model, batch_of(0), slice(dist.get_rank(), None, dist.get_world_size()))
        model.backward(loss, is_last=i + 1 == num_repeats)
    return float(model.update(settings.learning_rate, is_ruined=torch.tensor(False)).gradient_norm)


def masters_keeping(settings: StageTraining, kept: KeepActivations) -> Weights:
    """Train two steps, of which the backward pass is left so many activations."""
    model = new_model(settings.model_copy(update={"keep_activations": kept}))
    for step in range(2):
        train_step(*model, step)
    return model[0].gather_masters()


class LargestNew(TorchDispatchMode):
    """Notes the elements of the largest tensor made inside, views of others not counted."""

    num_elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.num_elements = max(self.num_elements, made.numel())
        return result


class WatchedMeter(UpdateMeter):
    """A meter whose own memory is watched."""

    largest = LargestNew()

    def _add_gradient(self, optimizer: torch.optim.Optimizer) -> None:
        with self.largest:
            super()._add_gradient(optimizer)


def watched_change(optimizer: torch.optim.Optimizer, change: Tensor, *, is_compiled: bool) -> None:
    """Add what a step changed, with its own memory watched."""
    with WatchedMeter.largest:
        add_change(optimizer, change, is_compiled=is_compiled)


add_change = adamw._add_change


def try_meter(settings: StageTraining) -> dict[str, Any]:
    """Measure updates at large and small rates, and the same from copies of all masters and first moments."""
    model, ema = new_model(settings)
    measured, from_copies = [], []
    for step, rate in enumerate((1e-2, 1e-2, 2e-5, 1e-6)):
        masters = [master.detach().clone() for master in model.masters]
        moments = [moment.clone() for moment in model.first_moments()]
        meter = WatchedMeter(model)
        adamw._add_change = watched_change
        train_step(model, ema, step, rate=rate)
        adamw._add_change = add_change
        measured.append(meter.norms())
        changes = [new.detach() - old for new, old in zip(model.masters, masters, strict=True)]
        pairs = zip(model.first_moments(), moments, strict=True)
        gradients = [(new - 0.9 * old) / (1 - 0.9) for new, old in pairs]
        from_copies.append((total_norm(model, changes), total_norm(model, gradients)))
    meter = UpdateMeter(model)
    train_step(model, ema, 4, scale=float("inf"))
    sizes = [master.numel() for master in model.masters]
    return {
        "measured": measured,
        "from_copies": from_copies,
        "measured_when_skipped": meter.norms(),
        "largest_piece": WatchedMeter.largest.num_elements,
        "largest_master": max(sizes),
    }


def is_same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def distance(ours: Weights, theirs: Weights) -> float:
    return sum(float((ours[name].double() - theirs[name]).square().sum()) for name in ours) ** 0.5


def train_and_average(model: ZeroModel, ema: EMA, num_steps: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Train; returns the steps and how far the average is from one computed here, and from the last masters."""
    average = model.gather_masters()
    steps, masters = [], average
    for step in range(num_steps):
        steps.append(train_step(model, ema, step))
        masters = model.gather_masters()
        average = {name: EMA_DECAY * average[name] + (1 - EMA_DECAY) * masters[name] for name in masters}
    gathered = ema.gather()
    return steps, {"ema_error": distance(gathered, average), "ema_lag": distance(gathered, masters)}


def try_clipping(settings: StageTraining, first_norm: float) -> dict[str, float]:
    """Train one model on huge gradients, and one without clipping on the same, scaled down to the clip's norm.

    Every other gradient has half that norm: one that was huge and not clipped would stay in Adam's moments and leave
    nothing of it. Adam's epsilon is large, so that steps grow with gradients.
    """
    settings = settings.model_copy(update={"adam_epsilon": 1e-3})
    clipped = new_model(settings)
    scaled = new_model(settings.model_copy(update={"gradient_clip": 1e9}))
    start = clipped[0].gather_masters()
    half = 0.5 * settings.gradient_clip / first_norm
    for step in range(4):
        if step % 2 == 0:
            train_step(*clipped, step, scale=half)
            train_step(*scaled, step, scale=half)
        else:
            norm = train_step(*clipped, step, scale=1e6)["norm"]
            train_step(*scaled, step, scale=1e6 * settings.gradient_clip / norm)
    masters = scaled[0].gather_masters()
    return {
        "move": distance(masters, start),
        "clipped_from_scaled": distance(clipped[0].gather_masters(), masters),
    }


class OfStep:
    """Power averages in the place of the one average of `train_step`."""

    def __init__(self, averages: Averages, step: int) -> None:
        self.averages, self.step = averages, step

    def update(self, *, is_skipped: Tensor) -> None:
        self.averages.update(self.step, is_skipped=is_skipped)


def try_power_averages(folder: Path, settings: StageTraining) -> dict[str, Any]:
    """Keep two power averages up; returns how far they are from sums over all masters, and whether disks keep them."""
    model = ZeroModel(new_network(), settings)
    averages = Averages(model)
    passed: list[Weights] = []
    for step in range(4):
        # The last step is skipped, and counts: weights that stay are weights, too.
        train_step(model, OfStep(averages, step), step, is_ruined=step == 3)  # pyright: ignore[reportArgumentType]
        passed.append(model.gather_masters())
    assert averages.second is not None
    gathered = [averages.exported.gather(), averages.second.gather()]
    expected = []
    for length in settings.ema_lengths:
        power = exponent_of(length) + 1
        shares = [((step + 1) ** power - step**power) / 4**power for step in range(4)]
        sums = {name: sum(share * each[name] for share, each in zip(shares, passed, strict=True)) for name in passed[0]}
        expected.append(sums)
    averages.keep(folder, 4)
    trainer = TRAINER | {"step": 4, "num_steps": 9, "zero_stage": settings.zero_stage, "dtype": settings.dtype}
    trainer["num_ranks"] = dist.get_world_size()
    save_checkpoint(folder, model=model, ema=averages.exported, second=averages.second, trainer=trainer, num_kept=1)
    dist.barrier()
    resumed = ZeroModel(new_network(), settings)
    again = Averages(resumed)
    assert again.second is not None
    load_checkpoint(open_checkpoint(folder / "step-4"), model=resumed, ema=again.exported, second=again.second)
    kept = make_average(folder, length=settings.ema_lengths[1], last=4).weights
    return {
        "power_error": max(map(distance, gathered, expected)),
        "power_lag": distance(gathered[0], gathered[1]),
        "power_survives": all(map(is_same, gathered, [again.exported.gather(), again.second.gather()])),
        "power_kept": all(torch.allclose(kept[name], gathered[1][name], rtol=1e-3, atol=1e-6) for name in gathered[1]),
    }


def try_stage(folder: Path, dtype: str, zero_stage: int) -> dict[str, Any]:
    settings = StageTraining(
        network="pixart",
        dtype=dtype,
        zero_stage=zero_stage,
        global_batch_size=GLOBAL_BATCH,
        learning_rate=1e-2,
        gradient_clip=0.01,
    )
    model, ema = new_model(settings)
    starts_exactly = is_same(model.gather_masters(), dict(new_network().named_parameters()))
    steps, averaged = train_and_average(model, ema, 4)
    average = ema.gather()
    to_run = new_network()
    ema.copy_to(to_run)
    trainer = TRAINER | {"step": 4, "num_steps": 9, "zero_stage": zero_stage, "dtype": dtype}
    trainer["num_ranks"] = dist.get_world_size()
    save_checkpoint(folder, model=model, ema=ema, trainer=trainer, num_kept=1)
    dist.barrier()
    on = [train_step(model, ema, step) for step in range(4, 6)]

    resumed, resumed_ema = new_model(settings)
    load_checkpoint(open_checkpoint(folder / "step-4"), model=resumed, ema=resumed_ema)
    loaded = resumed_ema.gather()
    again = [train_step(resumed, resumed_ema, step) for step in range(4, 6)]
    same_masters = is_same(model.gather_masters(), resumed.gather_masters())
    same_ema = is_same(ema.gather(), resumed_ema.gather())

    unmoved = everything(resumed, resumed_ema)
    skipped = [
        train_step(resumed, resumed_ema, 6, scale=float("inf")),
        train_step(resumed, resumed_ema, 7, is_ruined=True),
    ]
    still = everything(resumed, resumed_ema)
    same_after_skip = all(torch.equal(a, b) for a, b in zip(unmoved, still, strict=True))
    accumulating = new_model(settings.model_copy(update={"gradient_accumulation_steps": 2}))
    accumulated = [train_step(*accumulating, step) for step in range(2)]
    kept = [masters_keeping(settings, kept) for kept in ("all", "products", "inputs")]
    return {
        "recomputing_changes_nothing": is_same(kept[0], kept[1]) and is_same(kept[0], kept[2]),
        "leaves_torch_alone": torch.nn.functional.linear is LINEAR,
        **averaged,
        **try_clipping(settings, steps[0]["norm"]),
        **try_meter(settings),
        **try_power_averages(folder / "power", settings.model_copy(update={"ema": "power"})),
        "losses": [step["loss"] for step in steps],
        "norms": [step["norm"] for step in steps],
        "norms_of_repeats": [norm_of_repeats(settings, num_repeats) for num_repeats in (1, 64)],
        "accumulated": [[step["loss"], step["norm"]] for step in accumulated],
        "ema": {name: float(value.double().norm()) for name, value in average.items()},
        "starts_exactly": starts_exactly,
        "average_runs": is_same(average, dict(to_run.named_parameters()) if average else {}),
        "is_ema_fp32": all(value.dtype == torch.float32 for value in average.values()),
        "ema_survives_disk": is_same(average, loaded),
        "resumes_exactly": on == again and same_masters and same_ema,
        "refuses_foreign_pickles": refuses_foreign_pickles(resumed, resumed_ema, folder / "step-4"),
        "skips_infinite": all(step["skipped"] for step in skipped) and same_after_skip,
        "norms_of_skipped": [step["norm"] for step in skipped],
    }


def everything(model: ZeroModel, ema: EMA) -> list[Tensor]:
    """Copy what an update changes: masters, moments, their count, weights the network computes with, the average."""
    kept = [
        *model.masters,
        *ema.shards,
        *(value for state in model.optimizer.state.values() for value in state.values()),
    ]
    if model.settings.zero_stage < 3:  # there a weight is on no rank but while it is used
        kept += list(model.engine.module.parameters())
    return [tensor.detach().clone() for tensor in kept]


def refuses_foreign_pickles(model: ZeroModel, ema: EMA, checkpoint: Path) -> bool:
    """Whether state that holds more than tensors and DeepSpeed's own records is not unpickled, with a word."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in (checkpoint / "deepspeed").glob("*model_states.pt"):
            torch.save({"module": checkpoint}, path)
    dist.barrier()
    try:
        load_checkpoint(open_checkpoint(checkpoint), model=model, ema=ema)
    except UserError as error:
        return f"{checkpoint / 'deepspeed'} holds what no training has written" in str(error)
    return False


if __name__ == "__main__":
    initialize_ranks()
    folder, dtype, *stages = sys.argv[1:]
    measure.PIECE_SIZE = adamw.PIECE_SIZE = PIECE_SIZE
    for stage in stages:
        result = try_stage(Path(folder) / f"{dtype}-{stage}", dtype, int(stage))
        if dist.get_rank() == 0:
            (Path(folder) / f"{dtype}-{stage}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
