"""`make bench-caption` at small size: both ways give the same captions, and so does the part for a GPU."""

import json
from typing import Any

import pytest
import torch

from benchmarks import caption
from benchmarks.gpu import captioning as gpu
from benchmarks.gpu.parts import Size
from captioning.engines.llama import LlamaForward


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setattr(caption, "RESULT", tmp_path / "caption.json")
    return tmp_path / "caption.json"


def test_both_ways_say_the_same_of_toy_images(result, capsys) -> None:
    caption.main(["--images", "12", "--batch-size", "4", "--rounds", "1"])
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures == json.loads(result.read_text())
    assert figures["identical"] and figures["num_images"] == 12 and figures["ratio_generate"] > 0
    assert figures["caption_tokens"]["p5"] < figures["caption_tokens"]["p95"], "lengths vary"


def test_on_a_gpu_lengths_are_forced_on_both_sides() -> None:
    kept: list[dict[str, Any]] = []
    figures = gpu.caption_7b(Size(is_tiny=True, keep=lambda early: kept.append(dict(early))))
    assert figures["caption_7b_identical"] and figures["caption_7b_ratio"] > 0
    assert kept[0].keys() < figures.keys() and kept[-1] == figures
    lengths = gpu.make_prompts(gpu.LLAVA_7B)[1]
    assert 90 < sum(lengths) / len(lengths) < 102 and min(lengths) < 50 and max(lengths) > 180


def test_a_step_moves_the_weights_and_the_live_keys_once() -> None:
    model = gpu.build_model(gpu.TINY, device="cpu", dtype=torch.float32)
    assert gpu.text_bytes(model) == 4 * (2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 64 * 32)
    prompts = gpu.make_prompts(gpu.TINY)[0]
    decoder = gpu.ForcedDecoder(LlamaForward(model), num_slots=3, longest=40)
    _, num_tokens = decoder.time_steps(prompts, num_steps=5)
    # 23 of each prompt, 4 steps before, and on average half of those timed, their own token included.
    assert num_tokens == 3 * (23 + 4 + 3)
