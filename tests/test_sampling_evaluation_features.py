"""Features of image sets: what is read, what is rejected and named, what is kept and computed once."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_run import encoded, picture, write_raw
from PIL import Image
from tiny_clip import WIDTH, save_clip

from errors import UserError
from pipelines.engine.run import EngineConfig
from sampling.evaluation import features as features_module
from sampling.evaluation.config import EvaluationConfig
from sampling.evaluation.features import FeatureWorker, compute_features
from sampling.evaluation.image_sets import open_folder, open_reference, open_samples
from sampling.evaluation.networks import find_networks, load_network

ENGINE = EngineConfig(in_process=True, samples_per_slice=4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def write_images(folder: Path, count: int, *, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number, width=30, height=20 + number).save(folder / f"{number:02d}.png")
    return folder


def compute(images, clip_folder, cache, *, engine=ENGINE, **table):
    config = EvaluationConfig(clip=str(clip_folder), batch_size=3, **table)
    (network,) = find_networks(config)
    return compute_features(images, network, cache=cache, config=config, engine=engine)


def test_features_are_the_networks_in_order(tmp_path, clip_folder):
    folder = write_images(tmp_path / "set", 10)
    features = compute(open_folder(folder, cache=tmp_path / "cache"), clip_folder, tmp_path / "cache")
    network = load_network(features.network, device="cpu")
    embeddings = features.embeddings()
    assert embeddings.shape == (10, WIDTH)
    import torch

    for row, path in zip(embeddings, sorted(folder.glob("*.png")), strict=True):
        with Image.open(path) as image:
            expected = network.features(torch.from_numpy(network.prepare(image.convert("RGB")))[None])[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    gaussian = features.gaussian()
    np.testing.assert_allclose(gaussian.mean, embeddings.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(gaussian.covariance, np.cov(embeddings, rowvar=False), atol=1e-12)
    assert gaussian.num_images == 10 and features.clip_score() is None


def test_a_set_is_known_by_its_content_and_seen_once(tmp_path, clip_folder, monkeypatch):
    first = write_images(tmp_path / "first", 4)
    cache = tmp_path / "cache"
    before = compute(open_folder(first, cache=cache), clip_folder, cache)
    before.gaussian()
    first.rename(tmp_path / "moved")

    def forbidden(*args, **kwargs):
        raise AssertionError("the features are there already")

    with monkeypatch.context() as patch:
        patch.setattr(features_module, "load_network", forbidden)
        patch.setattr(features_module.Features, "_blocks", forbidden)
        again = compute(open_folder(tmp_path / "moved", cache=cache), clip_folder, cache)
        np.testing.assert_array_equal(again.gaussian().mean, before.gaussian().mean)
    picture(99).save(tmp_path / "moved" / "00.png")
    changed = compute(open_folder(tmp_path / "moved", cache=cache), clip_folder, cache)
    assert changed.folder != before.folder


def test_damaged_statistics_are_computed_again(tmp_path, clip_folder, capsys):
    images = open_folder(write_images(tmp_path / "set", 4), cache=tmp_path / "cache")
    features = compute(images, clip_folder, tmp_path / "cache")
    expected = features.gaussian()
    path = features.folder / "statistics.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[:-8]):
        path.write_bytes(data)
        np.testing.assert_array_equal(features.gaussian().covariance, expected.covariance)
        assert path.read_bytes() == whole
        said = " ".join(capsys.readouterr().err.split())
        assert "statistics.safetensors is damaged (" in said and "mean and covariance are computed again" in said


def test_shards_and_a_folder_of_the_same_images_agree(tmp_path, clip_folder):
    folder, cache = write_images(tmp_path / "set", 5), tmp_path / "cache"
    samples = [{"key": f"{number:02d}", "png": (folder / f"{number:02d}.png").read_bytes()} for number in range(5)]
    write_raw(tmp_path / "shards" / "a.tar", samples[:2])
    write_raw(tmp_path / "shards" / "b.tar", samples[2:])
    one = compute(open_reference(str(folder), run=tmp_path, cache=cache), clip_folder, cache)
    spec = "{run}/shards/*.tar"
    two = compute(open_reference(spec, run=tmp_path, cache=cache), clip_folder, cache)
    np.testing.assert_allclose(two.embeddings(), one.embeddings(), atol=1e-5)
    assert open_reference(str(tmp_path / "shards"), run=tmp_path, cache=cache).num_images == 5


def test_a_damaged_sample_is_named_with_what_to_do(tmp_path):
    folder, cache = write_images(tmp_path / "set", 5), tmp_path / "cache"
    rows = [{"file": path.name, "prompt": "a star"} for path in sorted(folder.glob("*.png"))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    path = folder / "03.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        UserError, match=r"03\.png cannot be read as an image: it is cut short .*; delete it, and the com"
    ):
        open_samples(folder, cache=cache)


def test_unusable_images_are_counted_and_named(tmp_path, clip_folder, capsys):
    folder, cache = write_images(tmp_path / "set", 5), tmp_path / "cache"
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 half an image")
    (folder / "notes.txt").write_text("no image by its name")
    features = compute(open_folder(folder, cache=cache), clip_folder, cache, max_reject_fraction=0.5)
    assert (features.num_images, features.rejected) == (5, {"not_an_image": 1})
    assert features.faults == ["broken.jpg: not_an_image"]
    printed = " ".join(capsys.readouterr().err.split())
    assert "1 unusable images, such as broken.jpg: not_an_image" in printed
    assert "files left out: 1 no image by its name" in printed
    assert len(features.embeddings()) == 5
    with pytest.raises(UserError, match=r"1 of 6 .*not_an_image 1.*broken\.jpg"):
        compute(open_folder(folder, cache=cache), clip_folder, cache)


def test_a_feature_that_is_not_finite_is_named_with_its_shard(tmp_path, clip_folder, monkeypatch):
    images = [encoded(picture(number)) for number in range(5)]
    write_raw(tmp_path / "shards" / "a.tar", [{"key": f"{n}", "png": image} for n, image in enumerate(images)])
    see = FeatureWorker._see_batch

    def spoilt(self, pictures):
        return [
            (feature * (np.nan if p.row["key"] == "a/3" else 1), score) for p, (feature, score) in pairs(self, pictures)
        ]

    def pairs(self, pictures):
        return zip(pictures, see(self, pictures), strict=True)

    monkeypatch.setattr(FeatureWorker, "_see_batch", spoilt)
    reference = open_reference(str(tmp_path / "shards"), run=tmp_path, cache=tmp_path / "cache")
    message = f"such as a/3: non_finite_feature (the weights of {clip_folder} are at fault, put them there anew)"
    with pytest.raises(UserError, match=re.escape(message)):
        compute(reference, clip_folder, tmp_path / "cache")
    assert compute(reference, clip_folder, tmp_path / "cache", max_reject_fraction=0.5).num_images == 4


def test_too_few_images_have_no_distance(tmp_path, clip_folder):
    folder = write_images(tmp_path / "set", 1)
    with pytest.raises(UserError, match="1 usable images, a distance needs at least 2"):
        compute(open_folder(folder, cache=tmp_path), clip_folder, tmp_path)


def test_a_missing_reference_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"evaluation\.reference no/such is no folder of images, and no shard"):
        open_reference("no/such", run=tmp_path, cache=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"evaluation\.reference .*empty holds no image"):
        open_reference(str(tmp_path / "empty"), run=tmp_path, cache=tmp_path)
    with pytest.raises(FileNotFoundError, match="have not been drawn"):
        open_samples(tmp_path / "empty", cache=tmp_path)


def test_the_clip_score_is_a_hundred_times_the_mean_cosine(tmp_path, clip_folder):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    folder, cache = write_images(tmp_path / "samples", 5), tmp_path / "cache"
    prompts = ["a red star", "two blue squares", "a star", "nothing", "a very long prompt " * 9]
    rows = [{"file": f"{number:02d}.png", "prompt": prompt} for number, prompt in enumerate(prompts)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    features = compute(open_samples(folder, cache=cache), clip_folder, cache)
    network = load_network(features.network, device="cpu")
    texts = torch.cat([network.text_features([prompt]) for prompt in prompts]).double().numpy()
    cosines = (features.embeddings() * texts).sum(axis=1)
    assert features.clip_score() == pytest.approx(100 * cosines.clip(min=0).mean(), abs=1e-3)
    assert compute(open_samples(folder, cache=cache, has_prompts=False), clip_folder, cache).clip_score() is None


def test_small_sets_stay_in_the_process_and_what_is_no_reject_names_no_image(tmp_path, clip_folder, monkeypatch):
    def refuse(*_):
        raise UserError("Ray is started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipelines.engine.run.choose_num_workers", refuse)
    images = open_folder(write_images(tmp_path / "set", 3), cache=tmp_path)
    with pytest.raises(UserError, match=r"^Ray is started$"):
        compute(images, clip_folder, tmp_path, engine=EngineConfig(), max_images_in_process=2)
    # The paper's recipe reserves a GPU for each of Ray's workers.
    engine = EngineConfig(gpus_per_worker=1.0)
    assert compute(images, clip_folder, tmp_path, engine=engine, max_images_in_process=3).num_images == 3


def test_two_workers_of_ray_give_the_same_bytes(tmp_path, clip_folder):
    folder = write_images(tmp_path / "set", 12)
    alone = compute(open_folder(folder, cache=tmp_path / "one"), clip_folder, tmp_path / "one")
    engine = EngineConfig(num_workers=2, samples_per_slice=4)
    images = open_folder(folder, cache=tmp_path / "two")
    shared = compute(images, clip_folder, tmp_path / "two", engine=engine, max_images_in_process=0)
    assert (shared.folder / "images.parquet").read_bytes() == (alone.folder / "images.parquet").read_bytes()
    manifest = json.loads((shared.folder / "manifest.json").read_text())
    assert manifest["num_read"] == manifest["num_kept"] == 12
