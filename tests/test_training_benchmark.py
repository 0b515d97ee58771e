"""The benchmark of a training step at a tiny size: both sides do the same work, each in a process of its own."""

import pytest

from benchmarks import train
from benchmarks.train import PRODUCTS_SIDE, Case, compare_all, measure, measure_in_process

TINY = Case(width=384, num_layers=1, pixels=64, batch_size=2, head_dim=64, caption_channels=16)


def test_a_side_is_measured_in_a_process_of_its_own():
    found = measure_in_process("diffusers", TINY, num_steps=1, returns_freed_memory=True)
    assert found["seconds"] > 0
    assert found["peak_gigabytes"] > 0


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
