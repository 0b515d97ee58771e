"""Raw shards of every kind give the same samples, and each kind's own faults are counted or named."""

import json
import logging
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_kinds import KINDS, Sample, write_folder, write_rows, write_table
from raw_shards import encode, photo, write_tar
from webdataset.tariterators import group_by_keys, tar_file_expander

from errors import MissingFileError, StorageError, UserError
from pipelines.raw import pack
from pipelines.raw.patterns import expand_shards
from pipelines.raw.reading import Reading
from pipelines.raw.shard_names import shard_name
from pipelines.raw.shards import describe_shards, open_shard

NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    texts = ('ein Hund, "quer"', "富士山と桜", "plain text", "two words")
    return [
        Sample(
            f"{'in/deep/' if number % 3 else ''}{number:04d}", encode(photo(number), "PNG"), texts[number % 4], number
        )
        for number in sorted(range(NUM_SAMPLES), key=lambda number: f"{'in/deep/' if number % 3 else ''}{number:04d}")
    ]


def read(path: str, *, run=None, reading: Reading | None = None) -> list[tuple]:
    with open_shard(path, reading or Reading(), run=run) as raw:
        return [
            (
                sample.key,
                raw.image_bytes(sample),
                raw.alt_text(sample),
                raw.named_text(sample, "text"),
                raw.label(sample),
            )
            for sample in raw.samples
            if sample.reject is None
        ]


def key_in(kind: str, sample: Sample) -> str:
    # Hugging Face's `save_to_disk` keeps the names of files without their folders.
    return sample.key.rpartition("/")[2] if kind == "save_to_disk" else sample.key


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_come_out_of_every_kind(tmp_path, samples, kind) -> None:
    (path,) = expand_shards(str(KINDS[kind](tmp_path, samples)))
    run = tmp_path / "run"
    (described,) = describe_shards([path], run=run)
    assert described.source.num_samples == described.num_texts == NUM_SAMPLES
    has_column = kind not in ("tar", "folder")  # of files `txt` is the name
    expected = [(key_in(kind, s), s.image, s.text, s.text if has_column else None, s.label)
                for s in samples]  # fmt: skip
    assert read(path, run=run) == expected
    # Threads that read ahead of each other, and backwards, get the same.
    order = random.Random(0).sample(range(NUM_SAMPLES), NUM_SAMPLES)
    with open_shard(path, run=run, identity=described.source.identity) as raw, ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda number: raw.image_bytes(raw.samples[number]), order))
        assert raw.has_labels
        assert images == [expected[number][1] for number in order]
        assert raw.image_bytes(raw.samples[0]).startswith(raw.image_start(raw.samples[0], 16)[:16])
    assert describe_shards([path]) == describe_shards([path], run=run) == [described]
    # A copy elsewhere is the same shard.
    place = tmp_path / "elsewhere" / tmp_path.name
    shutil.copytree(tmp_path, place, ignore=shutil.ignore_patterns("elsewhere", "run"))
    copy = describe_shards([path.replace(str(tmp_path), str(place))])[0].source
    assert copy.identity == described.source.identity


def packed_rows(folder) -> list[tuple]:
    return [row for path in expand_shards(str(folder)) for row in read(path)]


def test_packed_tars_have_the_same_samples(tmp_path, samples, monkeypatch, caplog) -> None:
    source = KINDS["metadata.jsonl"](tmp_path, samples)
    (source / "in" / "gone.jpg").write_text("no row")
    to = tmp_path / "shards"
    run_pack(monkeypatch, str(source), str(to), "--n", "25")
    assert sorted(path.name for path in to.iterdir() if not path.name.startswith(".")) == [
        f"{number:05d}{ending}" for number in range(3) for ending in (".parquet", ".tar", "_stats.json")
    ]
    assert [row[:3] + row[4:] for row in packed_rows(to)] == [(s.key, s.image, s.text, s.label) for s in samples]
    rows = pq.read_table(to / "00002.parquet").to_pylist()
    assert [row["status"] for row in rows[-2:]] == ["success", "not_in_metadata"] and rows[0]["width"] == 40
    # As webdataset reads them; its keys are ours.
    with (to / "00000.tar").open("rb") as stream:
        found = list(group_by_keys(tar_file_expander(iter([{"stream": stream, "url": "00000.tar"}]))))
    assert [(row["__key__"], row["png"], row["txt"].decode()) for row in found] == [row[:3] for row in samples[:25]]
    record = json.loads(found[3]["json"])
    assert record["original_key"] == samples[3].key and record["texts"] == {"text": samples[3].text}
    # Once more, nothing is written; what is missing is.
    before = {path: path.stat().st_mtime_ns for path in to.glob("0*")}
    (to / "00001_stats.json").unlink()
    run_pack(monkeypatch, str(source), str(to), "--n", "25")
    after = {path: path.stat().st_mtime_ns for path in to.glob("0*")}
    assert {path.name for path in after if after[path] != before[path]} == {
        "00001.tar", "00001.parquet", "00001_stats.json"}  # fmt: skip
    with pytest.raises(UserError, match="was packed from other samples_per_tar"):
        run_pack(monkeypatch, str(source), str(to), "--n", "26")
    with pytest.raises(UserError, match="has files that are not of this command"):
        run_pack(monkeypatch, str(source), str(source))


