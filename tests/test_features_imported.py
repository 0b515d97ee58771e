"""Features that PixArt's own code has extracted become families like any other, bytes and losses included."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_run import encoded, extract, picture, write_raw, write_run
from tiny_encoders import save_deep_codec
from training_run import metrics, train

from errors import MissingFileError, UserError
from features.imported_files import feature_names
from features.imported_latents import official_crop, read_latent
from features.imported_text import read_embedding
from pipelines.raw.images import SampleReject
from pipelines.store.families import schema_of
from pipelines.store.feature_store import load_index
from pipelines.store.manifest import read_manifest
from tests.raw_shards import write_tar
from tests.sound_run import require_sound

TRAINING = """
[model]
num_layers = 2
num_heads = 2
head_dim = 8

[training]
num_processes = 1
threads_per_process = 1
dtype = "fp32"
zero_stage = 0
global_batch_size = 4
num_steps = 2
log_every = 1
checkpoint_every = 2
[training.stage2]
network = "pixart"
"""
TEXT_FOLDER, LATENT_FOLDER = "caption_feature_wmask", "img_vae_features_32resolution/noflip"
IMPORTS = f"""
text_from = "{{run}}/../{TEXT_FOLDER}"
latents_from = "{{run}}/../{LATENT_FOLDER}"
"""
SHARD = "laion_00000"


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=True, **arrays)
    return file.getvalue()


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def write_official(run: Path, folder: Path) -> None:
    """Write a run's features as PixArt's code does: padded texts with masks, mean and std in one array."""
    for name in (TEXT_FOLDER, LATENT_FOLDER):
        (folder / name).mkdir(parents=True)
    for directory in (run / "features" / "text", run / "features" / "latent-32"):
        family = schema_of(read_manifest(directory))
        assert family is not None
        tar = np.fromfile(directory / f"{SHARD}.tar", np.uint8)
        for row in load_index(directory, [SHARD]).to_pylist():
            if row["reject"] is not None:
                continue
            arrays = family.read(tar, [row])
            if family.name == "latents":
                both = np.concatenate([arrays["mean"], arrays["std"]]).astype(np.float32)
                (folder / LATENT_FOLDER / f"{row['key']}.npy").write_bytes(npy(both))
                continue
            real = torch.from_numpy(arrays["embedding_0"].copy()).view(torch.bfloat16).float().numpy()
            padded = np.full((1, 40, real.shape[1]), 7.0, np.float32)
            padded[0, : len(real)] = real
            mask = (np.arange(40) < len(real)).astype(np.int64)[None]
            data = npz(caption_feature=padded, attention_mask=mask)
            (folder / TEXT_FOLDER / f"{row['key']}.npz").write_bytes(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with features of its own, and beside it the same in PixArt's files."""
    run = write_run(tmp_path_factory.mktemp("made"), num_shards=1, samples_per_shard=12)
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe.read_text() + TRAINING)
    extract(run)
    write_official(run, run.parent)
    return run


@pytest.fixture(scope="module")
def imported(made: Path) -> Path:
    """A run of the same raw shards without captions, whose features are imported; models are read by name alone."""
    run = made.parent / "other"
    shutil.copytree(made / "raw", run / "raw")
    recipe = (made.parent / "recipe.toml").read_text()
    (made.parent / "imports.toml").write_text(recipe.replace("[features.stage1]", IMPORTS + "[features.stage1]"))
    import_features(run)
    return run


def import_features(run: Path, *overrides: str, stage: int = 2, plan: bool = False) -> None:
    shutil.copy(run.parent / "imports.toml", run.parent / "recipe.toml")
    extract(run, *overrides, stage=stage, plan=plan)


