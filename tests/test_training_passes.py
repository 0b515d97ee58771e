"""Training on captions in several passes: from texts to draws, by CLIP score with a temperature or by length."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from columns_run import write_columns
from feature_run import extract
from test_features_passes import SHARDS, captioned
from test_training_choices import read_keys
from test_training_features import open_job
from training_run import RECIPE, metrics, train

from training.data.assembly import BatchAssembler
from training.data.index import FeatureIndex
from training.data.reader import BatchReader
from training.data.stage_data import stage_plan, survey_stage
from training.stages.stage import TrainingJob

assert captioned is not None  # the fixture of a captioned run
BY_SCORE = ('{column="caption",weight="exp(clip_score / 0.1)"}', '{column="short",weight="exp(clip_score / 0.1)"}')
BY_LENGTH = ('{column="caption",weight="1 if length(caption) < 40 else 0.25"}', '{column="short",weight="1"}')


@pytest.fixture
def run(tmp_path: Path, captioned: Path) -> Path:
    """Twelve samples in each of two shards with captions, first sentences, and CLIP scores of both, of some unknown."""
    run = shutil.copytree(captioned.parent, tmp_path / "folder") / "run"
    recipe = run.parent / "recipe.toml"
    training = RECIPE[RECIPE.index("[model]") :]
    recipe.write_text(f"{recipe.read_text()}\n{training}")
    for at, score in (("", lambda i: 0.1), ("@short", lambda i: None if i == 6 else 0.1 + 0.02 * i)):
        write_columns(
            run / "columns" / f"clip_score{at}",
            {
                shard: {"key": [f"{place}{i:05d}" for i in range(12)], "clip_score": [score(i) for i in range(12)]}
                for place, shard in enumerate(SHARDS)
            },
        )
    return run


def mixed(columns: tuple[str, ...]) -> str:
    return f"features.stage2.captions=[{','.join(columns)}]"


def share_of_captions(job: TrainingJob, sample: str) -> list[float]:
    """How often each caption of a sample is drawn, over a thousand even draws."""
    table = FeatureIndex(job.features.datasets).table(0)
    rows, place = table.families["text"], int(np.flatnonzero(table.keys == sample)[0])
    chosen = rows.choose(np.full(1000, place), np.linspace(0, 1, 1000, endpoint=False))
    return [float(np.mean(chosen == row)) for row in range(rows.starts[place], rows.starts[place + 1])]


def lengths_drawn(job: TrainingJob, steps: range) -> list[list[int]]:
    """Tokens of each sample's caption, by step: which of its captions was drawn."""
    survey, datasets = survey_stage(job), job.features.datasets
    assembler = BatchAssembler(datasets[0], buckets=survey.buckets, seed=0, stream=2, caption_dropout=0.1)
    reader = BatchReader(stage_plan(job, survey), FeatureIndex(datasets), assembler, steps=steps, rank=0, num_ranks=1)
    with reader:
        return [[] if packed.text is None else packed.text.lengths.tolist() for packed in reader]


def test_captions_are_drawn_by_clip_score_with_a_temperature(run: Path) -> None:
    extract(run, mixed(BY_SCORE))
    job = open_job(run, mixed(BY_SCORE))
    for i in (1, 3, 5, 9, 11):
        short = math.exp((0.1 + 0.02 * i) / 0.1)
        expected = short / (short + math.exp(1))
        assert share_of_captions(job, f"0{i:05d}") == pytest.approx([1 - expected, expected], abs=0.002)
    # Of which nothing is known is not drawn.
    assert share_of_captions(job, "000006") == [1.0, 0.0]


def test_captions_are_drawn_by_length(run: Path) -> None:
    extract(run, mixed(BY_LENGTH))
    job = open_job(run, mixed(BY_LENGTH))
    texts = [row["caption"] for row in pq.read_table(run / "captions" / f"{SHARDS[0]}.parquet").to_pylist()]
    for i in (1, 3, 4, 7):
        dense = 1 if len(texts[i]) < 40 else 0.25
        assert share_of_captions(job, f"0{i:05d}") == pytest.approx([dense / (1 + dense), 1 / (1 + dense)], abs=0.002)


def test_draws_of_captions_go_on_as_they_would_have(run: Path) -> None:
    extract(run, mixed(BY_SCORE))
    settings = (mixed(BY_SCORE), "training.global_batch_size=6")
    whole = lengths_drawn(open_job(run, *settings), range(20))
    assert lengths_drawn(open_job(run, *settings), range(9, 20)) == whole[9:]
    assert read_keys(open_job(run, *settings), range(9, 20), num_ranks=2) == read_keys(
        open_job(run, *settings), range(9, 20), num_ranks=1
    )
    assert len({length for lengths in whole for length in lengths}) > 3, "captions of several lengths"


def test_weights_of_another_temperature_encode_nothing_and_train_on(run: Path) -> None:
    extract(run, mixed(BY_SCORE))
    tars = {path: path.stat().st_mtime_ns for path in run.glob("features/*/*.tar")}
    cold = tuple(column.replace("0.1)", "0.02)") for column in BY_SCORE)
    extract(run, mixed(cold))
    assert {path: path.stat().st_mtime_ns for path in run.glob("features/*/*.tar")} == tars
    assert share_of_captions(open_job(run, mixed(cold)), "000009")[1] > 0.99
    recipe = run.parent / "recipe.toml"
    recipe.write_text(
        recipe.read_text().replace("[features.stage2]", f"[features.stage2]\ncaptions = [{','.join(cold)}]")
    )
    train(run, 2, starts_from="scratch", num_processes=1, num_steps=4, checkpoint_every=2)
    whole = metrics(run, 2)
    shutil.rmtree(run / "training" / "stage2" / "step-4")
    (run / "training" / "stage2" / "latest").write_text("step-2")
    train(run, 2, starts_from="scratch", num_processes=1, num_steps=4, checkpoint_every=2)
    assert metrics(run, 2)[-1]["loss"] == whole[-1]["loss"], "step 4 once more, of the same captions"
