"""Features of other encoders beside the usual ones: which of them a stage reads, and its exports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_run import D_TEXT, MAX_TOKENS, arguments, make_run, train

from errors import MissingFileError
from pipelines.command import parse_command
from pipelines.store.families import NULL_CAPTION_FILE, latent_directory, text_directory
from pipelines.store.feature_store import write_tensors
from training.convert import main as convert
from training.stages.stage import TrainingJob, open_stage

VARIANTS = {"text_variant": "b", "image_variant": "b"}


def open_job(run: Path, **features: str) -> TrainingJob:
    sets = [part for name, value in features.items() for part in ("--set", f"features.{name}={json.dumps(value)}")]
    argv = [*arguments(run, 2, starts_from="scratch"), *sets]
    return open_stage(parse_command("training", "", argv=argv, has_stages=True))


def test_a_stage_reads_the_variants_of_its_table(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    usual = open_job(run)
    with pytest.raises(MissingFileError, match="latent-32@b does not exist"):
        open_job(run, **VARIANTS)
    latents, text = latent_directory(run, 32, variant="b"), text_directory(run, variant="b")
    latent_directory(run, 32).rename(latents)
    text_directory(run).rename(text)
    job = open_job(run, **VARIANTS)
    assert [directory.location for directory in job.features.datasets[0].directories] == [str(latents), str(text)]
    # where features lie decides nothing: what is in them does
    assert job.fingerprint.digest == usual.fingerprint.digest


@pytest.mark.slow
def test_an_original_file_has_the_null_caption_of_the_text_that_was_read(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    null = np.full((1, D_TEXT), 0x4000, np.uint16)  # 2 in bfloat16
    text_directory(run).rename(text_directory(run, variant="b"))
    write_tensors(text_directory(run, variant="b") / NULL_CAPTION_FILE, {"embedding_0": null})
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[features]\n", '[features]\ntext_variant = "b"\n'))
    train(run, 2, starts_from="scratch", num_steps=1)
    convert([str(run / "training" / "stage2"), str(tmp_path / "pixart.pth")])
    weights = torch.load(tmp_path / "pixart.pth", weights_only=True)["state_dict"]
    assert torch.equal(weights["y_embedder.y_embedding"], torch.full((MAX_TOKENS, D_TEXT), 2.0))
