"""`make bench-caption` at small size: both ways give the same captions, in its CPU and in its GPU mode."""

import json

import pytest

from benchmarks import caption


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


def test_the_gpu_mode_forces_the_same_lengths_on_both_sides(result, capsys) -> None:
    caption.main(["--shape", "tiny", "--rounds", "1"])
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["identical"] and figures["shape"] == "tiny" and figures["share_of_bandwidth"] > 0
    lengths = caption.make_prompts(caption.SHAPES["llava-1.5-7b"])[1]
    assert 90 < sum(lengths) / len(lengths) < 110 and min(lengths) < 60 and max(lengths) > 180


def test_the_limit_counts_weights_and_live_keys_once() -> None:
    shape = caption.SHAPES["tiny"]
    model = caption.build_model(shape, device="cpu", dtype=caption.torch.float32)
    limit = caption.bandwidth_limit(model, shape, [10, 10], bytes_per_second=1e9)
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters()) + 64 * 32
    keys_and_values = 2 * 2 * 32 * (1 + 16 + 6 + 5)
    assert limit == pytest.approx(1e9 * 4 / ((weights + 4 * keys_and_values) * 4))
