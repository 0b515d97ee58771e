"""One model of memory: what it reckons is the peak of living storages that a dispatch mode counts in the real loop.

From before the networks are made to after two updates, under DeepSpeed, of networks of three sizes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from warm_python import run_ranks

# Narrow and long, the middle, wide and short: of each other parts are the largest.
SIZES = {
    "long": {"num_layers": 2, "num_heads": 2, "head_dim": 16, "side": 32, "num_text_tokens": 8, "text_width": 24},
    "middle": {"num_layers": 3, "num_heads": 4, "head_dim": 32, "side": 16, "num_text_tokens": 20, "text_width": 64},
    "wide": {"num_layers": 2, "num_heads": 4, "head_dim": 72, "side": 8, "num_text_tokens": 30, "text_width": 96},
}
BATCHES = {"long": 8, "middle": 16, "wide": 4}
MATCHING = {"objective": "distribution_matching"}
PART = ["blocks.*.attention.*"]


def count(folder: Path, cases: list[dict[str, Any]], *, num_ranks: int = 1) -> list[dict[str, Any]]:
    file = folder / "counted.json"
    arguments = [str(file), *map(json.dumps, cases)]
    run_ranks("budget_rank", arguments, num_ranks=num_ranks, errors=folder, timeout_seconds=300)
    return json.loads(file.read_text())


def case_of(size: str, **settings: Any) -> dict[str, Any]:
    return SIZES[size] | {"settings": {"global_batch_size": BATCHES[size]} | settings}


def require_close(cases: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    for case, counted in zip(cases, found, strict=True):
        assert counted["reckoned"] == pytest.approx(counted["whole"], rel=0.1), (case["settings"], counted)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_what_is_reckoned_is_the_peak_of_the_whole_loop(tmp_path: Path, size: str) -> None:
    cases = [
        case_of(size, dtype=dtype, keep_activations=kept, zero_stage=zero_stage, **others)
        for dtype, kept, zero_stage, others in (
            ("bf16", "all", 0, {}),
            ("bf16", "products", 0, {"trains": PART}),
            ("bf16", "inputs", 0, {"gradient_accumulation_steps": 2}),
            ("bf16", "inputs", 2, {"gradient_accumulation_steps": 2, "trains": PART}),
            ("bf16", "all", 1, {}),
            ("fp32", "all", 0, {"gradient_accumulation_steps": 2}),
            ("fp32", "inputs", 0, {"trains": PART}),
            ("fp32", "products", 2, {}),
            ("bf16", "inputs", 0, {"trains": "lora"}),
            ("bf16", "all", 0, {"trains": "lora"}),
            ("bf16", "all", 0, {"trains": "lora", "optimizer": "adamw8bit"}),
            ("bf16", "inputs", 0, {"trains": "lora", "optimizer": "adamw8bit", "gradient_accumulation_steps": 2}),
            ("bf16", "all", 0, {"optimizer": "adamw8bit"}),
            ("bf16", "inputs", 0, {"optimizer": "adamw8bit", "offload": "average"}),
            ("bf16", "inputs", 2, {"optimizer": "adamw8bit"}),
            ("bf16", "inputs", 0, {"offload": "optimizer", "gradient_accumulation_steps": 2}),
            ("bf16", "inputs", 0, {"optimizer": "muon"}),
            ("bf16", "inputs", 2, MATCHING),
            ("fp32", "all", 0, MATCHING | {"trains": "lora"}),
            ("fp32", "all", 0, MATCHING | {"matching": {"consistency_weight": 1.0}}),
        )
    ]
    found = count(tmp_path, cases)
    require_close(cases, found)
    for case, counted in zip(cases, found, strict=True):
        if case["settings"]["dtype"] == "bf16":
            assert counted["reckoned_start"] == pytest.approx(counted["start"], rel=0.1), (case["settings"], counted)


@pytest.mark.slow
def test_ranks_that_share_are_reckoned_too(tmp_path: Path) -> None:
    cases = [
        case_of("middle", dtype="bf16", keep_activations="products", zero_stage=zero_stage, **others)
        for zero_stage in (0, 1, 2, 3)
        for others in ({}, {"gradient_accumulation_steps": 2})
    ]
    cases.append(case_of("middle", dtype="bf16", keep_activations="inputs", zero_stage=3, optimizer="muon"))
    require_close(cases, count(tmp_path, cases, num_ranks=2))


@pytest.mark.slow
def test_what_a_student_shares_with_its_average_and_teacher_is_held_once(tmp_path: Path) -> None:
    """Of adapters and of a part of the weights, and of a student of all, where there is nothing to share."""
    distil = {"objective": "consistency", "consistency": {"guidance_range": [5.5, 5.5]}, "keep_activations": "all"}
    cases = [
        case_of("middle", dtype=dtype, zero_stage=zero_stage, **distil, **others)
        for dtype, zero_stage, others in (
            ("bf16", 0, {"trains": "lora"}),
            ("bf16", 2, {"trains": "lora"}),
            ("fp32", 0, {"trains": "lora"}),
            ("bf16", 0, {"trains": PART}),
            ("bf16", 0, {}),
        )
    ]
    found = count(tmp_path, cases)
    require_close(cases, found)
    adapters, _, _, _, whole = (counted["parts"] for counted in found)
    assert adapters["activations"] and adapters["weights"] < whole["weights"] / 2
    sharded = [case_of("middle", dtype="bf16", zero_stage=3, trains="lora", **distil)]
    require_close(sharded, count(tmp_path, sharded, num_ranks=2))