def run_pack(monkeypatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["pack", *words])
    pack.main()


def test_keys_that_tars_cannot_have_are_numbered(tmp_path, samples, monkeypatch) -> None:
    twice = [sample._replace(key=f"v1.5 {place}") for place, sample in enumerate(samples[:3])]
    write_rows(tmp_path / "a.parquet", twice, is_struct=False)
    run_pack(monkeypatch, str(tmp_path / "a.parquet"), str(tmp_path / "to"))
    assert [(row[0], row[1]) for row in packed_rows(tmp_path / "to")] == [
        (f"00000{place:04d}", sample.image) for place, sample in enumerate(twice)
    ]


def rejects(path: str, reading: Reading | None = None) -> dict[str, str | None]:
    with open_shard(path, reading or Reading()) as raw:
        return {sample.key: sample.reject for sample in raw.samples}


def test_what_is_odd_in_a_folder_is_counted_and_links_go_in_no_circle(tmp_path, samples, caplog, monkeypatch) -> None:
    folder = write_folder(tmp_path / "photos", [sample._replace(key=f"{n}") for n, sample in enumerate(samples[:4])])
    (folder / "0.jpg").write_bytes(b"x")  # beside 0.png
    for name in ("film.mp4", "README.md", "notes.csv", "._1.png", "5.txt"):
        (folder / name).write_bytes(b"x")
    (folder / ".git").mkdir()
    outside = write_folder(tmp_path / "outside", [samples[0]._replace(key="far")])
    (folder / "link").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    (folder / "6.png").symlink_to(outside / "far.png")
    (folder / "7.png").symlink_to(tmp_path / "nowhere.png")
    monkeypatch.setattr(logging.getLogger("atelier"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert describe_shards([str(folder)])[0].source.num_samples == 7
    assert "photos: 5 files are no samples: .git/, ._1.png, README.md, ..." in caplog.text
    assert (
        "photos: 2 files are links that lead nowhere or in a circle, pipes or the like: 7.png, link/back/"
        in caplog.text
    )
    assert rejects(str(folder)) == {
        "0": "several_images",
        "1": None,
        "2": None,
        "3": None,
        "5": "no_image",
        "6": None,
        "link/far": None,
    }


def test_metadata_that_tell_of_other_images_are_counted(tmp_path, samples) -> None:
    folder = write_folder(tmp_path / "photos", [sample._replace(key=f"{n}") for n, sample in enumerate(samples[:4])],
                          has_texts=False)  # fmt: skip
    (folder / "metadata.csv").write_text(
        "file_name,caption\n0.png,zero\n1.png,one\n1.png,again\ngone.png,g\n3.PNG,three\n"
    )
    assert rejects(str(folder)) == {
        "0": None,
        "1": "duplicate_row",
        "2": "not_in_metadata",
        "3": None,
        "gone": "missing_image_file",
    }
    # The table itself takes each row for a sample.
    (folder / "3.PNG").write_bytes(samples[3].image)
    found = rejects(str(folder / "metadata.csv"))
    assert list(found.values()) == [None, None, None, "missing_image_file", None]
    assert next(iter(found)) == "photos-metadata_00000000"


def test_a_table_with_an_unclosed_quotation_mark_is_no_shard_and_no_metadata(tmp_path, samples) -> None:
    folder = write_folder(tmp_path / "photos", samples[:3], has_texts=False)
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    lines = [f"{name},{chr(34) if number == 1 else ''}a dog\n" for number, name in enumerate(names)]
    (folder / "metadata.csv").write_text("file_name,caption\n" + "".join(lines))
    for path in (folder, folder / "metadata.csv"):
        with pytest.raises(UserError, match=r"metadata\.csv: line 3: the quotation mark .* is never closed; put the"):
            describe_shards([str(path)])


def test_a_changed_file_is_noticed_when_it_is_read_and_by_the_next_command(tmp_path, samples) -> None:
    folder, run = write_folder(tmp_path / "photos", samples[:5]), tmp_path / "run"
    (first,) = describe_shards([str(folder)], run=run)
    with open_shard(str(folder), run=run, identity=first.source.identity) as raw:
        (folder / samples[1].file_name).write_bytes(samples[1].image + b"!")
        (folder / samples[2].file_name).unlink()
        with pytest.raises(StorageError, match=rf"{samples[1].file_name} has changed since"):
            raw.image_bytes(raw.samples[1])
        with pytest.raises(StorageError, match=rf"{samples[2].file_name} is gone since"):
            raw.image_bytes(raw.samples[2])
    (second,) = describe_shards([str(folder)], run=run)
    assert second.source.identity != first.source.identity
    # A text that is edited in place, in front.
    text = (folder / samples[0].file_name).with_suffix(".txt")
    text.write_text("x" * 2000)
    (third,) = describe_shards([str(folder)], run=run)
    text.write_text("y" + "x" * 1999)
    assert describe_shards([str(folder)], run=run)[0].source.identity != third.source.identity


FILLER = "".join(f"gone{number}.png,{'y' * 80}\n" for number in range(15_000))  # 1.3 MB


def write_metadata(folder: Path, name: str, text: str) -> None:
    if name.endswith(".parquet"):
        column = [text, *("y" * 80 for _ in range(300))]
        table = pa.table({"file_name": [f"{number}.png" for number in range(301)], "text": column})
        pq.write_table(table, folder / name, compression="none", use_dictionary=False, write_statistics=False)
    elif name == "0.json":
        (folder / name).write_text(json.dumps({"caption": text, "more": FILLER}))
    else:
        rows = f"file_name,caption\n0.png,{text}\n{FILLER}"
        (folder / name).write_text(rows.replace(",", "\t") if name.endswith(".tsv") else rows)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv", "metadata.parquet", "0.json"])
def test_a_text_is_part_of_a_folders_identity_wherever_it_stands(tmp_path, name) -> None:
    folder = write_folder(tmp_path / "photos", [Sample("0", encode(photo(0), "PNG"), "", 0)], has_texts=False)
    found = []
    for text in ("a dog", "a cat"):
        write_metadata(folder, name, text)
        found.append(describe_shards([str(folder)])[0].source.identity)
    assert found[0] != found[1]
    # As in tars, masks are known by size and end: of SA-1B they are larger than the images.
    masks = []
    for mask in "01":
        (folder / "sa_1.json").write_text(json.dumps({"mask": mask, "more": "y" * 600}))
        masks.append(describe_shards([str(folder)])[0].source.identity)
    assert masks[0] == masks[1]


@pytest.mark.parametrize("kind", ["parquet", "binary.parquet", "arrow", "dictionary.arrow"])
def test_a_text_is_part_of_the_identity_of_rows_wherever_it_stands(tmp_path, kind) -> None:
    image, found = encode(photo(0), "PNG"), []
    for text in ("a dog", "a cat"):
        # Over 4 MB of texts in one row group; what is changed is far from its end.
        texts: Any = [f"{'z' * 90} {number}" for number in range(50_000)]
        texts[100] = text
        if kind == "binary.parquet":
            texts = [each.encode() for each in texts]
        table = pa.table({"image": pa.array([image] * len(texts)).dictionary_encode(), "text": pa.array(texts)})
        if kind == "dictionary.arrow":
            table = table.set_column(1, "text", table["text"].dictionary_encode())
        path = tmp_path / f"a.{kind}"
        if kind.endswith("arrow"):
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
        else:
            pq.write_table(table, path, compression="none", use_dictionary=cast(Any, ["image"]), write_statistics=False)
        found.append(describe_shards([str(path)])[0].source.identity)
    assert found[0] != found[1]


def test_a_table_whose_images_change_is_another_shard(tmp_path, samples) -> None:
    path, run = str(KINDS["table.csv"](tmp_path, samples)), tmp_path / "run"
    (first,) = describe_shards([path], run=run)
    image = tmp_path / "images" / samples[0].file_name
    image.write_bytes(samples[1].image)
    (second,) = describe_shards([path], run=run)
    image.unlink()
    (third,) = describe_shards([path], run=run)
    assert len({each.source.identity for each in (first, second, third)}) == 3
    assert rejects(path)[samples[0].key] == "missing_image_file"


def test_columns_are_found_or_asked_for(tmp_path, samples) -> None:
    images = [sample.image for sample in samples[:3]]
    path = str(tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"left": images, "right": images[::-1], "captions": [["a", "b"]] * 3, "id": [1, 1, 2]}), path
    )
    with pytest.raises(
        UserError, match=r"a\.parquet: which of the columns left, right has the images\? .*data.image_col"
    ):
        describe_shards([path])
    reading = Reading(image_column="right")
    with open_shard(path, reading, run=tmp_path) as raw:
        assert [sample.key for sample in raw.samples] == [f"a_0000000{row}" for row in range(3)]
        assert [raw.image_bytes(sample) for sample in raw.samples] == images[::-1]
        first = raw.samples[0]
        assert (raw.alt_text(first), raw.named_text(first, "captions[1]"), raw.named_text(first, "captions[2]")) == (
            "a", "b", None)  # fmt: skip
    pq.write_table(pa.table({"url": ["https://host/a.jpg"]}), path)
    with pytest.raises(UserError, match=r"has addresses \(url\) and no images: download them first"):
        describe_shards([path])
    pq.write_table(pa.table({"key": ["a", "a", None], "image": [*images[:2], None]}), path)
    assert rejects(path) == {"a": "duplicate_key", "a_00000002": "no_key"}


