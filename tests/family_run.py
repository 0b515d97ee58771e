"""A small run whose images fall into three aspect buckets, and batches of its families as training reads them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from feature_run import encoded, picture, write_captions, write_raw, write_recipe
from PIL import Image

from features.jobs import FeatureInputs, read_inputs
from pipelines.command import parse_command
from training.config import stage_training
from training.data.assembly import BatchAssembler
from training.data.batch import Batch
from training.data.features import StageFeatures, open_features
from training.data.index import FeatureIndex
from training.data.plan import Plan
from training.data.reader import BatchReader
from training.data.survey import make_survey, survey_shards

SHARDS = ("laion_00000", "laion_00001")
BROKEN = "00100003"


def pixels_of(key: str) -> Image.Image:
    number = int(key)
    return picture(number, width=40 + 16 * (number % 3), height=40)


def write_family_run(folder: Path) -> Path:
    """Write two shards of 12 images, one of them broken, with captions and a recipe; returns the run's folder."""
    run = folder / "run"
    for shard, name in enumerate(SHARDS):
        keys = [f"{shard:03d}{i:05d}" for i in range(12)]
        images = {key: b"no image" if key == BROKEN else encoded(pixels_of(key)) for key in keys}
        samples = [{"key": key, "png": image, "txt": "t", "json": "{}"} for key, image in images.items()]
        write_raw(run / "raw" / f"{name}.tar", samples)
    write_captions(run, sorted((run / "raw").glob("*.tar")), rejects={})
    write_recipe(folder)
    return run


def inputs_of(run: Path, *overrides: str) -> FeatureInputs:
    return read_inputs(parse_command("features", "", argv=argv_of(run, *overrides), has_stages=True))


def argv_of(run: Path, *overrides: str) -> list[str]:
    flags = [part for override in overrides for part in ("--set", override)]
    return ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", "3", *flags]


def features_of(run: Path, *overrides: str, network: str = "pixart") -> StageFeatures:
    stage = (f'training.stage3.network="{network}"', "training.global_batch_size=4", "training.num_steps=9")
    command = parse_command("training", "", argv=argv_of(run, *stage, *overrides), has_stages=True)
    return open_features(command, stage_training(command.recipe, command.stage_name))


def batches_of(
    run: Path, *overrides: str, rank: int = 0, num_ranks: int = 1, network: str = "pixart"
) -> Iterator[Batch]:
    """Batches of 4 samples; their tensors are valid until the next."""
    datasets = features_of(run, *overrides, network=network).datasets
    index = FeatureIndex(datasets)
    survey = make_survey(index, survey_shards(index, range(len(index))))
    plan = Plan(survey.counts, batch_size=4, seed=1, shards_per_block=2)
    assembler = BatchAssembler(
        datasets[0], buckets=survey.buckets, seed=1, stream=3, caption_dropout=0.1, checks_payloads=True
    )
    with BatchReader(plan, index, assembler, steps=range(9), rank=rank, num_ranks=num_ranks) as reader:
        for packed in reader:
            yield packed.to(torch.device("cpu"))
