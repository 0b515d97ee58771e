import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from feature_run import encoded, extract, picture, write_captions, write_raw, write_recipe, write_run
from PIL import Image
from sound_run import require_sound

from encoders.kl import KLCodec
from encoders.opening import open_codec, open_text_encoder
from errors import UserError
from features.jobs import read_inputs
from features.latents import latent_job
from features.text import text_job
from pipelines.command import parse_command
from pipelines.engine.pieces import Piece, cut_into_pieces, finish_shard
from pipelines.raw.images import aspect_buckets, resize_and_crop
from pipelines.raw.kinds.file_shard import FileShard
from pipelines.run_memory import remember_found
from pipelines.store.feature_store import load_index, read_payload
from pipelines.store.manifest import ShardDirectory, read_manifest


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("features"))
    extract(run)
    require_sound(run)
    return run


def open_tar(directory: Path, name: str) -> np.ndarray:
    return np.memmap(directory / f"{name}.tar", np.uint8, mode="r")


def test_text_payloads_are_the_embeddings_of_the_captions(finished):
    directory = finished / "features" / "text"
    encoder = open_text_encoder(str(finished.parent / "t5"), max_tokens=40, dtype="float32")
    captions = pq.read_table(finished / "captions" / "laion_00001.parquet").to_pylist()
    tar = open_tar(directory, "laion_00001")
    rows = load_index(directory, ["laion_00001"]).to_pylist()
    assert [row["key"] for row in rows] == [caption["key"] for caption in captions]
    for row, caption in zip(rows, captions, strict=True):
        (expected,) = encoder.encode([caption["caption"]])
        payload = read_payload(tar, row["offset"], dtype="uint16", shape=(row["num_tokens"], 32))
        stored = torch.from_numpy(payload.copy()).view(torch.bfloat16)
        assert row["nbytes"] == payload.nbytes
        torch.testing.assert_close(stored.float(), expected, atol=0.02, rtol=0.01)
        assert (row["weight"], row["caption_index"], row["shard"]) == (1.0, 0, "laion_00001")


def test_latent_payloads_are_the_codec_s(finished):
    directory = finished / "features" / "latent-32"
    codec = open_codec(str(finished.parent / "vae"))
    tar = open_tar(directory, "laion_00000")
    for index, row in enumerate(load_index(directory, ["laion_00000"]).to_pylist()):
        cropped, _ = resize_and_crop(picture(index, width=40 + 8 * (index % 5), height=40), 32, 32, max_pixels=10_000)
        mean, std = codec.encode(torch.from_numpy(np.array(cropped)).permute(2, 0, 1)[None])
        for name, expected in (("mean", mean), ("std", std)):
            stored = read_payload(tar, row[f"{name}_offset"], dtype="float16", shape=(4, 4, 4))
            np.testing.assert_allclose(stored, expected[0].numpy(), atol=2e-3, rtol=2e-3)
        assert (row["bucket"], row["original_width"], row["original_height"]) == ("32x32", 40 + 8 * (index % 5), 40)
        assert row["label"] is None


def test_counts_balance_and_upstream_rejects_are_carried(finished):
    text = read_manifest(finished / "features" / "text")
    assert (text.num_read, text.num_kept, text.rejected) == (40, 39, {"caption:loop": 1})
    (row,) = [row for row in load_index(finished / "features" / "text", ["laion_00000"]).to_pylist() if row["reject"]]
    assert (row["key"], row["reject"], row["offset"]) == ("00000002", "caption:loop", None)
    latents = read_manifest(finished / "features" / "latent-32")
    assert (latents.num_read, latents.num_kept, latents.rejected) == (40, 40, {})
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["counts"]["features"]["stage2"]["text"] == {
        "read": 40,
        "kept": 39,
        "rejected": {"caption:loop": 1},
    }
    assert summary["seconds"]["features"]["stage2"] > 0


def test_manifest_carries_what_later_stages_need(finished):
    text = read_manifest(finished / "features" / "text")
    captions = read_manifest(finished / "captions")
    assert text.upstream == {"captions": captions.fingerprint.digest}
    assert text.extra["text"] | {"model": ""} == {
        "model": "",
        "revision": None,
        "dtype": "float32",
        "storage": "bfloat16",
        "max_tokens": 40,
        "cleaning": "lower",
        "d_text": 32,
    }
    latents = read_manifest(finished / "features" / "latent-32").extra
    assert latents["vae"]["scaling_factor"] == pytest.approx(0.45)
    assert (latents["vae"]["shift_factor"], latents["vae"]["channels"]) == (0.0, 4)
    assert (latents["vae"]["factor"], latents["vae"]["has_std"]) == (8, True)
    assert (latents["resolution"], latents["buckets"]) == (32, ["32x32"])