def test_imported_features_are_those_that_were_exported(made: Path, imported: Path) -> None:
    """The same encoder outputs give the same tars, to the byte, and the same index but for why a sample is missing."""
    for name in ("text", "latent-32"):
        own, other = made / "features" / name, imported / "features" / name
        assert (own / f"{SHARD}.tar").read_bytes() == (other / f"{SHARD}.tar").read_bytes()
        rows, others = (load_index(directory, [SHARD]).to_pylist() for directory in (own, other))
        # torchvision rounds the long side of a resized image down.
        differs: dict[str, Any] = dict.fromkeys(("reject", "resized_width", "crop_x"))
        assert [row | differs for row in rows] == [row | differs for row in others]
        assert read_manifest(own).extra | {"imported": True} == read_manifest(other).extra
    assert (made / "features/text/null.safetensors").read_bytes() == (
        imported / "features/text/null.safetensors"
    ).read_bytes()
    text = read_manifest(imported / "features" / "text")
    assert (text.num_kept, text.rejected, text.upstream) == (11, {"missing_feature": 1}, {})
    require_sound(imported)


def test_training_takes_them_for_its_own(made: Path, imported: Path) -> None:
    for run in (made, imported):
        train(run, 2)
    losses = [[line["loss"] for line in metrics(run, 2)] for run in (made, imported)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_finished_import_has_nothing_to_do_until_a_file_changes(imported: Path, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    for name in (TEXT_FOLDER, LATENT_FOLDER.partition("/")[0], "t5", "vae", "imports.toml"):
        source = imported.parent / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    marker = run / "features" / "text" / ".done" / f"{SHARD}.json"
    before = marker.stat().st_mtime_ns
    import_features(run)
    assert marker.stat().st_mtime_ns == before
    key = "00000004"
    (tmp_path / TEXT_FOLDER / f"{key}.npz").write_bytes(npz(caption_feature=np.ones((1, 3, 32), np.float32)))
    latents = run / "features" / "latent-32" / ".done" / f"{SHARD}.json"
    kept = latents.stat().st_mtime_ns
    import_features(run)
    (row,) = [row for row in load_index(run / "features" / "text", [SHARD]).to_pylist() if row["key"] == key]
    assert row["num_tokens"] == 3 and latents.stat().st_mtime_ns == kept
    import_features(run, plan=True)
    plan = " ".join(capsys.readouterr().err.split())
    assert f"text: imported from {{run}}/../{TEXT_FOLDER}, of {imported.parent}/t5" in plan


def test_faulty_files_are_rejects_and_tars_and_buckets_are_read(tmp_path, imported: Path) -> None:
    run = tmp_path / "run"
    sizes = {"bucket": (64, 40), "squashed": (32, 32), "other": (40, 40), "nan": (40, 40), "thin": (8, 80)}
    sizes["log_variance"] = (40, 40)
    write_raw(
        run / "raw" / f"{SHARD}.tar",
        [
            *({"key": key, "png": encoded(picture(1, width=w, height=h))} for key, (w, h) in sizes.items()),
            {"key": "unreadable", "png": b"no image"},
            {"key": "bytes", "png": encoded(picture(2))},
            {"key": "missing", "png": encoded(picture(3))},
        ],
    )
    latent = np.ones((8, 6, 6), np.float32)
    files = {
        "bucket": npy(np.ones((8, 4, 8), np.float16)),  # 32 x 64 pixels
        "squashed": npy(latent),
        "other": npy(np.ones((8, 6, 9), np.float32)),
        "nan": npy(np.where(np.arange(6) == 3, np.nan, latent)),
        "thin": npy(np.ones((4, 6, 6), np.float32)),
        "log_variance": npy(np.where(np.arange(8)[:, None, None] == 6, -12, latent)),
        "unreadable": npy(latent),
        "bytes": b"PK",
    }
    write_tar(tmp_path / "ms" / f"{SHARD}.tar", [(f"{key}.npy", data) for key, data in files.items()])
    write_tar(tmp_path / "ms" / "others.tar", [("missing.npy", npy(latent))])
    for name in ("t5", "vae"):
        shutil.copytree(imported.parent / name, tmp_path / name)
    shutil.copy(imported.parent / "imports.toml", tmp_path)
    settings = ("features.latents_from={run}/../ms/*.tar", "features.text=false", "features.max_reject_fraction=1.0")
    import_features(run, *settings, stage=3)
    rows = {row["key"]: row for row in load_index(run / "features" / "latent-48", [SHARD]).to_pylist()}
    assert {key: row["reject"] for key, row in rows.items()} == {
        **dict.fromkeys(("bucket", "squashed", "unreadable")),
        **dict.fromkeys(("other", "thin"), "wrong_shape"),
        "nan": "non_finite_latent",
        **dict.fromkeys(("bytes", "log_variance"), "corrupt_feature"),
        "missing": "missing_feature",
    }
    geometry = ("bucket", "original_width", "original_height", "resized_width", "resized_height", "crop_x", "crop_y")
    assert [rows["bucket"][name] for name in geometry] == ["32x64", 64, 40, 64, 32, 0, 0]
    assert [rows["unreadable"][name] for name in geometry] == ["48x48", *[None] * 6], "what is not known is left out"


def test_a_file_of_two_samples_and_places_that_are_none_are_refused(imported: Path, tmp_path) -> None:
    run = tmp_path / "run"
    members = [{"key": key, "png": encoded(picture(1))} for key in ("a/1", "b/1")]
    write_raw(run / "raw" / f"{SHARD}.tar", members)
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz" / "1.npz").write_bytes(npz(caption_feature=np.ones((1, 3, 32), np.float32)))
    shutil.copy(imported.parent / "imports.toml", tmp_path)
    with pytest.raises(UserError, match=rf"text_from: .*1\.npz would be of {SHARD}/a/1 and of {SHARD}/b/1"):
        import_features(run, "features.text_from={run}/../npz")
    latents = ("features.text=false", "features.latents_from={run}/../npz")
    with pytest.raises(
        UserError, match=rf"latents_from: none of the 2 samples has a file \.npy there, such as {SHARD}/a/1"
    ):
        import_features(run, *latents)
    with pytest.raises(MissingFileError, match=r"features\.stage2\.text_from = .*nothing"):
        import_features(run, "features.text_from={run}/nothing")
    with pytest.raises(UserError, match=r"1\.npz is neither a folder on a mounted disk nor a tar"):
        import_features(run, "features.text_from={run}/../npz/1.npz")
    with pytest.raises(UserError, match="text_from has one caption a sample, and captions names caption, alt_text"):
        captions = 'features.captions=[{column = "caption"}, {column = "alt_text"}]'
        import_features(run, "features.text_from={run}/../npz", captions)
    with pytest.raises(UserError, match="has no std"):
        codec = save_deep_codec(tmp_path / "dc")
        settings = (f"features.vae_model={codec}", "features.resolution=64", "features.text=false")
        import_features(run, *settings, "features.latents_from={run}/../npz")


def test_texts_without_a_mask_are_real_tokens_and_gaps_are_left_out() -> None:
    values = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
    assert np.array_equal(read_embedding(npz(caption_feature=values)), values[0])
    mask = np.array([[1, 0, 1, 0]])
    assert np.array_equal(read_embedding(npz(caption_feature=values, attention_mask=mask)), values[0, [0, 2]])
    for data, reason in (
        (npz(other=values), "corrupt_feature"),
        (b"", "corrupt_feature"),
        (npz(caption_feature=values[0, 0]), "wrong_shape"),
        (npz(caption_feature=values, attention_mask=mask[:, :3]), "wrong_shape"),
        (npz(caption_feature=np.array(["x"])), "wrong_shape"),
        (npy(np.array([object()]), allow_pickle=True), "corrupt_feature"),
    ):
        with pytest.raises(SampleReject, match=reason):
            read_embedding(data)
    for data in (npy(np.array([object()]), allow_pickle=True), npz(x=values)):
        with pytest.raises(SampleReject, match="corrupt_feature"):
            read_latent(data, channels=4)


def test_names_and_crops_are_those_of_pixarts_extraction() -> None:
    assert feature_names("sa_7") == ["sa_7"]
    assert feature_names("a/b/7") == ["a/b/7", "a/b_7", "b_7", "7"]
    # Resize(256), CenterCrop(256) of torchvision on 375 x 500 and 500 x 333.
    assert official_crop((375, 500), 256) == ((256, 341), (0, 42))
    assert official_crop((500, 333), 256) == ((384, 256), (64, 0))
