"""One of the ranks that train with moments in 8 bits.

`test_training_optimizers.py` starts them and reads their file.

Usage: python optimizer_ranks.py FOLDER dtype zero_stage...
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_checkpoint import TRAINER
from zero_ranks import GLOBAL_BATCH, batch_of, everything, is_same, mean_loss, new_model, new_network, train_step

from errors import UserError
from pipelines.store.checkpoints import open_checkpoint
from training.config import StageTraining
from training.loop.conversions import needs_universal
from training.loop.measure import UpdateMeter
from training.loop.optimizers.adamw8bit import MOMENTS
from training.loop.state import load_checkpoint, save_checkpoint
from training.loop.zero import ZeroModel, initialize_ranks
from training.stages.critics import CRITIC, PREFIX, add_critic


def try_stage(folder: Path, dtype: str, zero_stage: int) -> dict[str, Any]:
    values: dict[str, Any] = {"dtype": dtype, "zero_stage": zero_stage, "learning_rate": 1e-3, "gradient_clip": 0.01}
    settings = StageTraining(network="pixart", global_batch_size=GLOBAL_BATCH, optimizer="adamw8bit", **values)
    whole, whole_ema = new_model(settings.model_copy(update={"optimizer": "adamw"}))
    expected = [train_step(whole, whole_ema, step)["loss"] for step in range(6)]
    model, ema = new_model(settings)
    found = [train_step(model, ema, step)["loss"] for step in range(6)]
    state = list(model.optimizer.state.values())
    num_bytes = sum(value.nbytes for each in state for name, value in each.items() if name != "step")
    moments = [each[name] for each in state for name in MOMENTS if name in each]
    num_elements = sum(master.numel() for master in model.masters)

    numbers = {"num_ranks": dist.get_world_size(), "zero_stage": zero_stage, "dtype": dtype}
    numbers["fingerprint"] = {"training.optimizer": "adamw8bit"}
    trainer = TRAINER | {"step": 6, "num_steps": 9} | numbers
    save_checkpoint(folder, model=model, ema=ema, trainer=trainer, num_kept=1)
    dist.barrier()
    on = [train_step(model, ema, step) for step in range(6, 8)]
    checkpoint = open_checkpoint(folder / "step-6")
    resumed, resumed_ema = new_model(settings)
    load_checkpoint(checkpoint, model=resumed, ema=resumed_ema)
    again = [train_step(resumed, resumed_ema, step) for step in range(6, 8)]
    resumes = on == again and is_same(model.gather_masters(), resumed.gather_masters())

    before = everything(resumed, resumed_ema)
    skipped = train_step(resumed, resumed_ema, 8, scale=float("inf"))["skipped"]
    kept = all(torch.equal(a, b) for a, b in zip(before, everything(resumed, resumed_ema), strict=True))
    masters = [master.detach().clone() for master in model.masters]
    meter = UpdateMeter(model)
    train_step(model, ema, 8)
    square = sum((new.detach() - old).double().square().sum() for new, old in zip(model.masters, masters, strict=True))
    if zero_stage:
        dist.all_reduce(square)
    try:
        refusal = str(needs_universal(checkpoint, dist.get_world_size() + 1))
    except UserError as error:
        refusal = str(error)
    return {
        "losses": [expected, found],
        "bytes_of_an_element": num_bytes / num_elements,
        "are_codes": all(moment.dtype == torch.uint8 for moment in moments),
        "resumes_exactly": resumes,
        "skips": skipped and kept,
        "change": [meter.norms()[0], float(square) ** 0.5],
        "refusal": refusal,
    }


def try_critic(dtype: str, zero_stage: int, optimizer: str) -> float:
    """Train a network and its critic, of which the network's loss is far larger in one of two runs, then far smaller.

    Return the largest difference that it makes to a weight of the critic, in sizes of what all steps changed.
    """
    values: dict[str, Any] = {"dtype": dtype, "zero_stage": zero_stage, "optimizer": optimizer, "gradient_clip": 1e-4}
    settings = StageTraining(network="pixart", global_batch_size=GLOBAL_BATCH, learning_rate=1e-3, **values)
    found = [critic_after(settings, scales) for scales in ([1.0] * 4, [1.0, 4096.0, 1.0, 64.0])]
    if dist.get_rank():
        return 0.0
    start = {name: weight.detach() for name, weight in new_network().named_parameters()}
    change = max(float((found[0][name] - start[name]).abs().max()) for name in start)
    return max(float((found[0][name] - found[1][name]).abs().max()) for name in start) / change


def critic_after(settings: StageTraining, scales: list[float]) -> dict[str, torch.Tensor]:
    """Return the critic's weights after a step for each number that the network's loss is multiplied by."""
    network = new_network()
    add_critic(network, network)
    model = ZeroModel(network, settings)
    part = slice(dist.get_rank(), None, dist.get_world_size())
    for step, scale in enumerate(scales):
        own, critic = (mean_loss(model, batch_of(step), part, network=each) for each in ("", CRITIC))
        model.backward(own * scale + critic, is_last=True)
        model.update(settings.learning_rate, is_ruined=torch.tensor(False))
    masters = model.gather_masters()
    return {name.removeprefix(PREFIX): weight for name, weight in masters.items() if name.startswith(PREFIX)}


def try_offload(folder: Path, optimizer: Any) -> dict[str, Any]:
    """Train with everything on the device and with each thing left on the host: masters, averages, and a resume."""
    settings = StageTraining(network="pixart", global_batch_size=GLOBAL_BATCH, optimizer=optimizer, dtype="bf16")
    expected = new_model(settings)
    found = {name: new_model(settings.model_copy(update={"offload": name})) for name in ("average", "optimizer")}
    steps = {name: [train_step(*opened, step) for step in range(3)] for name, opened in found.items()}
    norms = [train_step(*expected, step) for step in range(3)]
    masters, average = expected[0].gather_masters(), expected[1].gather()
    same = {
        name: steps[name] == norms and is_same(masters, model.gather_masters()) and is_same(average, ema.gather())
        for name, (model, ema) in found.items()
    }
    model, ema = found["optimizer"]
    trainer = TRAINER | {"step": 3, "num_steps": 9, "num_ranks": 1, "zero_stage": 0, "dtype": "bf16"}
    save_checkpoint(folder, model=model, ema=ema, trainer=trainer, num_kept=1)
    resumed, resumed_ema = new_model(model.settings)
    load_checkpoint(open_checkpoint(folder / "step-3"), model=resumed, ema=resumed_ema)
    on, again = train_step(model, ema, 3), train_step(resumed, resumed_ema, 3)
    same["resumed"] = on == again and is_same(model.gather_masters(), resumed.gather_masters())
    # Several micro-batches are summed in fp32, as under ZeRO 2.
    parts = {"gradient_accumulation_steps": 4}
    summed = [
        train_step(*new_model(settings.model_copy(update=parts | other)), 0)["norm"]
        for other in ({"offload": "optimizer"}, {"zero_stage": 2})
    ]
    same["summed in fp32"] = abs(summed[0] - summed[1]) < 1e-6 * summed[1]
    return same


if __name__ == "__main__":
    initialize_ranks()
    folder, dtype, *stages = sys.argv[1:]
    results = {stage: try_stage(Path(folder) / f"{dtype}-{stage}", dtype, int(stage)) for stage in stages}
    for stage in stages:
        found = {name: try_critic(dtype, int(stage), name) for name in ("adamw", "adamw8bit")}
        results[stage]["difference_of_critics"] = found
    if dist.get_world_size() == 1:
        results["offload"] = {name: try_offload(Path(folder) / name, name) for name in ("adamw", "adamw8bit")}
    if dist.get_rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
