import csv
import io
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
from feature_run import encoded, extract, picture, write_captions, write_raw, write_recipe, write_run
from PIL import Image, ImageFile
from rich.console import Console

from features import buckets
from features.jobs import read_inputs
from pipelines.command import parse_command
from pipelines.raw.kinds.tar_shards import TarMembers
from pipelines.raw.sizes import HEADER_BYTES
from pipelines.store.feature_store import load_index


def inputs_of(run, *overrides, stage=3):
    arguments = ["--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", str(stage)]
    arguments += [part for override in overrides for part in ("--set", override)]
    return read_inputs(parse_command("features", "", argv=arguments, has_stages=True))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Shards of images whose header alone is awkward, and some that are rejected."""
    folder = tmp_path_factory.mktemp("odd")
    run = folder / "run"
    tall = picture(5, width=96, height=32)
    first = {
        "jpeg": {"jpg": encoded(tall, "JPEG", exif=turned(6))},
        "png": {"png": encoded(tall, exif=turned(8))},
        "webp": {"webp": encoded(tall, "WEBP", exif=turned(5))},
        "tiff": {"tif": encoded(tall, "TIFF", exif=turned(7))},
        "mirror": {"jpg": encoded(tall, "JPEG", exif=turned(2))},
        "gif": {"gif": encoded(tall.convert("P"), "GIF")},
        "large": {"png": encoded(noise(300, 180))},
        "profile": {"jpg": encoded(tall, "JPEG", icc_profile=bytes(200_000))},
        "wide": {"png": encoded(picture(1, width=400, height=40))},
        "line": {"png": encoded(Image.new("1", (40_000, 2)))},
    }
    second = {
        "junk": {"jpg": b"<html>not found</html>"},
        "longjunk": {"jpg": b"<html>" * 20_000},
        "empty": {"jpg": b""},
        "huge": {"png": encoded(Image.new("1", (400, 400)))},
        "blind": {"txt": b"no image", "json": b"{}"},
        "tiny": {"png": encoded(Image.new("RGB", (1, 50)))},
        "fine": {"png": encoded(picture(2, width=24, height=24))},
    }
    paths = [run / "raw" / f"laion_0000{shard}.tar" for shard in range(2)]
    for path, samples in zip(paths, (first, second), strict=True):
        write_raw(path, [{"key": key, **members} for key, members in samples.items()])
    write_captions(run, paths, rejects={})
    write_recipe(folder)
    return run


OVERRIDES = ("data.max_pixels=100000", "features.max_reject_fraction=0.9")


def test_the_report_is_what_extraction_then_does(odd):
    report = buckets.report_buckets(inputs_of(odd, *OVERRIDES))
    extract(odd, *OVERRIDES, stage=3)
    rows = load_index(odd / "features" / "latent-48", ["laion_00000", "laion_00001"]).to_pylist()
    kept = [row for row in rows if row["reject"] is None]
    assert {f"{height}x{width}": len(crops) for (height, width), crops in report.crops.items()} == Counter(
        row["bucket"] for row in kept
    )
    assert [(reject.shard, reject.key, reject.reason) for reject in report.rejects] == [
        (row["shard"], row["key"], row["reject"]) for row in rows if row["reject"] is not None
    ]
    assert {reject.reason for reject in report.rejects} == {
        "not_an_image", "empty_image", "too_many_pixels", "no_image", "too_small", "too_elongated",
    }  # fmt: skip
    assert report.num_images + len(report.rejects) == 17
    for row in kept:
        height, width = map(int, row["bucket"].split("x"))
        cut = 1 - height * width / (row["resized_width"] * row["resized_height"])
        scale = max(height / row["original_height"], width / row["original_width"])
        assert np.float32(cut) in report.crops[height, width]
        assert np.float32(scale) in report.scales[height, width]


def test_no_pixel_is_decoded_and_large_files_are_not_read(odd, monkeypatch):
    def refuse(self):
        raise AssertionError("pixels were decoded")

    sizes = []
    read = TarMembers.read

    def counted(self, member, num_bytes=None):
        data = read(self, member, num_bytes)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr(TarMembers, "read", counted)
    report = buckets.report_buckets(inputs_of(odd, *OVERRIDES))
    assert report.num_images == 10
    # The noise of 160 kB, the JPEG whose size lies behind 200 kB of colour profile, and the long junk.
    assert sizes.count(HEADER_BYTES) == 3
    assert [size > 200_000 for size in sizes].count(True) == 1
    assert all(size <= HEADER_BYTES or size in (120_000, max(sizes)) for size in sizes)


def test_crop_and_upscale_of_a_centre_crop_are_exact(tmp_path):
    run = tmp_path / "run"
    shapes = [(64, 32), (32, 32), (16, 16)]
    samples = [{"key": str(i), "png": encoded(picture(i, width=w, height=h))} for i, (w, h) in enumerate(shapes)]
    write_raw(run / "raw" / "laion_00000.tar", samples)
    write_recipe(tmp_path)
    report = buckets.report_buckets(inputs_of(run, stage=2))
    assert report.crops.keys() == {(32, 32)}
    assert report.crops[32, 32].tolist() == [0.5, 0.0, 0.0]
    assert report.scales[32, 32].tolist() == [1.0, 1.0, 2.0]


def run_command(run, monkeypatch, *overrides, stage=3):
    output = io.StringIO()
    monkeypatch.setattr(buckets, "console", Console(file=output, width=200))
    arguments = ["buckets", "--recipe", str(run.parent / "recipe.toml"), "--run", str(run), "--stage", str(stage)]
    arguments += [part for override in overrides for part in ("--set", override)]
    monkeypatch.setattr(sys, "argv", arguments)
    warnings = []
    monkeypatch.setattr(buckets.log, "warning", warnings.append)
    buckets.main()
    return output.getvalue(), warnings


def test_the_command_shows_every_bucket_the_sum_and_each_reject(odd, monkeypatch):
    output, warnings = run_command(odd, monkeypatch, *OVERRIDES)
    assert "10 images + 7 rejects = 17 samples" in output
    assert "rejected: laion_00001 junk not_an_image" in output
    assert output.count("rejected:") == 7
    assert any("are scaled up by more than 25%" in warning for warning in warnings)
    assert "48x48" in output


def test_many_rejects_go_to_a_file_that_a_sound_run_removes(tmp_path, monkeypatch):
    run = write_run(tmp_path, num_shards=1, samples_per_shard=4)
    broken = [{"key": f"{index:03d}", "jpg": b"junk"} for index in range(30)]
    write_raw(run / "raw" / "laion_00009.tar", broken)
    output, _ = run_command(run, monkeypatch)
    path = run / "buckets-stage3-rejects.csv"
    assert str(path) in output
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["shard", "key", "reason"]
    assert rows[1:] == [["laion_00009", f"{index:03d}", "not_an_image"] for index in range(30)]
    (run / "raw" / "laion_00009.tar").unlink()
    run_command(run, monkeypatch)
    assert not path.exists()


def test_images_smaller_than_their_bucket_are_counted_and_refused_where_that_is_asked_for(odd, tmp_path, caplog):
    other = tmp_path / "run"
    shutil.copytree(odd.parent, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(other / "features", ignore_errors=True)
    extract(other, *OVERRIDES, stage=3)
    free = load_index(other / "features" / "latent-48", ["laion_00000", "laion_00001"]).to_pylist()
    scales = {row["key"]: row["resized_width"] / row["original_width"] for row in free if row["reject"] is None}
    num_soft = sum(scale > 1.25 for scale in scales.values())
    assert num_soft and f"{num_soft:,} images were scaled up by more than 25%" in caplog.text
    limited = (*OVERRIDES, "features.stage3.max_upscale=1.25")
    report = buckets.report_buckets(inputs_of(other, *limited))
    shutil.rmtree(other / "features")
    extract(other, *limited, stage=3)
    rows = load_index(other / "features" / "latent-48", ["laion_00000", "laion_00001"]).to_pylist()
    small = {row["key"] for row in rows if row["reject"] == "smaller_than_bucket"}
    assert small == {key for key, scale in scales.items() if scale > 1.25}
    assert small == {reject.key for reject in report.rejects if reject.reason == "smaller_than_bucket"}
