"""A third family of features, told by nothing but its record below and a key of the recipe, from images to batches."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydantic
import pytest
import safetensors.torch
import torch
from family_run import SHARDS, batches_of, features_of, inputs_of, pixels_of, write_family_run
from feature_run import extract

from encoders.opening import open_codec
from errors import UserError
from features.cropping import CutImage
from features.jobs import FeatureInputs, FeatureJob
from features.latent_worker import LatentWorker
from features.latents import LATENTS, image_job, plan_images
from features.plan import plan_families
from features.text import TEXT
from pipelines.engine.pieces import cut_into_pieces, finish_shard
from pipelines.raw.images import resize_and_crop
from pipelines.recipe import Decides, TableConfig
from pipelines.store.feature_store import load_index
from pipelines.store.manifest import MANIFEST_NAME, ShardDirectory, read_manifest
from pipelines.store.verify.run import verify_run


class EdgeSettings(TableConfig):
    """Keys of `families.edges`."""

    strength: Decides[float] = pydantic.Field(default=4.0, gt=0.0, description="What the gradient is multiplied by")


def edges_of(image: np.ndarray, strength: float) -> np.ndarray:
    """The size of an image's gradient, grey, uint8 [H, W, 3]."""
    down, right = np.gradient(image.astype(np.float32).mean(axis=2))
    edges = np.clip(strength * np.hypot(down, right), 0, 255).astype(np.uint8)
    return np.repeat(edges[..., None], 3, axis=2)


class EdgeWorker(LatentWorker):
    """Encodes the edges of images instead of the images."""

    def depict(self, image: CutImage) -> np.ndarray:
        assert isinstance(self.config.settings, EdgeSettings)
        return edges_of(image.pixels, self.config.settings.strength)


def edge_job(inputs: FeatureInputs) -> FeatureJob:
    return image_job(inputs, EDGES, worker_class=EdgeWorker)


EDGES = replace(
    LATENTS,
    name="edges",
    is_wanted=lambda features: "edges" in features.families,
    job=edge_job,
    plan=lambda inputs: plan_images(edge_job(inputs), inputs),
    settings=EdgeSettings,
)
WITH_EDGES = "features.stage3.families={edges = {strength = 3.0}}"


