"""Stages whose blocks compress keys and values: over weights that did not, and on from weights that do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_run import make_run, metrics, train

from pixart.convert import load_diffusers
from pixart.model import PixArt

pytestmark = pytest.mark.slow


def test_compression_is_turned_on_over_weights_without_it_trains_resumes_and_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    train(run, 2, starts_from="scratch", num_steps=2)
    compressed = {"kv_compressed_blocks": [1], "zero_stage": 2, "dtype": "bf16", "checkpoint_every": 2}
    assert "1 blocks begin to compress" in train(run, 3, num_steps=4, **compressed)
    folder = run / "training" / "stage3" / "step-4" / "model"
    assert json.loads((folder / "config.json").read_text())["kv_compressed_blocks"] == [1]
    weight = load_diffusers(folder).get_parameter("blocks.1.attention.compression.convolution.weight")
    assert not torch.equal(weight, torch.full_like(weight, 0.25)), "it trains"
    assert "after step 4" in train(run, 3, num_steps=6, **compressed)
    assert [line["step"] for line in metrics(run, 3)] == [2, 4, 6]
    said = train(run, 3, num_steps=8, status=2, **compressed | {"kv_compressed_blocks": [0, 1]})
    assert "trained with training.stage3.kv_compressed_blocks [1], but it is [0, 1] now" in said

    shutil.rmtree(run / "training" / "stage2")
    said = train(run, 2, starts_from=str(folder), num_steps=1, status=2, kv_compressed_blocks=[0])
    assert "compresses keys and values in block 1, which kv_compressed_blocks = [0] of the stage leaves out" in said
    train(run, 2, starts_from=str(folder), num_steps=1)
    again = load_diffusers(run / "training" / "stage2" / "step-1" / "model")
    assert isinstance(again, PixArt) and again.config.kv_compressed_blocks == (1,)
    train(run, 1, num_steps=1, kv_compressed_blocks=[0])  # typed for all stages it is for those that can
    assert "kv_compressed_blocks" not in json.loads(
        (run / "training" / "stage1" / "step-1" / "model" / "config.json").read_text()
    )
