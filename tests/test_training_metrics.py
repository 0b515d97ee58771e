"""The numbers of a training: shares, learning rates, losses, what is logged, and what it costs in memory and money."""

import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch._dynamo.utils import counters

from errors import UserError
from training.config import StageTraining
from training.launch.disk_needs import checkpoint_bytes
from training.launch.preflight import require_even_batches
from training.launch.reckoning import rank_bytes
from training.loop import loop
from training.loop.clock import Clock
from training.loop.losses import LossWindow
from training.loop.metrics import MetricsLog, costs
from training.loop.optimizers import adamw
from training.loop.schedule import learning_rate_at
from training.objectives import objective
from training.stages.weights import WeightCounts

CPU = torch.device("cpu")


def test_batches_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UserError, match=r"global_batch_size 8 is not a multiple of 6: 3 ranks times .* 2"):
        require_even_batches(StageTraining(network="pixart", global_batch_size=8, gradient_accumulation_steps=2), 3)


def test_learning_rate_warms_up_stays_and_falls() -> None:
    settings = StageTraining(network="pixart", learning_rate=1.0, warmup_steps=9, num_steps=100, decay_fraction=0.2)
    rates = [learning_rate_at(settings, step) for step in range(100)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(rates[9:80]) == {1.0}
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[80:]))
    constant = StageTraining(network="pixart", learning_rate=2e-5, num_steps=100)
    assert {learning_rate_at(constant, step) for step in range(100)} == {2e-5}


