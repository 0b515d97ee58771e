"""`make bench-quality`: how the shortest stage is found, what is typed for one, and the ratios of several seeds."""

import json
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality import BARS, CONTESTANTS, Trained, find_shortest, length, summarize
from errors import UserError
from pipelines.store.summary import update_summary


def trained(index: int, least: int, *, seconds: float = 0.1) -> Trained:
    """A stage that reaches the bars from the length `least` on."""
    scores = {name: bar if index >= least else bar - 0.001 for name, bar in BARS.items()}
    return Trained(num_steps=length(index), seconds=seconds * length(index), scores=scores)


def test_lengths_double_every_four() -> None:
    assert [length(index) for index in (0, 1, 4, 8, 16)] == [100, 119, 200, 400, 1600]


@pytest.mark.parametrize(
    ("least", "asked"),
    [(8, [8, 7]), (6, [8, 7, 6, 5]), (0, [8, 7, 6, 5, 4, 3, 2, 1, 0]), (9, [8, 9]), (11, [8, 9, 10, 11])],
)
def test_the_shortest_that_reaches_the_bars_is_found_and_is_last(least, asked) -> None:
    seen: list[int] = []

    def train(index: int) -> Trained:
        seen.append(index)
        return trained(index, least)

    found = find_shortest(train, 8)
    assert seen == asked
    assert found[-1] == trained(least, least) and len(found) == len(asked)


@pytest.mark.parametrize("axis", BARS)
def test_each_bar_counts(axis) -> None:
    scores = dict(BARS)
    assert Trained(num_steps=1, seconds=1.0, scores=scores).is_content
    scores[axis] -= 0.001
    assert not Trained(num_steps=1, seconds=1.0, scores=scores).is_content


def test_bars_out_of_reach_are_told() -> None:
    with pytest.raises(UserError, match=r"6,400 steps do not reach .*'all': 0\.86"):
        find_shortest(lambda index: trained(index, 99), 20)


def test_ratios_are_means_of_those_of_each_seed() -> None:
    paper = [[trained(16, 16)], [trained(16, 16), trained(12, 12)]]
    ours = [[trained(8, 8, seconds=0.2)], [trained(4, 4, seconds=0.2)]]
    result = summarize({"paper": paper, "ours": ours})
    assert result["ratios_steps_by_seed"] == [4.0, 4.0] and result["ratio_steps_to_bar"] == 4.0
    assert result["ratios_seconds_by_seed"] == [2.0, 2.0] and result["ratio_seconds_to_bar"] == 2.0
    json.dumps(result)


def test_a_stage_goes_through_the_doors_beside_the_shared_world(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[list[str]] = []
    run = Path("runs/bench-quality/ours/seed-2/steps-400")

    def go(line: list[str], *, check: bool) -> object:
        lines.append(line[3:])
        if line[3] == "judge":
            metrics = run / "training" / "stage2" / "metrics.jsonl"
            metrics.parent.mkdir(parents=True, exist_ok=True)
            metrics.write_text(
                "".join(json.dumps({"step": step, "elapsed_seconds": step / 10}) + "\n" for step in (10, 400))
            )
            update_summary(run, "judge.stage2", dict.fromkeys(BARS, 0.9) | {"num_objects": 3})
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(quality.subprocess, "run", go)
    for _ in range(2):  # links of a first time are taken as they are
        stage = quality.train(CONTESTANTS["ours"], run, 2, 400)
    assert stage == Trained(num_steps=400, seconds=40.0, scores=dict.fromkeys(BARS, 0.9))
    settings = ["--set", "training.stage2.num_steps=400", "--set", "training.seed=2"]
    where = ["--recipe", "recipes/toyworld.toml", "--run", str(run)]
    assert lines[:3] == [
        ["train", *where, "--stage", "stage2", *settings],
        ["sample", *where, "--stage", "stage2", *settings],
        ["judge", *where],
    ]
    for part in ("raw", "features", "training/stage1"):
        (quality.WORLD / part).mkdir(parents=True)
        assert (run / part).resolve() == (quality.WORLD / part).resolve()


def test_a_door_that_fails_ends_it(monkeypatch) -> None:
    monkeypatch.setattr(quality.subprocess, "run", lambda line, *, check: type("Done", (), {"returncode": 1})())
    with pytest.raises(UserError, match=r"atelier features .* has failed; the same benchmark goes on from there"):
        quality.door("features", "r.toml", Path("run"), "stage2")
