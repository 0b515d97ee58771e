"""Crops of images alone, for a codec that is trained on them: made, verified, and read as any family that leads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from family_run import SHARDS, batches_of, features_of, inputs_of, pixels_of, write_family_run
from feature_run import extract

from errors import UserError
from features.pixels import pixel_job
from pipelines.raw.images import resize_and_crop
from pipelines.store.feature_store import load_index
from pipelines.store.manifest import read_manifest
from pipelines.store.verify.run import verify_run

# The multiple of latents of a codec of factor 8 in patches of 2.
PIXELS = ("features.stage3.families={pixels = {multiple = 16}}", "features.stage3.text=false")
OBJECTIVE = 'training.stage3.objective="reconstruct"'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 12 images in three aspect buckets, one of them broken: as latents, and as pixels."""
    run = write_family_run(tmp_path_factory.mktemp("pixels"))
    extract(run, stage=3)
    extract(run, *PIXELS, "features.stage3.vae_model=", "features.stage3.text_model=", stage=3)
    return run


def test_it_has_the_crops_that_latents_are_made_of_and_needs_no_model(run: Path) -> None:
    manifest = read_manifest(run / "features" / "pixels-48")
    assert (manifest.num_read, manifest.num_kept, manifest.rejected) == (24, 23, {"not_an_image": 1})
    pixels, latents = (load_index(run / "features" / name, SHARDS) for name in ("pixels-48", "latent-48"))
    geometry = ["key", "bucket", "resized_width", "resized_height", "crop_x", "crop_y", "reject"]
    assert pixels.select(geometry).equals(latents.select(geometry))
    assert not {"label", "mean_offset"} & set(pixels.column_names)
    job = pixel_job(inputs_of(run, *PIXELS))
    assert job.is_done() and job.model is None
    assert not any(problem.directory.name == "pixels-48" for problem in verify_run(run).problems)


def test_batches_hold_the_bytes_of_the_crops_and_no_noise_for_any_number_of_ranks(run: Path) -> None:
    whole = []
    for batch in batches_of(run, *PIXELS, OBJECTIVE, network="vae"):
        height, width = map(int, batch.bucket.split("x"))
        for key, stored in zip(batch.keys, batch.tensors["pixels.pixels"], strict=True):
            image, _ = resize_and_crop(pixels_of(key), width, height, max_pixels=10**6)
            assert torch.equal(stored, torch.from_numpy(np.array(image)).permute(2, 0, 1))
        assert batch.mean.numel() == batch.noise.numel() == 0
        assert batch.labels is batch.text is None
        whole.append((batch.keys, batch.tensors["pixels.pixels"].clone()))
    for rank in range(2):
        parts = batches_of(run, *PIXELS, OBJECTIVE, rank=rank, num_ranks=2, network="vae")
        for (keys, pixels), batch in zip(whole, parts, strict=True):
            part = slice(2 * rank, 2 * rank + 2)
            assert batch.keys == keys[part]
            assert torch.equal(batch.tensors["pixels.pixels"], pixels[part])


def test_a_network_reads_what_it_is_for(run: Path) -> None:
    with pytest.raises(UserError, match=r"network = 'vae' reads families\.pixels, but \[features\.stage3\] has latent"):
        features_of(run, OBJECTIVE, network="vae")
    with pytest.raises(UserError, match=r"network = 'pixart' reads latents, but .* has families\.pixels alone"):
        features_of(run, *PIXELS)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (PIXELS[:1], "families.pixels are read alone, and text = True: leave one out"),
        ((*PIXELS, "features.stage3.resolution=56"), r"resolution 56 is not a multiple of .*pixels\.multiple 16"),
        ((PIXELS[0].replace("16", "0"), PIXELS[1]), r"families\.pixels\.multiple = 0"),
    ],
)
def test_what_cannot_be_cropped_is_said(run: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pixel_job(inputs_of(run, *overrides))
