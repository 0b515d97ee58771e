"""The app behind its page: batches, the choice of checkpoints, examples."""

import json
from pathlib import Path

import gradio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from app_run import make_studio, pixels, wish
from sampling_run import PIXART, PROMPTS, make_run, randomised, save_checkpoint

from errors import UserError
from pixart.model import PixArt
from sampling import app
from sampling.app_choices import checkpoint_choices, example_prompts
from sampling.app_fields import wishes_of
from sampling.app_studio import wish_of
from sampling.config import SamplingConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def test_a_batch_loads_the_text_encoder_once_and_says_what_a_stop_left(run, monkeypatch):
    from sampling import text_encoding

    loads: list[list[str]] = []
    encode = text_encoding.encode_prompts
    monkeypatch.setattr(text_encoding, "encode_prompts", lambda p, c, t: loads.append(list(p)) or encode(p, c, t))
    studio = make_studio(run)
    wishes = wishes_of(["one\ntwo", "", "32x32", "dpm-solver++", 3, 4.5, 51, False, None, "map", 1.0, [], []], 2)
    said: list[str] = []

    def show(number: int, num_done: int) -> None:
        said.append(app._progress(wishes, number, num_done))
        if (number, num_done) == (3, 1):
            studio.stop()

    drawn: list[Path] = []
    with pytest.raises(gradio.Error, match=r"3 of 4 images were drawn and are kept"):
        drawn.extend(app._draw(studio, studio.checkpoint, wishes, on_step=show))
    found = [(wish_of(path).prompt, wish_of(path).seed) for path in studio.history()[:3]]
    assert sorted(found) == [("one", 51), ("one", 52), ("two", 51)]
    assert loads == [["", "one", "two"]]
    assert said[0] == "image 1 of 4 · reading the prompt" and "image 4 of 4 · step 1 of 3" in said
    with pytest.raises(gradio.Error, match="65 images are more than 64 at a time"):
        next(app._draw(studio, studio.checkpoint, wishes[:1] * 65, on_step=show))


def test_checkpoints_are_listed_with_what_is_known_of_them_and_drawn_from(tmp_path):
    run = make_run(tmp_path)
    early = randomised(PixArt(PIXART), seed=5)
    save_checkpoint(run, 2, early, step=3)
    (run / "training" / "stage2" / "latest").write_text("step-7")
    labels = dict(checkpoint_choices(run))
    assert list(labels) == [
        "stage 2, step 7 · 32 px, ddpm, finished, latest",
        "stage 2, step 3 · 32 px, ddpm, finished",
        "stage 3, step 7 · 32 px, 3 sizes, ddpm, finished, latest",
    ]
    trainer = run / "training" / "stage2" / "step-3" / "trainer.json"
    content = json.loads(trainer.read_text())
    # Runs of before there was a choice of processes.
    trainer.write_text(json.dumps({key: value for key, value in content.items() if key != "process"}))
    assert dict(checkpoint_choices(run)) == labels
    studio = make_studio(run)
    asked = wish(size="32x32")
    first = studio.draw(asked, on_step=lambda step: None)
    others = []
    for folder in list(labels.values())[:2]:
        studio.choose(folder)
        others.append(studio.draw(asked, on_step=lambda step: None))
        assert studio.is_of_chosen(others[-1]) and studio.history()[0] == others[-1]
    assert others[0].parent == others[1].parent == run / "samples" / "stage2-app" != first.parent
    assert not studio.is_of_chosen(others[0]), "of another step"
    assert not np.array_equal(pixels(others[0]), pixels(others[1]))
    studio.choose(list(labels.values())[2])
    assert studio.draw(asked, on_step=lambda step: None) == first
    trainer.write_text("{")
    assert "stage 2, step-3 · damaged" in dict(checkpoint_choices(run))
    with pytest.raises(UserError, match=r"trainer\.json"):
        make_studio(run).choose(str(trainer.parent))


def test_examples_are_prompts_or_captions_of_the_run(tmp_path):
    run = make_run(tmp_path)
    config = SamplingConfig(prompts="{run}/raw/prompts.jsonl")
    assert example_prompts(config, run) == [prompt["prompt"] for prompt in PROMPTS]
    assert example_prompts(SamplingConfig(), run) == []
    (run / "captions").mkdir()
    rows = [{"caption": f"caption  {n // 2}", "reject": "corrupt_image" if n == 0 else None} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), run / "captions" / "a.parquet")
    found = example_prompts(SamplingConfig(prompts="{run}/gone.txt"), run)
    assert found == [f"caption {n}" for n in (0, 3, 6, 9, 12, 15)]
