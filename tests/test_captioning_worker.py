"""The worker on shards in real layouts: every sample accounted for, odd images captioned, broken ones counted."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioning.canary import CanaryError
from captioning.config import DESCRIBE, CaptioningConfig
from captioning.loading import READ_AHEAD_GROUPS, read_ahead
from captioning.table import SCHEMA
from captioning.worker import CaptionWorker, CaptionWorkerConfig
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.reading import Reading
from pipelines.raw.shards import shard_source
from tests.raw_shards import (
    UNICODE_ALT_TEXTS,
    broken_images,
    encode,
    laion_members,
    odd_images,
    photo,
    sa1b_members,
    write_laion,
    write_sa1b,
    write_tar,
)
from tests.tiny_models import save_llava


def make_worker(model: Path, *, dialect: str = "auto") -> CaptionWorker:
    table = {"model": str(model), "max_new_tokens": 24, "batch_size": 8, "max_alt_text_chars": 600}
    captioning = CaptioningConfig.model_validate(table)
    config = CaptionWorkerConfig(
        captioning=captioning, reading=Reading(dialect=dialect), max_pixels=1_000_000, num_threads=1
    )
    return CaptionWorker(config)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def worker(model) -> CaptionWorker:
    return make_worker(model)


def caption(worker: CaptionWorker, shard: Path, folder: Path, *, start: int = 0, stop: int | None = None):
    """Run the worker over samples [start, stop) of a shard: its report, its rows by key, and its file."""
    source = shard_source(str(shard))
    stop = source.num_samples if stop is None else stop
    piece = Piece(source=source, start=start, stop=stop, folder=folder, samples_per_slice=8)
    report: PieceReport = worker(piece)
    table = pq.read_table(piece.output(".parquet"))
    assert table.schema.equals(SCHEMA)
    rows: dict[str, dict[str, Any]] = {row["key"]: row for row in table.to_pylist()}
    assert report.num_read == table.num_rows == stop - start
    assert report.rejected == Counter(row["reject"] for row in rows.values() if row["reject"])
    return report, rows, piece.output(".parquet")


def test_laion_and_sa1b_shards_as_published(worker, tmp_path) -> None:
    """Alt texts of any script arrive untouched and in the prompt; SA-1B has none, and its order does not matter."""
    report, rows, _ = caption(worker, write_laion(tmp_path / "laion_00000.tar", 20), tmp_path / "laion")
    assert (report.num_kept, report.rejected) == (20, {})
    for number, row in enumerate(rows.values()):
        assert row["key"] == f"{number:09d}" and row["shard"] == "laion_00000"
        assert row["alt_text"] == UNICODE_ALT_TEXTS[number % 8]
        assert row["prompt"].startswith(DESCRIBE) and " ".join(row["alt_text"].split()) in row["prompt"]
        assert (row["width"], row["height"], row["reject"]) == (40, 30, None)
    assert report.details["num_tokens"] == sum(row["num_tokens"] for row in rows.values()) > 0
    report, rows, _ = caption(worker, write_sa1b(tmp_path / "sa_000000.tar", 20), tmp_path / "sa")
    assert report.num_kept == 20 and sorted(rows) == [f"sa_{number}" for number in range(223_750, 223_770)]
    assert {row["prompt"] for row in rows.values()} == {DESCRIBE}
    assert {row["alt_text"] for row in rows.values()} == {None}
    assert len({row["caption"] for row in rows.values()}) > 10


def test_an_endless_alt_text_does_not_stop_the_job(worker, tmp_path) -> None:
    """600 characters are over the tiny model's context: the image is asked without its alt text, and keeps it."""
    good, alt_text = encode(photo(0)), "pu-erh tea " * 1000
    members = [*laion_members("a", good, "short"), *laion_members("b", good, alt_text)]
    report, rows, _ = caption(worker, write_tar(tmp_path / "laion_00000.tar", members), tmp_path / "parts")
    assert report.num_kept == 2 and rows["a"]["prompt"].endswith('"short"')
    assert rows["b"]["prompt"] == DESCRIBE and rows["b"]["alt_text"] == alt_text.strip()
    assert rows["b"]["caption"]


def test_odd_images_are_captioned(worker, tmp_path) -> None:
    members = []
    for name, (extension, data) in odd_images().items():
        members += laion_members(name, data, "odd", extension=extension)
    report, rows, _ = caption(worker, write_tar(tmp_path / "odd.tar", members), tmp_path / "odd")
    assert report.rejected == {} and report.num_kept == len(odd_images())
    assert (rows["turned"]["width"], rows["turned"]["height"]) == (30, 40)
    assert all((rows[name]["width"], rows[name]["height"]) == (40, 30) for name in rows.keys() - {"turned"})