def test_null_caption_is_the_embedding_of_nothing(finished):
    stored = safetensors.torch.load_file(finished / "features" / "text" / "null.safetensors")["embedding_0"]
    (expected,) = open_text_encoder(str(finished.parent / "t5"), max_tokens=40, dtype="float32").encode([""])
    assert torch.equal(stored, expected.to(torch.bfloat16))


def test_preview_shows_originals_above_reconstructions(finished):
    with Image.open(finished / "features" / "latent-32" / "preview-stage2.png") as preview:
        assert preview.size == (3 * 36 + 4, 2 * 36 + 4)
        original, _ = resize_and_crop(picture(0, width=40, height=40), 32, 32, max_pixels=10_000)
        np.testing.assert_array_equal(np.asarray(preview)[4:36, 4:36], np.asarray(original))
    report = read_manifest(finished / "features" / "latent-32").shards["laion_00000"]
    assert 0 < report.details["preview_psnr_db"] < 60


def test_images_are_read_and_decoded_ahead_of_the_device(finished, monkeypatch, tmp_path):
    arguments = ["--recipe", str(finished.parent / "recipe.toml"), "--run", str(finished), "--stage", "2"]
    job = latent_job(read_inputs(parse_command("features", "", argv=arguments, has_stages=True)))
    worker = job.worker_class(job.worker_config)
    events = []
    read, encode = FileShard.image_bytes, KLCodec.start
    monkeypatch.setattr(FileShard, "image_bytes", lambda self, sample: events.append("read") or read(self, sample))
    monkeypatch.setattr(KLCodec, "start", lambda self, images: events.append("encode") or encode(self, images))
    worker(Piece(source=job.sources[1], start=0, stop=20, folder=tmp_path, samples_per_slice=20))
    # Batches of 3: the first is encoded when two more are on their way, and each step asks for what comes after.
    reads_before = [events[:position].count("read") for position, event in enumerate(events) if event == "encode"]
    assert reads_before == [9, 12, 15, 18, 20, 20, 20]


def test_bytes_do_not_depend_on_cuts(finished, tmp_path):
    """Every slice a piece of its own, joined again, for both families."""
    inputs = read_inputs(
        parse_command(
            "features",
            "",
            argv=["--recipe", str(finished.parent / "recipe.toml"), "--run", str(finished), "--stage", "2"],
            has_stages=True,
        )
    )
    for job in (text_job(inputs), latent_job(inputs)):
        output = ShardDirectory(tmp_path / job.family.name)
        worker = job.worker_class(job.worker_config)
        pieces = cut_into_pieces(job.sources, output, num_workers=100, samples_per_slice=8)
        assert len(pieces) == 6
        by_source = {piece.source.name: [] for piece in pieces}
        for piece in pieces:
            piece.folder.mkdir(parents=True, exist_ok=True)
            by_source[piece.source.name].append((piece, worker(piece)))
        for parts in by_source.values():
            finish_shard(job.worker_class, parts, output, fingerprint=job.fingerprint)
        for path in output.path.glob("laion_*"):
            assert path.read_bytes() == (job.output.path / path.name).read_bytes(), path


def test_ray_workers_write_the_same_bytes(finished, tmp_path):
    run = write_run(tmp_path)
    overrides = ("engine.in_process=false", "engine.num_workers=2", "engine.cpus_per_worker=0.5")
    extract(run, "features.stage2.text=false", *overrides)
    expected, found = (files_of(folder / "features" / "latent-32") for folder in (finished, run))
    assert expected.keys() == found.keys()
    # Only the manifest names the model's folder, which is the other run's.
    assert {name for name in expected if expected[name] != found[name]} <= {"manifest.json"}