@pytest.mark.parametrize(
    ("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)], ids=lambda value: str(value)
)
def test_the_rate_falls_as_its_shape_says_and_from_no_other_step(shape: Any, halfway: float) -> None:
    decay = StageTraining(
        network="dit", learning_rate=1.0, num_steps=1001, decay_fraction=999 / 1001, decay_shape=shape
    )
    rates = [learning_rate_at(decay, step) for step in range(1001)]
    assert rates[:2] == [1.0, 1.0] and all(a > b > 0 for a, b in itertools.pairwise(rates[1:]))
    assert rates[501] == pytest.approx(halfway), "after 500 of 1,000 parts"
    steepest = max(range(1, 1000), key=lambda step: rates[step] - rates[step + 1])
    assert shape == "linear" or steepest == pytest.approx({"cosine": 501, "sqrt": 1}[shape], abs=1)
    whole = decay.model_copy(update={"decay_fraction": 1.0, "num_steps": 10**6})
    assert learning_rate_at(whole, 250_000) == pytest.approx(
        {"linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2, "sqrt": 0.5}[shape], abs=1e-5
    )


class Losses:
    sums = torch.tensor([1.0, 2.0, *[0.0] * 8])
    counts = torch.tensor([1.0, 3.0, *[0.0] * 8])
    parts: ClassVar = {"mse": torch.tensor(2.0), "vlb": torch.tensor(1.0)}


def test_metrics_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    def lines() -> list[Any]:
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    with MetricsLog(tmp_path, step=0, boards=[]) as metrics:
        for step in (2, 4, 6):
            metrics.write({"step": step, "loss": 1.0, "loss_by_timestep": [0.5, None]})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    with MetricsLog(tmp_path, step=4, boards=[]) as metrics:
        metrics.write({"step": 6, "loss": 2.0, "loss_by_timestep": []})
    assert [(line["step"], line["loss"]) for line in lines()] == [(2, 1.0), (4, 1.0), (6, 2.0)]


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        MetricsLog(tmp_path, step=0, boards=[]) as log,
        Path("/dev/full").open("ab", buffering=0) as full,
        monkeypatch.context() as patch,
    ):
        patch.setattr(log, "_file", full)
        with pytest.raises(OSError, match="/dev/full cannot be written: No space left on device; the last checkpoint"):
            log.write({"step": 1})


def test_a_loss_window_goes_through_a_checkpoint() -> None:
    window = LossWindow(device=CPU)
    window.add(Losses())  # pyright: ignore[reportArgumentType]
    window = LossWindow(json.loads(json.dumps(window.state)), device=CPU)
    window.add(Losses())  # pyright: ignore[reportArgumentType]
    losses, num_steps = window.flush(has_times=True)
    assert num_steps == 2
    assert losses["loss"] == pytest.approx(6 / 8)
    assert losses["mse"] == pytest.approx(4 / 8)
    assert losses["vlb"] == pytest.approx(2 / 8)
    assert losses["loss_by_timestep"] == pytest.approx([1.0, 2 / 3, *[None] * 8])
    assert window.state == LossWindow(device=CPU).state


def test_a_loss_window_of_an_earlier_checkpoint_keeps_what_it_had() -> None:
    window = LossWindow(device=CPU)
    window.add(Losses())  # pyright: ignore[reportArgumentType]
    earlier = {name: value for name, value in window.state.items() if name != "parts"} | {"squared_error": 2.0}
    window = LossWindow(earlier, device=CPU)
    window.add(Losses())  # pyright: ignore[reportArgumentType]
    losses, _ = window.flush(has_times=True)
    assert losses["mse"] == pytest.approx(4 / 8) and "vlb" not in losses
    window.add(Losses())  # pyright: ignore[reportArgumentType]
    assert window.flush(has_times=True)[0]["vlb"] == pytest.approx(1 / 4)


def test_costs_and_memory_follow_their_formulas() -> None:
    settings = StageTraining(
        network="pixart", dollars_per_device_hour=2.0, watts_per_device=500.0, co2_kilograms_per_kilowatt_hour=0.4
    )
    spent = costs(settings, device_seconds=4 * 7200)
    assert spent == pytest.approx({"device_days": 1 / 3, "dollars": 16.0, "co2_kilograms": 1.6})
    whole = WeightCounts(trained=100)
    sizes = {
        (zero_stage, dtype): rank_bytes(
            StageTraining(network="pixart", zero_stage=zero_stage, dtype=dtype), whole, num_ranks=4
        )
        for zero_stage in (0, 1, 2, 3)
        for dtype in ("fp32", "bf16")
    }
    assert sizes[0, "fp32"] == 100 * (4 + 4 + 8 + 4)
    assert sizes[0, "bf16"] == 100 * (2 + 2 + 4 + 8 + 4)
    assert sizes[3, "bf16"] == 100 * (2 + 2 + 4 + 8 + 4) // 4
    summing = StageTraining(network="pixart", zero_stage=2, dtype="bf16", gradient_accumulation_steps=2)
    assert rank_bytes(summing, whole, num_ranks=4) == 100 * 2 + 100 * (4 + 4 + 8 + 4) // 4
    part = WeightCounts(trained=100, frozen=1000, beside=10_000)
    others = {0: 2 * 1000 + 2 * 10_000, 3: 2 * 1000 // 4 + 2 * 10_000}  # ZeRO 3 shards what it runs backward through
    for zero_stage, num_bytes in others.items():
        settings = StageTraining(network="pixart", zero_stage=zero_stage, dtype="bf16")
        assert rank_bytes(settings, part, num_ranks=4) == rank_bytes(settings, whole, num_ranks=4) + num_bytes
    # The frozen ones are in `model/` alone.
    assert checkpoint_bytes(summing, part) == checkpoint_bytes(summing, whole) + 4 * 1000


def test_device_seconds_count_the_ranks_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now_seconds = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_seconds)
    clock = Clock(num_devices=8)
    now_seconds = 110.0
    assert (clock.elapsed_seconds, clock.device_seconds) == (10, 80)
    resumed = Clock(clock.elapsed_seconds, device_seconds=clock.device_seconds, num_devices=2)
    now_seconds = 115.0
    assert (resumed.elapsed_seconds, resumed.device_seconds) == (15, 90)


@pytest.mark.parametrize(("read_seconds", "copy_seconds", "fraction"), [(3.0, 0.0, 0.75), (0.0, 3.0, 0.0)])
def test_waiting_for_data_is_not_waiting_for_its_copy(
    monkeypatch: pytest.MonkeyPatch, read_seconds: float, copy_seconds: float, fraction: float
) -> None:
    now_seconds = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_seconds)

    def take(seconds: float, result: Any) -> Any:
        nonlocal now_seconds
        now_seconds += seconds
        return result

    losses = objective.Losses(total=torch.ones(1), times=torch.zeros(1), parts={})
    batch = SimpleNamespace(keys=["a"], shards=["laion_0"], bucket="32x32")
    transfers = SimpleNamespace(
        bring=lambda packed: take(copy_seconds / 2, batch), finish=lambda: take(copy_seconds / 2, None)
    )
    clock = Clock()
    session: Any = SimpleNamespace(
        networks=SimpleNamespace(model=SimpleNamespace(device="cpu", backward=lambda loss, is_last: None)),
        progress=SimpleNamespace(clock=clock),
        job=SimpleNamespace(settings=StageTraining(network="pixart", gradient_accumulation_steps=2)),
        flops=SimpleNamespace(of_batch=lambda packed: 0),
        objective=SimpleNamespace(loss=lambda networks, batch: take(0.5, losses)),
        batches=(take(read_seconds / 2, None) for _ in range(2)),
        transfers=transfers,
    )
    loop._forward_backward(session)
    assert clock.lap(8, peak_teraflops=None)["data_wait_fraction"] == fraction


def test_compiled_changes_are_measured_as_others_are() -> None:
    generator, num_graphs = torch.Generator().manual_seed(0), counters["stats"]["unique_graphs"]
    # The learning rate differs at every line: numbers are tensors, or the code would be compiled anew for each.
    for size, rate in ((5000, 1e-3), (5000, 1e-4), (777, 1e-5)):
        new, mean = (torch.randn(size, generator=generator) for _ in range(2))
        square = torch.rand(size, generator=generator)
        numbers = [torch.tensor(number, dtype=torch.float64) for number in (rate, 0.5, 1e-8, 1 - 0.03 * rate)]
        expected = adamw._square_of_change(new, mean, square, *numbers)
        assert float(adamw._compiled_change()(new, mean, square, *numbers)) == pytest.approx(float(expected))
    assert counters["stats"]["unique_graphs"] <= num_graphs + 2, "one of the first size and one of all others"
