"""Near duplicates: planted copies are found and nothing else, groups are around their representatives."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.__main__ import main
from curation.duplicates.banding import NearHashes, dealt, unpack
from errors import UserError
from pipelines.store.manifest import read_manifest
from tests.raw_shards import write_tar
from toyworld.copies import Planted, as_file, photo_likes, plant, toy_pictures

SHARD_SAMPLES = 40


@pytest.fixture
def duplicates(tmp_path, monkeypatch):
    """Types `make columns` for the score duplicates of the shards of a folder, and returns its rows by `shard/key`."""

    def make(*words: str, run: str = "run", named: str = "*") -> dict[str, dict]:
        shards = f"data.shards={tmp_path}/{run}.raw/{named}.tar"
        scores = 'columns.scores=["duplicates"]'
        typed = ["--run", str(tmp_path / run), "--set", shards, "--set", "engine.in_process=true", "--set", scores]
        monkeypatch.setattr("sys.argv", ["curation", *typed, *words])
        main()
        rows = {}
        for path in sorted((tmp_path / run / "columns/duplicates").glob("*.parquet")):
            rows |= {f"{path.stem}/{row.pop('key')}": row for row in pq.read_table(path).to_pylist()}
        return rows

    return make


def write_planted(folder: Path, planted: Sequence[Planted]) -> dict[str, Planted]:
    """Write shards, and return what is in them by `shard/key`."""
    found = {}
    for first in range(0, len(planted), SHARD_SAMPLES):
        some = {f"{first + place:05d}": each for place, each in enumerate(planted[first : first + SHARD_SAMPLES])}
        shard = f"{first // SHARD_SAMPLES:03d}"
        write_tar(folder / f"{shard}.tar", [(f"{key}.jpg", each.data) for key, each in some.items()])
        found |= {f"{shard}/{key}": each for key, each in some.items()}
    return found


def recall_and_precision(rows: dict[str, dict], planted: dict[str, Planted]) -> tuple[float, float]:
    """Return how many copies are in the group of an image of their original, and how many duplicates are right."""
    of = {name: each.original for name, each in planted.items()}
    copies = Counter(of.values())
    found = [name for name, row in rows.items() if row["duplicate"]]
    right = [name for name in found if of[rows[name]["duplicate_of"]] == of[name]]
    return len(right) / (copies.total() - len(copies)), len(right) / max(1, len(found))


def pictures(kind: str, num: int) -> Iterator[Image.Image]:
    return toy_pictures(num) if kind == "toy" else photo_likes(num)


@pytest.mark.parametrize("kind", ["toy", "photo"])
def test_planted_copies_are_found_and_nothing_else(tmp_path, duplicates, kind: str) -> None:
    copies = plant(pictures(kind, 120), kinds=("reencoded", "resized", "cropped", "mirrored"))
    planted = write_planted(tmp_path / "run.raw", copies)
    rows = duplicates("--set", "columns.duplicates.mirror=true")
    recall, precision = recall_and_precision(rows, planted)
    assert recall >= 0.99 and precision >= 0.99
    if kind == "photo":  # a toy picture may be its own mirror image
        found = {name: row for name, row in rows.items() if row["duplicate"]}
        is_turned = {name: each.kind == "mirrored" for name, each in planted.items()}
        turned = [name for name, row in found.items() if is_turned[name] != is_turned[row["duplicate_of"]]]
        assert turned == [name for name, row in found.items() if row["duplicate_kind"] == "mirrored"]


def test_what_a_mirror_shows_is_no_duplicate_unless_it_is_asked_for(tmp_path, duplicates) -> None:
    planted = write_planted(tmp_path / "run.raw", plant(photo_likes(30), kinds=("reencoded", "mirrored")))
    rows = duplicates("--set", "columns.duplicates.crops=false")
    found = {name: row["duplicate_of"] for name, row in rows.items() if row["duplicate"]}
    assert len(found) == 15
    assert {planted[each].kind for pair in found.items() for each in pair} == {"original", "reencoded"}


def test_the_largest_stands_for_its_group_and_equal_files_are_exact(tmp_path, duplicates) -> None:
    whole, other = photo_likes(2)
    half = whole.resize((whole.width // 2, whole.height // 2))
    files = {
        "00_half": as_file(half, "PNG"),
        "01_whole": as_file(whole, "JPEG"),
        "02_again": as_file(whole, "JPEG"),
        "03_worse": as_file(whole, "JPEG", quality=40),
        "04_other": as_file(other, "PNG"),
    }
    write_tar(tmp_path / "run.raw/a.tar", [(f"{key}.jpg", data) for key, data in files.items()])
    rows = duplicates()
    assert {name: row["duplicate_kind"] for name, row in rows.items()} == {
        "a/00_half": "perceptual",
        "a/01_whole": None,
        "a/02_again": "exact",
        "a/03_worse": "perceptual",
        "a/04_other": None,
    }
    assert {row["duplicate_of"] for row in rows.values() if row["duplicate"]} == {"a/01_whole"}
    assert rows["a/01_whole"]["duplicate_group"] == "a/01_whole" and rows["a/04_other"]["duplicate_group"] is None
    smallest = duplicates("--set", "columns.duplicates.representative=-megapixels")
    assert [name for name, row in smallest.items() if not row["duplicate"]] == ["a/00_half", "a/04_other"]


def test_only_what_has_changed_makes_them_anew_and_another_shard_makes_all(tmp_path, duplicates) -> None:
    whole, other, third = photo_likes(3)
    write_tar(tmp_path / "run.raw/a.tar", [("a.jpg", as_file(whole, "JPEG"))])
    write_tar(tmp_path / "run.raw/b.tar", [("b.jpg", as_file(other, "JPEG"))])
    assert not any(row["duplicate"] for row in duplicates().values())
    path = tmp_path / "run/columns/duplicates/a.parquet"
    written = path.stat().st_mtime_ns
    duplicates()
    assert path.stat().st_mtime_ns == written
    write_tar(tmp_path / "run.raw/c.tar", [("c.jpg", as_file(whole, "PNG")), ("d.jpg", as_file(third, "PNG"))])
    rows = duplicates()
    assert rows["a/a"]["duplicate_of"] == "c/c" and [row["duplicate"] for row in rows.values()].count(True) == 1


def test_what_was_found_among_other_shards_is_no_more_vouched_for(tmp_path, duplicates) -> None:
    whole = next(photo_likes(1))
    for shard, quality in (("a", 95), ("b", 60)):
        write_tar(tmp_path / f"run.raw/{shard}.tar", [(f"{shard}.jpg", as_file(whole, "JPEG", quality=quality))])
    assert duplicates()["b/b"]["duplicate_of"] == "a/a"
    rows = duplicates(named="b")
    assert not rows["b/b"]["duplicate"]
    assert set(read_manifest(tmp_path / "run/columns/duplicates").shards) == {"b"}
    assert duplicates()["b/b"]["duplicate_of"] == "a/a"


def test_what_another_run_has_is_a_duplicate_here_whatever_is_preferred(tmp_path, duplicates) -> None:
    whole, other = photo_likes(2)
    small = whole.resize((96, 96))
    write_tar(tmp_path / "first.raw/a.tar", [("a.jpg", as_file(small, "JPEG"))])
    images = [("a.jpg", as_file(whole, "PNG")), ("b.jpg", as_file(other, "PNG"))]
    write_tar(tmp_path / "run.raw/a.tar", images)
    first = tmp_path / "first"
    setting = ("--set", f'columns.duplicates.runs=["{first}"]')
    with pytest.raises(UserError, match=r"columns\.duplicates\.runs: there is no finished .*first/columns/hashes: "):
        duplicates(*setting)
    duplicates(run="first")
    rows = duplicates(*setting)
    assert rows["a/a"]["duplicate_of"] == f"{first}:a/a" and not rows["a/b"]["duplicate"]
    write_tar(tmp_path / "first.raw/b.tar", [("b.jpg", as_file(other, "JPEG"))])
    duplicates(run="first")
    assert duplicates(*setting)["a/b"]["duplicate_of"] == f"{first}:b/b"
    with pytest.raises(UserError, match=rf"runs: {tmp_path}/run itself counts this run's .*, and only one of two may"):
        duplicates("--set", f'columns.duplicates.runs=["{tmp_path}/run"]', run="first")


def test_a_run_without_a_sound_image_has_no_duplicates(tmp_path, duplicates) -> None:
    write_tar(tmp_path / "run.raw/a.tar", [("a.jpg", b"no image")])
    rows = duplicates("--set", "columns.max_reject_fraction=1")
    assert rows["a/a"]["duplicate"] is None and rows["a/a"]["reject"].startswith("hashes:")


def test_a_representative_that_is_no_number_or_unknown_is_refused_or_last(tmp_path, duplicates, capsys) -> None:
    whole = next(photo_likes(1))
    files = [("a.jpg", as_file(whole, "JPEG")), ("b.jpg", as_file(whole.resize((128, 128)), "JPEG"))]
    write_tar(tmp_path / "run.raw/a.tar", files)
    for text, said in (
        ("megapixel", "no column 'megapixel'.*did you mean"),
        ("format", "is a text"),
        ("1 if duplicate else 0", "duplicate is a column of duplicates itself"),
        ("1 if duplicates.duplicate else 0", "duplicates.duplicate is a column of duplicates itself"),
    ):
        with pytest.raises(UserError, match=rf"columns\.duplicates\.representative: .*{said}"):
            duplicates("--set", f"columns.duplicates.representative={text}")
    assert not (tmp_path / "run/columns/hashes").exists()
    rows = duplicates("--set", "columns.duplicates.representative=log(0.03 - megapixels)")
    assert rows["a/a"]["duplicate_of"] == "a/b"
    assert "unknown of 1 samples" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("radius", [0, 1, 3, 4, 7])
def test_bands_find_what_comparing_all_with_all_finds(radius: int) -> None:
    rng = np.random.default_rng(radius)
    hashes = rng.integers(0, 1 << 64, 600, dtype=np.uint64)
    moved = hashes[:300].copy()
    for bit in range(9):
        moved ^= np.where(rng.random(300) < 0.5, np.uint64(1) << np.uint64(7 * bit), np.uint64(0))
    every = np.unique(np.concatenate([hashes, moved]))
    distances = np.bitwise_count(every[:, None] ^ every[None])
    for max_rows in (1 << 25, 50):
        near = NearHashes(every, radius, num_threads=2, max_rows=max_rows)
        expected = np.argwhere(np.triu(distances <= radius, 1))
        assert (len(expected) > 0) == (radius > 0) and np.array_equal(np.stack(unpack(near.pairs()), axis=1), expected)
        found = np.stack(unpack(near.near(dealt(moved))), axis=1)
        assert np.array_equal(found, np.argwhere(np.bitwise_count(moved[:, None] ^ every[None]) <= radius))


def test_a_group_is_around_its_representative_and_no_chain(tmp_path, duplicates) -> None:
    whole = next(photo_likes(1))
    width = whole.width
    # Each is near the one before, and not the one before that.
    shifts = [round(width * part) for part in (0, 0.07, 0.14)]
    files = [(f"{n}.jpg", as_file(whole.crop((left, 0, width, 192)), "PNG")) for n, left in enumerate(shifts)]
    write_tar(tmp_path / "run.raw/a.tar", files)
    rows = duplicates("--set", "columns.duplicates.radius=10")
    assert [row["duplicate_of"] for row in rows.values()] == [None, "a/0", None]


def test_blank_images_are_one_by_their_colour_alone(tmp_path, duplicates) -> None:
    levels = {"0": (200, 200, 200), "1": (201, 200, 200), "2": (200, 200, 230), "3": (90, 90, 90)}
    files = [(f"{key}.png", as_file(Image.new("RGB", (96, 96), colour), "PNG")) for key, colour in levels.items()]
    files.append(("4.jpg", as_file(Image.new("RGB", (64, 96), levels["3"]), "JPEG", quality=50)))
    write_tar(tmp_path / "run.raw/a.tar", files)
    rows = duplicates("--set", "columns.duplicates.mirror=true", "--set", "columns.duplicates.representative=width")
    assert [row["duplicate_of"] for row in rows.values()] == [None, "a/0", None, None, "a/3"]
