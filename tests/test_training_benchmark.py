"""The benchmark of a training step at a tiny size: both sides do the same work, compiled too."""

from functools import partial

import pytest
import torch

from benchmarks import train
from benchmarks.train import PRODUCTS_SIDE, Case, compare_all, measure, measure_in_process

TINY = Case(width=384, num_layers=1, pixels=64, batch_size=2, caption_channels=16)


def test_a_side_is_measured_in_a_process_of_its_own():
    found = measure_in_process("diffusers", TINY, num_steps=1, returns_freed_memory=True)
    assert found["seconds"] > 0
    assert found["peak_gigabytes"] > 0
    assert found["mfu"] is None


def test_both_sides_train_on_the_same_loss(monkeypatch):
    # in this process, to save the imports; the test above has the other, and the peak of a process that is its own
    def measure_here(side, case, *, num_steps, returns_freed_memory):
        return measure(side, case, num_steps=num_steps) | {"peak_gigabytes": 1.0 if side == PRODUCTS_SIDE else 2.0}

    monkeypatch.setattr(train, "measure_in_process", measure_here)
    result = compare_all([TINY], num_steps=1, num_rounds=1)
    figures = result["width 384, 1 blocks, 64px, batch 2"]
    assert figures["loss_difference"] < 0.01  # bf16
    assert result["ratio_step"] == figures["ratio_step"] > 0
    assert result["ratio_peak_memory"] == figures["ratio_peak_memory"] == 2
    assert figures["ratio_peak_memory_keeping_all"] == 1
    extra = figures["ours_keeping_products_seconds"] / figures["ours_seconds"] - 1
    assert result["extra_time_keeping_products"] == pytest.approx(extra, abs=0.01)
    assert "mfu" not in result


def test_the_gpus_cases_compile_count_operations_and_survive_too_little_memory(monkeypatch):
    # dynamo traces as it does for a GPU, without the minutes of generating code
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(train, "device_peak_teraflops", lambda device: 1.0)
    compiled = Case(width=384, num_layers=1, pixels=64, batch_size=2, caption_channels=16, is_compiled=True)
    eager, traced = measure("ours", TINY, num_steps=1), measure("ours", compiled, num_steps=1)
    theirs, leaner = (measure(side, compiled, num_steps=1) for side in ("diffusers", PRODUCTS_SIDE))
    assert leaner["loss"] == pytest.approx(traced["loss"], rel=1e-4)
    assert traced["loss"] == pytest.approx(eager["loss"], rel=0.01)
    assert theirs["loss"] == pytest.approx(eager["loss"], rel=0.01)
    assert eager["mfu"] is not None
    assert eager["mfu"] > 0

    def fail(self: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train.Step, "__call__", fail)
    assert set(measure("ours", TINY, num_steps=1).values()) == {None}