def test_a_second_run_does_nothing_and_needs_no_torch(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "features").rglob("*")}
    recipe = finished.parent / "recipe.toml"
    code = (
        "import sys, features.__main__ as room\n"
        f"sys.argv = ['features', '--recipe', {str(recipe)!r}, '--run', {str(finished)!r}, '--stage', '2']\n"
        "room.main()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'diffusers', 'ray')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing to do") == 2
    assert {path: path.stat().st_mtime_ns for path in (finished / "features").rglob("*")} == before


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, num_shards=1, samples_per_shard=10)


def test_another_resolution_goes_to_another_folder_and_leaves_the_text(run):
    extract(run)
    before = files_of(run / "features" / "text") | files_of(run / "features" / "latent-32")
    extract(run, stage=3)
    assert files_of(run / "features" / "text") | files_of(run / "features" / "latent-32") == before
    buckets = load_index(run / "features" / "latent-48", ["laion_00000"]).column("bucket").to_pylist()
    assert set(buckets) <= {f"{height}x{width}" for height, width in aspect_buckets(48, multiple=16)}
    assert len(set(buckets)) > 1
    assert read_manifest(run / "features" / "latent-48").extra["buckets"] != buckets


@pytest.mark.parametrize("override", ["features.max_tokens=5", "features.text_dtype=bfloat16"])
def test_a_changed_setting_recomputes_the_text_only(run, override):
    extract(run)
    before = files_of(run / "features")
    extract(run, override)
    after = files_of(run / "features")
    assert after["text/laion_00000.tar"] != before["text/laion_00000.tar"]
    assert after["latent-32/.done/laion_00000.json"] == before["latent-32/.done/laion_00000.json"]


def test_another_caption_column_goes_beside_and_counts_what_has_no_text(run):
    extract(run)
    before = files_of(run / "features" / "text")
    extract(run, 'features.stage2.captions=[{column="alt_text"}]')
    assert files_of(run / "features" / "text") == before
    manifest = read_manifest(run / "features" / "text-alt_text")
    assert manifest.extra["captions"] == [{"column": "alt_text", "weight": 1.0}]
    assert manifest.rejected == {"caption:loop": 1, "no_alt_text": 2}


def test_new_captions_are_encoded_anew(run):
    extract(run)
    before = files_of(run / "features" / "text")
    write_captions(run, [run / "raw" / "laion_00000.tar"], rejects={}, prompt="another")
    extract(run)
    manifest = read_manifest(run / "features" / "text")
    assert manifest.num_kept == 10
    assert manifest.upstream["captions"] == read_manifest(run / "captions").fingerprint.digest
    assert files_of(run / "features" / "text") != before


def test_captions_of_another_tar_are_refused_by_field(run):
    write_raw(run / "raw" / "laion_00000.tar", [{"key": "1", "png": encoded(picture(1)), "txt": "", "json": "{}"}])
    with pytest.raises(UserError, match=r"laion_00000\.parquet: source is"):
        extract(run)


def test_captions_changed_behind_their_manifest_are_refused_by_field(run):
    path = run / "captions" / "laion_00000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 5), path)
    with pytest.raises(UserError, match=r"laion_00000\.parquet has SHA-256 \w+, but by its manifest \w+: it has"):
        extract(run)


def test_a_shard_without_captions_is_named(run):
    write_raw(run / "raw" / "laion_00007.tar", [{"key": "1", "png": encoded(picture(1)), "txt": "", "json": "{}"}])
    with pytest.raises(UserError, match=r"1 of 2 shards have no captions \(laion_00007\)"):
        extract(run)


def test_shards_named_for_captioning_need_not_be_named_again(finished, tmp_path):
    """`make caption SHARDS=… RUN=r` and then `make features RUN=r`: the recipe's own pattern matches nothing."""
    run = write_run(tmp_path)
    recipe = run.parent / "recipe.toml"
    recipe.write_text(re.sub("^shards = .*raw.*$", 'shards = "{run}/elsewhere/*.tar"', recipe.read_text(), flags=re.M))
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        extract(run)
    remember_found(run, [str(path) for path in (run / "raw").rglob("*.tar")])
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        extract(run, "data.shards={run}/there/*.tar")
    extract(run)
    tars = [files_of(folder / "features" / "text")["laion_00000.tar"] for folder in (run, finished)]
    assert tars[0] == tars[1]


