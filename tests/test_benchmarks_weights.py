"""`make bench-weights`: errors of rounded weights, and the judge's table, at the smallest size there is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import weights


def layer(dtype: torch.dtype, kind: str | None) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """A linear layer, which is all that is rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    inputs = torch.randn(8, 64, dtype=torch.float32)
    if kind is not None:
        weights.quantize(model, kind)
    return model, lambda: model(inputs.to(dtype)).float()


def test_int8_is_nearer_than_fp8_and_both_take_a_quarter():
    found = weights.errors(layer)
    assert 0 < found["int8"] < found["fp8"] < 0.1
    assert found["bfloat16"] < found["int8_bfloat16"] < found["fp8"]
    assert found["bytes_bfloat16"] == 0.5
    for kind in weights.KINDS:  # and a scale to each output, with torchao's zero points
        assert 0.25 + 1 / 64 <= found[f"bytes_{kind}"] < 0.28


def test_the_table_and_the_last_line_say_the_same(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "transformer", layer)
    monkeypatch.setattr(weights, "text_encoder", layer)
    monkeypatch.setattr(weights, "NUM_PROMPTS", 3)
    monkeypatch.setattr(weights, "RESULT", tmp_path / "results" / "weights.json")
    weights.main()
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found == json.loads((tmp_path / "results" / "weights.json").read_text())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]
    error = f"{found['transformer']['int8']:.3%}"
    assert ["int8", error, error, f"{found['transformer']['bytes_int8']:.2f}"] in rows
    assert found["judge"]["num_objects"] >= 3
    assert found["judge"]["num_lost"] + found["judge"]["num_gained"] <= found["judge"]["num_objects"]


@pytest.mark.parametrize("make", [weights.transformer, weights.text_encoder])
def test_models_are_rounded_where_they_are_said_to_be(make, monkeypatch):
    """At an eighth of the published depth and a few tokens, but its width."""
    monkeypatch.setattr(weights, "NUM_LAYERS", 2 if make is weights.text_encoder else 1)
    monkeypatch.setattr(weights, "NUM_TOKENS", 4)
    monkeypatch.setattr(weights, "NUM_PROMPT_TOKENS", 3)
    with torch.inference_mode():
        exact = make(torch.float32, None)[1]()
        rounded = make(torch.float32, "int8")[1]()
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02