def test_every_fault_is_a_row_with_its_reason(worker, model, tmp_path) -> None:
    good = encode(photo(0))
    members = [*laion_members("good_1", good, "first"), *laion_members("good_2", good, "last")]
    expected = {}
    for name, (data, reason) in broken_images().items():
        members += laion_members(name, data, f"alt of {name}")
        expected[name] = reason
    members += laion_members("twice", good, "a") + laion_members("twice", good, "b")
    members += laion_members("no_image", good, "x")[1:]
    members += [*laion_members("two_images", good, "x"), ("two_images.png", encode(photo(1), "PNG"))]
    members += [("bad_text.jpg", good), ("bad_text.json", b'{"caption": "cut o')]
    members += [("odd_text.jpg", good), ("odd_text.json", b'{"caption": 2019}')]
    members += [("list_text.jpg", good), ("list_text.json", b"[1, 2]")]
    expected |= {"twice": "duplicate_member", "no_image": "no_image", "two_images": "several_images"}
    expected |= {"bad_text": "corrupt_alt_text", "odd_text": "not_text"}
    shard = write_tar(tmp_path / "laion_00000.tar", members)
    report, rows, _ = caption(make_worker(model, dialect="img2dataset"), shard, tmp_path / "parts")
    assert {key: row["reject"] for key, row in rows.items() if row["reject"]} == expected
    assert report.rejected == Counter(expected.values()) and report.num_kept == 3
    assert rows["list_text"]["prompt"] == DESCRIBE
    for name in broken_images():
        row = rows[name]
        assert row["alt_text"] == f"alt of {name}" and row["caption"] is None and row["flags"] == []
    # The good ones have the captions they have without the bad ones around them.
    alone = write_tar(tmp_path / "alone.tar", members[:6])
    _, undisturbed, _ = caption(worker, alone, tmp_path / "alone")
    assert [rows[key]["caption"] for key in undisturbed] == [row["caption"] for row in undisturbed.values()]


def test_a_tar_cut_in_the_middle_keeps_what_is_whole(worker, tmp_path) -> None:
    shard = write_laion(tmp_path / "laion_00000.tar", 6)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    report, rows, _ = caption(worker, shard, tmp_path / "parts")
    assert 2 <= report.num_kept < 6 and report.num_kept + sum(report.rejected.values()) == len(rows)


def test_links_and_names_that_leave_the_tar_are_no_samples(worker, tmp_path) -> None:
    good = encode(photo(0))
    members = [*sa1b_members(1, good), ("../evil.jpg", good), ("/etc/sa_2.jpg", good)]
    report, rows, _ = caption(worker, write_tar(tmp_path / "sa_000000.tar", members), tmp_path / "parts")
    assert rows.keys() == {"sa_1"} and report.details["unusable_members"] == 2


def test_keys_in_any_script_and_encoding(worker, tmp_path) -> None:
    """Names that are no UTF-8 (an old tar, written on an old machine) get a readable key; dots belong to the suffix."""
    names = ["\u65e5\u672c\u8a9e.jpg", "folder.v1/caf\u00e9.jpg", "cr\udce8me.jpg", "a.b.jpg"]
    shard = write_tar(tmp_path / "old.tar", [(name, encode(photo(number))) for number, name in enumerate(names)])
    report, rows, _ = caption(worker, shard, tmp_path / "parts")
    assert list(rows) == ["\u65e5\u672c\u8a9e", "folder.v1/caf\u00e9", "cr\\xe8me", "a"]
    assert report.rejected == {"dotted_name": 1} and rows["a"]["reject"] == "dotted_name"


def test_parts_joined_are_the_whole(worker, tmp_path) -> None:
    shard = write_laion(tmp_path / "laion_00000.tar", 20)
    _, _, whole = caption(worker, shard, tmp_path / "whole")
    parts = [caption(worker, shard, tmp_path / "parts", start=a, stop=b)[2] for a, b in ((0, 8), (8, 16), (16, 20))]
    worker.join([{".parquet": part} for part in parts], {".parquet": tmp_path / "joined.parquet"})
    assert (tmp_path / "joined.parquet").read_bytes() == whole.read_bytes()


def test_the_canary_stops_a_job_before_its_first_caption(tmp_path) -> None:
    blind = make_worker(save_llava(tmp_path / "model", is_blind=True))
    shard = write_laion(tmp_path / "laion_00000.tar", 4)
    with pytest.raises(CanaryError, match="does not see the image"):
        caption(blind, shard, tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.parquet"))


def test_reading_ahead_keeps_order_is_bounded_and_raises() -> None:
    started = []

    def square(number: int) -> int:
        started.append(number)
        if number == 50:
            raise ZeroDivisionError
        return number * number

    ahead = read_ahead(range(1000), square, num_threads=3)
    assert [next(ahead) for _ in range(20)] == [number * number for number in range(20)]
    assert len(started) <= 20 + READ_AHEAD_GROUPS + 1
    with pytest.raises(ZeroDivisionError):
        list(ahead)
    assert len(started) < 100
