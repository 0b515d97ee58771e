"""A third family of features, told by nothing but its record below and a key of the recipe, from images to batches."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydantic
import pytest
import safetensors.torch
import torch
from feature_run import encoded, extract, picture, write_captions, write_raw, write_recipe
from PIL import Image

from encoders.opening import open_codec
from errors import UserError
from features.jobs import FeatureInputs, FeatureJob, read_inputs
from features.latent_worker import CutImage, LatentWorker
from features.latents import LATENTS, image_job, plan_images
from features.plan import plan_families
from features.text import TEXT
from pipelines.command import parse_command
from pipelines.engine.pieces import cut_into_pieces, finish_shard
from pipelines.raw.images import resize_and_crop
from pipelines.recipe import Decides, TableConfig
from pipelines.store.feature_store import load_index
from pipelines.store.manifest import MANIFEST_NAME, ShardDirectory, read_manifest
from pipelines.store.verify.run import verify_run
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


def pixels_of(key: str) -> Image.Image:
    number = int(key)
    return picture(number, width=40 + 16 * (number % 3), height=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 12 images in three aspect buckets, one of them broken, and features of all three families."""
    folder = tmp_path_factory.mktemp("families")
    run = folder / "run"
    for shard, name in enumerate(SHARDS):
        keys = [f"{shard:03d}{i:05d}" for i in range(12)]
        images = {key: b"no image" if key == BROKEN else encoded(pixels_of(key)) for key in keys}
        samples = [{"key": key, "png": image, "txt": "t", "json": "{}"} for key, image in images.items()]
        write_raw(run / "raw" / f"{name}.tar", samples)
    write_captions(run, sorted((run / "raw").glob("*.tar")), rejects={})
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("features.families.FAMILIES", (TEXT, LATENTS, EDGES))
        extract(run, WITH_EDGES, stage=3)
    return run


def inputs_of(run: Path, *overrides: str) -> FeatureInputs:
    return read_inputs(parse_command("features", "", argv=argv_of(run, *overrides), has_stages=True))


def argv_of(run: Path, *overrides: str) -> list[str]:
    flags = [part for override in overrides for part in ("--set", override)]
    return ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", "3", *flags]


def features_of(run: Path, *overrides: str) -> StageFeatures:
    stage = ('training.stage3.network="pixart"', "training.global_batch_size=4", "training.num_steps=9")
    command = parse_command("training", "", argv=argv_of(run, *stage, *overrides), has_stages=True)
    return open_features(command, stage_training(command.recipe, command.stage_name))


def batches_of(run: Path, *, rank: int = 0, num_ranks: int = 1) -> Iterator[Batch]:
    """Batches of 4 samples; their tensors are valid until the next."""
    datasets = features_of(run, WITH_EDGES).datasets
    index = FeatureIndex(datasets)
    survey = make_survey(index, survey_shards(index, range(len(index))))
    plan = Plan(survey.counts, batch_size=4, seed=1, shards_per_block=2)
    assembler = BatchAssembler(
        datasets[0], buckets=survey.buckets, seed=1, stream=3, caption_dropout=0.1, checks_payloads=True
    )
    with BatchReader(plan, index, assembler, steps=range(9), rank=rank, num_ranks=num_ranks) as reader:
        for packed in reader:
            yield packed.to(torch.device("cpu"))


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
    for batch in batches_of(run):
        assert batch.tensors.keys() == {"edges.mean", "edges.std"}
        assert batch.text is not None
        for name in ("mean", "std"):
            expected = torch.stack([stored[key][name] for key in batch.keys])
            assert torch.equal(batch.tensors[f"edges.{name}"], expected)
        seen |= set(batch.keys)
        whole.append((batch.keys, batch.tensors["edges.mean"].clone(), batch.noise.clone()))
    assert len(seen) > 15
    for rank in range(2):
        for (keys, mean, noise), batch in zip(whole, batches_of(run, rank=rank, num_ranks=2), strict=True):
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
        batch = next(batches_of(run))
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