def test_folders_of_classes_are_numbered_as_torchvision_does(tmp_path, samples) -> None:
    for name in ("zebra", "Ant", "bee"):
        write_folder(tmp_path / "photos" / name, [samples[0]._replace(key=name[0])], has_texts=False)
    with open_shard(str(tmp_path / "photos"), Reading(dialect="imagenet")) as raw:
        assert raw.has_labels
        assert {sample.key: raw.label(sample) for sample in raw.samples} == {"Ant/A": 0, "bee/b": 1, "zebra/z": 2}


def test_what_a_folder_holds_decides_what_is_read(tmp_path, samples, caplog, monkeypatch) -> None:
    base = tmp_path / "birds"
    for split in ("train", "test"):
        write_rows(base / "en" / split / "0000.parquet", samples[:3], is_struct=True)
    found = expand_shards(str(base))
    assert [shard_name(path) for path in found] == ["en-test-0000", "en-train-0000"]
    monkeypatch.chdir(base / "en")
    assert [shard_name(path) for path in expand_shards("train,test/0000.parquet")] == [
        "en-test-0000", "en-train-0000"]  # fmt: skip
    with pytest.raises(UserError, match=r"is an image, and no shard: name the folder, which is one, SHARDS=.*photos/"):
        expand_shards(f"{write_folder(tmp_path / 'photos', samples[:3])}/*.png")
    write_tar(tmp_path / "photos" / "a.tar", [("a.jpg", b"x")])
    monkeypatch.setattr(logging.getLogger("atelier"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert [shard_name(path) for path in expand_shards(str(tmp_path / "photos"))] == ["a"]
    assert "has 1 tars, which are read, and beside them 3 images (0000.png, ...), which are not" in caplog.text
    (tmp_path / "tars" / "x").mkdir(parents=True)
    write_tar(tmp_path / "tars" / "x" / "a.tar", [("a.jpg", b"x")])
    with pytest.raises(UserError, match=r"has no tar of its own, .* type '.*/tars/\*/\*\.tar'"):
        expand_shards(str(tmp_path / "tars"))
    write_table(tmp_path / "tables" / "list.csv", samples[:3])
    with pytest.raises(MissingFileError, match=r"of tables it has .*list\.csv: name one"):
        expand_shards(str(tmp_path / "tables"))


def test_a_remote_folder_of_parquet_is_that_on_disk(tmp_path, samples) -> None:
    local = write_rows(tmp_path / "birds" / "data" / "train-00000-of-00001.parquet", samples, is_struct=True)
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/birds/data/train-00000-of-00001.parquet")
    (memory_path,) = expand_shards("memory://birds/")
    assert shard_name(memory_path) == shard_name(str(local)) == "birds-train-00000-of-00001"
    assert describe_shards([memory_path])[0].source.identity == describe_shards([str(local)])[0].source.identity
    assert read(memory_path) == read(str(local))
    memory.put(str(write_table(tmp_path / "list.csv", samples)), "/birds/list.csv")
    with pytest.raises(UserError, match=r"list\.csv names images by their paths: download"):
        describe_shards(["memory://birds/list.csv"])
    memory.rm("/birds", recursive=True)
    with pytest.raises(MissingFileError, match="a folder of images is read from disk alone"):
        expand_shards("memory://birds/")