@pytest.fixture(autouse=True)
def known_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.families.FAMILIES", (TEXT, LATENTS, EDGES))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 12 images in three aspect buckets, one of them broken, and features of all three families."""
    run = write_family_run(tmp_path_factory.mktemp("families"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("features.families.FAMILIES", (TEXT, LATENTS, EDGES))
        extract(run, WITH_EDGES, stage=3)
    return run


def test_it_is_made_of_the_crops_that_the_latents_are_made_of_and_rejects_are_counted(run: Path) -> None:
    manifest = read_manifest(run / "features" / "edges-48")
    assert (manifest.num_read, manifest.num_kept, sum(manifest.rejected.values())) == (24, 23, 1)
    assert manifest.rejected == read_manifest(run / "features" / "latent-48").rejected
    assert manifest.extra["settings"] == {"strength": 3.0}
    edges, latents = (load_index(run / "features" / name, SHARDS) for name in ("edges-48", "latent-48"))
    geometry = ["key", "bucket", "resized_width", "resized_height", "crop_x", "crop_y", "reject"]
    assert edges.select(geometry).equals(latents.select(geometry))
    codec = open_codec(str(run.parent / "vae"))
    stored = stored_edges(run)
    for row in edges.to_pylist():
        if row["reject"] is None:
            height, width = map(int, row["bucket"].split("x"))
            image, _ = resize_and_crop(pixels_of(row["key"]), width, height, max_pixels=10**6)
            seen = torch.from_numpy(edges_of(np.array(image), 3.0)).permute(2, 0, 1)[None]
            mean, _ = codec.encode(seen)
            torch.testing.assert_close(stored[row["key"]]["mean"].float(), mean[0], atol=2e-3, rtol=2e-3)


def stored_edges(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What plain tar and safetensors readers find of the family."""
    tensors = {}
    for name in SHARDS:
        with tarfile.open(run / "features" / "edges-48" / f"{name}.tar") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                tensors[member.name.removesuffix(".safetensors")] = safetensors.torch.load(file.read())
    return tensors


def test_batches_hold_what_is_stored_for_any_number_of_ranks(run: Path) -> None:
    stored, seen = stored_edges(run), set()
    whole = []
    for batch in batches_of(run, WITH_EDGES):
        assert batch.tensors.keys() == {"edges.mean", "edges.std"}
        assert batch.text is not None
        for name in ("mean", "std"):
            expected = torch.stack([stored[key][name] for key in batch.keys])
            assert torch.equal(batch.tensors[f"edges.{name}"], expected)
        seen |= set(batch.keys)
        whole.append((batch.keys, batch.tensors["edges.mean"].clone(), batch.noise.clone()))
    assert len(seen) > 15
    for rank in range(2):
        for (keys, mean, noise), batch in zip(whole, batches_of(run, WITH_EDGES, rank=rank, num_ranks=2), strict=True):
            part = slice(2 * rank, 2 * rank + 2)
            assert batch.keys == keys[part]
            assert torch.equal(batch.tensors["edges.mean"], mean[part])
            assert torch.equal(batch.noise, noise[part])


def test_bytes_do_not_depend_on_how_many_workers_share_a_shard(run: Path, tmp_path: Path) -> None:
    job = edge_job(inputs_of(run, WITH_EDGES))
    output = ShardDirectory(tmp_path / "edges")
    worker = job.worker_class(replace(job.worker_config, preview_path=tmp_path / "preview.png"))
    pieces = cut_into_pieces(job.sources, output, num_workers=8, samples_per_slice=8)
    assert len(pieces) == 2 * len(job.sources)
    for piece in pieces:
        piece.folder.mkdir(parents=True, exist_ok=True)
    for source in job.sources:
        parts = [(piece, worker(piece)) for piece in pieces if piece.source == source]
        finish_shard(job.worker_class, parts, output, fingerprint=job.fingerprint)
        for suffix in (".tar", ".parquet"):
            assert output.file(source.name, suffix).read_bytes() == job.output.file(source.name, suffix).read_bytes()


def test_a_family_of_no_resolution_is_read_from_a_folder_of_its_name(run: Path) -> None:
    of_images, plain = run / "features" / "edges-48", run / "features" / "edges"
    written = (of_images / MANIFEST_NAME).read_text()
    manifest = json.loads(written)
    del manifest["extra"]["resolution"], manifest["extra"]["buckets"]
    of_images.rename(plain)
    (plain / MANIFEST_NAME).write_text(json.dumps(manifest))
    try:
        batch = next(batches_of(run, WITH_EDGES))
        stored = load_index(plain, SHARDS)
        assert set(batch.keys) <= set(stored.column("key").to_pylist())
        assert batch.tensors["edges.mean"].shape == batch.mean.shape
    finally:
        (plain / MANIFEST_NAME).write_text(written)
        plain.rename(of_images)


def test_verify_joins_it_and_finds_a_flipped_byte_by_its_key(run: Path) -> None:
    findings = verify_run(run)
    assert findings.problems == []
    notes = "\n".join(findings.notes)
    assert "latent-48 and edges-48: 2 shards in both; 23 keys in both, 0 with latents but no edges" in notes
    tar = run / "features" / "edges-48" / f"{SHARDS[0]}.tar"
    row = load_index(tar.parent, SHARDS[:1]).to_pylist()[5]
    sound = tar.read_bytes()
    data = bytearray(sound)
    data[row["std_offset"]] ^= 1
    tar.write_bytes(data)
    (problem,) = verify_run(run).problems
    tar.write_bytes(sound)
    assert f"edges-48, shard {SHARDS[0]}, key {row['key']}: " in str(problem)
    assert "bytes of mean or std have changed (CRC-32)" in str(problem)


def test_it_is_planned_like_the_latents_and_nothing_is_left_to_do(run: Path) -> None:
    plans = {plan.family: plan for plan in plan_families(inputs_of(run, WITH_EDGES))}
    assert list(plans) == ["text", "latents", "edges"]
    assert plans["edges"].bytes_per_sample == plans["latents"].bytes_per_sample
    assert [plan.pending_samples for plan in plans.values()] == [0, 0, 0]
    assert "edges" not in [plan.family for plan in plan_families(inputs_of(run))]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{lines = {}}", r"features\.stage3\.families\.lines: there is no such family; there are text, latents, edges"),
        ("{latents = {}}", r"features\.stage3\.families = .*latents is asked for by text and resolution, not here"),
        ("{edges = {strength = -1.0}}", r"features\.stage3\.families\.edges\.strength = -1\.0: .*greater than 0"),
        ("{edges = {width = 1}}", r"features\.stage3\.families\.edges\.width = 1: Extra inputs"),
    ],
)
def test_a_wrong_family_or_setting_is_named_by_its_key(run: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_families(inputs_of(run, f"features.stage3.families={override}"))


def test_training_refuses_a_family_made_with_other_settings(run: Path) -> None:
    with pytest.raises(UserError, match=r"edges-48: families\.edges\.strength is 3\.0, but 4\.0 is needed"):
        features_of(run, "features.stage3.families={edges = {}}")
    with pytest.raises(FileNotFoundError, match=r"lines-48 does not exist"):
        features_of(run, "features.stage3.families={lines = {}}")