def test_missing_captions_are_named(run):
    (run / "captions" / ".manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"features\.stage2\.captions: .*captions has no manifest"):
        extract(run)


def test_a_lost_null_caption_is_written_again(run):
    extract(run)
    path = run / "features" / "text" / "null.safetensors"
    before = path.read_bytes()
    path.unlink()
    extract(run)
    assert path.read_bytes() == before


def test_a_lost_null_caption_is_written_again_though_parts_of_the_shard_are_left(run, monkeypatch):
    def die(*_, **__):
        raise RuntimeError("killed here")

    # Between the marker and the removal of the parts.
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed here"):
        patch.setattr("pipelines.engine.pieces.drop_parts", die)
        extract(run)
    path = run / "features" / "text" / "null.safetensors"
    before = path.read_bytes()
    path.unlink()
    extract(run)
    assert path.read_bytes() == before


def test_odd_images_are_turned_converted_or_rejected_with_a_reason(run):
    tall = picture(5, width=64, height=32)
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = {
        "turned": {"jpg": encoded(tall, "JPEG", exif=exif, quality=95)},
        "grey": {"png": encoded(tall.convert("L"))},
        "palette": {"gif": encoded(tall.convert("P"), "GIF")},
        "alpha": {"png": encoded(tall.convert("RGBA"))},
        "cmyk": {"jpg": encoded(tall.convert("CMYK"), "JPEG")},
        "deep": {"png": encoded(Image.fromarray(np.full((40, 40), 60000, np.uint16)))},
        "cut": {"jpg": encoded(tall, "JPEG")[:200]},
        "junk": {"jpg": b"<html>not found</html>"},
        "empty": {"jpg": b""},
        "huge": {"png": encoded(Image.new("1", (400, 400)))},
        "blind": {"txt": b"no image", "json": b"{}"},
    }
    write_raw(run / "raw" / "laion_00000.tar", [{"key": key, **members} for key, members in samples.items()])
    write_captions(run, [run / "raw" / "laion_00000.tar"], rejects={})
    extract(run, "data.max_pixels=100000", stage=3)
    rows = {row["key"]: row for row in load_index(run / "features" / "latent-48", ["laion_00000"]).to_pylist()}
    reasons = {key: row["reject"] for key, row in rows.items() if row["reject"]}
    assert reasons == {
        "cut": "corrupt_image",
        "junk": "not_an_image",
        "empty": "empty_image",
        "huge": "too_many_pixels",
        "blind": "no_image",
    }
    assert (rows["turned"]["original_width"], rows["turned"]["original_height"]) == (32, 64)
    height, width = map(int, rows["turned"]["bucket"].split("x"))
    assert height > width
    assert (rows["turned"]["height"], rows["turned"]["width"]) == (height // 8, width // 8)
    for row in rows.values():
        if row["reject"] is None:
            crop_height, crop_width = map(int, row["bucket"].split("x"))
            assert row["crop_x"] == (row["resized_width"] - crop_width) // 2
            assert row["crop_y"] == (row["resized_height"] - crop_height) // 2


def test_stage_1_takes_labels_and_no_text(tmp_path):
    run = tmp_path / "run"
    samples = [{"key": f"n01_{index}", "png": encoded(picture(index)), "cls": str(index % 3)} for index in range(9)]
    del samples[4]["cls"]
    write_raw(run / "raw" / "imagenet_00000.tar", samples)
    write_recipe(tmp_path)
    extract(run, stage=1)
    assert not (run / "features" / "text").exists()
    rows = load_index(run / "features" / "latent-32", ["imagenet_00000"]).to_pylist()
    assert [row["label"] for row in rows] == [0, 1, 2, 0, None, 2, 0, 1, 2]
    assert [row["reject"] for row in rows if row["reject"]] == ["no_label"]


def test_stages_of_one_resolution_share_the_folder(tmp_path):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=4)
    write_raw(run / "raw" / "imagenet_00000.tar", [{"key": "a", "png": encoded(picture(0)), "cls": "7"}])
    extract(run, stage=1)
    extract(run, stage=2)
    manifest = read_manifest(run / "features" / "latent-32")
    assert list(manifest.shards) == ["imagenet_00000", "laion_00000"]
    assert {path.name for path in (run / "features" / "latent-32").glob("preview*")} == {
        "preview-stage1.png",
        "preview-stage2.png",
    }


def test_a_disk_that_is_too_small_is_noticed_before_anything_runs(run, monkeypatch):
    monkeypatch.setattr("features.plan._free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"stage2 need about .* but only 1\.0 kB"):
        extract(run)
    assert not (run / "features").exists()
