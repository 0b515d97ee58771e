import csv
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_pipelines_shards import write_tar

from pipelines.raw.images import SampleReject
from pipelines.raw.kinds.tar_headers import TarEntry
from pipelines.raw.samples import group_files
from pipelines.raw.shards import describe_shards, open_shard
from pipelines.raw.texts import text_of_record

FIELDS = {
    "fields": ["{}.image.jpg", "{}.caption.txt", "{}.metadata.json"],
    "input_outputs": ["{}.input.jpg", "{}.outputs.txt"],
    "beside": ["{}.jpg", "{}.jpg.txt"],
    "beside_dotted": ["v1.5 {}.png", "v1.5 {}.png.caption"],
    "controlled": ["{}.image.png", "{}.mask.png", "{}.prompt.txt"],
    "phone": ["IMG_{}.HEIC", "IMG_{}.JPG", "IMG_{}.txt"],
    "img2dataset": ["{}.jpg", "{}.txt", "{}.json"],
    "json": ["{}.webp", "{}.json"],
}


@pytest.mark.parametrize("layout", FIELDS)
def test_texts_belong_to_their_image_whatever_they_are_called(tmp_path, layout) -> None:
    members = []
    for key in ("0001", "0002", "0003"):
        for name in FIELDS[layout]:
            data = b'{"caption": "text %s"}' % key.encode() if name.endswith("json") else f"text {key}".encode()
            members.append((name.format(key), data))
    # The first sample lacks a member: that changes nothing for the others.
    del members[len(FIELDS[layout]) - 1]
    with open_shard(write_tar(tmp_path / "x.tar", members)) as raw:
        assert [sample.reject for sample in raw.samples] == [None] * 3
        first = "text 0001" if layout in ("img2dataset", "fields") else None
        assert [raw.alt_text(sample) for sample in raw.samples] == [first, "text 0002", "text 0003"]
    entries = [TarEntry(name, "file", number, 1, 0) for number, (name, _) in enumerate(members)]
    grouped = group_files(entries).samples
    assert [(sample.reject, len(sample.members)) for sample in grouped] == [
        (None, len(sample.members)) for sample in raw.samples
    ]


def test_what_is_no_sample_is_told_apart(tmp_path, caplog, monkeypatch) -> None:
    names = [
        "a.jpg",
        "a.txt",
        "._a.jpg",
        "._a.txt",
        "__MACOSX/._a.jpg",
        "__MACOSX/b.jpg",
        ".DS_Store",
        "README.md",
        "in/README",
    ]
    names += ["LICENSE", "Thumbs.db", "sha256sums.txt", ".git/x.jpg", "c.txt"]
    path = write_tar(tmp_path / "x.tar", [(name, b"x") for name in names])
    monkeypatch.setattr(logging.getLogger("atelier"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert describe_shards([path])[0].source.num_samples == 2
    assert "x.tar: 11 members are no samples: ._a.jpg, ._a.txt, __MACOSX/._a.jpg, ..." in caplog.text
    with open_shard(path) as raw:
        assert {sample.key: sample.reject for sample in raw.samples} == {"a": None, "c": "no_image"}
        assert len(raw.strays) == 11


STRAYS = [
    "_SUCCESS",
    "Icon\r",
    "ehthumbs.db",
    "~$b.docx",
    ".~lock.b.odt#",
    "GlobalHead.0.0",
    "_metadata",
    "in/film.mp4",
]
STRAYS += ["notes.txt", "classes.txt", "in/captions.txt", "d.csv", ".gitkeep", "a/manual.pdf"]


def test_what_systems_and_people_add_is_no_sample_in_tars_and_folders_alike(tmp_path) -> None:
    members = [(name, b"x") for name in ("b.jpg", "b.txt", "info.jpg", "info.txt", "lost.txt", *STRAYS)]
    for name, data in members:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    for path in (write_tar(tmp_path / "x.tar", members), str(tmp_path / "folder")):
        with open_shard(path) as raw:
            found = {sample.key: sample.reject for sample in raw.samples}
            assert (found, sorted(raw.strays)) == ({"b": None, "info": None, "lost": "no_image"}, sorted(STRAYS))


def test_features_of_images_that_are_called_as_notes_are_kept(tmp_path) -> None:
    names = ["index.npz", "7.npz", "manifest.npy", "README.json", "8.json"]
    with open_shard(write_tar(tmp_path / "x.tar", [(name, b"x") for name in names])) as raw:
        assert [sample.key for sample in raw.samples] == ["index", "7", "manifest", "8"]


def test_a_text_in_a_language_is_one_of_its_image(tmp_path) -> None:
    names = ("a.jpg", "a.txt", "a.en.txt", "b.jpg", "b.de-AT.txt", "c.jpg", "c.2.txt")
    members = [(name, f"text of {name}".encode()) for name in names]
    for name, data in members:
        (tmp_path / name).write_bytes(data)
    texts = {}
    with open_shard(str(tmp_path)) as raw:
        assert {sample.key: sample.reject for sample in raw.samples} == dict.fromkeys("abc") | {"c.2": "no_image"}
        for sample in raw.samples:
            texts[sample.key] = [raw.text(sample), raw.named_text(sample, "en"), raw.named_text(sample, "de-at")]
    assert texts == {
        "a": ["text of a.txt", "text of a.en.txt", None],
        "b": [None, None, "text of b.de-AT.txt"],
        "c": [None, None, None],
        "c.2": ["text of c.2.txt", None, None],
    }
    with open_shard(write_tar(tmp_path / "x.tar", members[:3])) as raw:
        assert raw.named_text(raw.samples[0], "en") == "text of a.en.txt"


ENCODED = {
    "plain": b"ein Hund",
    "utf8_mark": b"\xef\xbb\xbf" + b"ein Hund",
    "utf16": "ein Hund".encode("utf-16"),
    "utf16_big": b"\xfe\xff" + "ein Hund".encode("utf-16-be"),
    "utf32": "ein Hund".encode("utf-32"),
    "windows": b"the dog\x92s bench",
    "utf16_without_mark": "ein Hund".encode("utf-16-le"),
    "two_marks": b"\xef\xbb\xbf\xef\xbb\xbf" + b"ein Hund",
    "empty": b"",
}


def test_texts_are_decoded_by_their_mark_or_are_counted(tmp_path) -> None:
    members = [(f"{key}.{ext}", data) for key, text in ENCODED.items() for ext, data in (("jpg", b"i"), ("txt", text))]
    found, shown = {}, {}
    with open_shard(write_tar(tmp_path / "x.tar", members)) as raw:
        for sample in raw.samples:
            shown[sample.key] = raw.alt_text(sample)
            try:
                found[sample.key] = raw.text(sample)
            except SampleReject as reject:
                found[sample.key] = reject.reason
    readable = dict.fromkeys(("plain", "utf8_mark", "utf16", "utf16_big", "utf32", "two_marks"), "ein Hund") | {
        "empty": ""
    }
    assert found == readable | {"windows": "not_utf8", "utf16_without_mark": "not_utf8"}
    assert shown == readable | {"windows": None, "utf16_without_mark": None}


ROWS = [("c0", "t0"), ("", "t1"), (" ", "t2"), (None, "t3"), ("", ""), (None, None)]
EXPECTED = ["c0", "t1", "t2", "t3", "", None]


def write_blanks(place: Path, kind: str) -> Path:
    records = [{"caption": caption, "text": text} for caption, text in ROWS]
    for number in range(len(ROWS)):
        (place / f"{number}.jpg").write_bytes(b"image")
    named = [{"file_name": f"{number}.jpg", **record} for number, record in enumerate(records)]
    path = place / kind
    match kind:
        case "x.tar":
            members = [(f"{number}.{ext}", data) for number, record in enumerate(records)
                       for ext, data in (("jpg", b"i"), ("json", json.dumps(record).encode()))]  # fmt: skip
            return Path(write_tar(path, members))
        case "json files":
            for number, record in enumerate(records):
                (place / f"{number}.json").write_text(json.dumps(record))
            return place
        case "x.parquet" | "metadata.parquet":
            pq.write_table(pa.Table.from_pylist(named), path)
        case "rows.parquet":
            pq.write_table(pa.Table.from_pylist([{"image": b"image", **record} for record in records]), path)
        case "x.json":
            path.write_text(json.dumps(named))
        case "x.jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in named))
        case _:
            with path.open("w") as file:
                writer = csv.DictWriter(file, list(named[0]))
                writer.writeheader()
                writer.writerows(named)
    return place if kind.startswith("metadata") else path


BLANKS = ("x.tar", "json files", "x.csv", "x.jsonl", "x.json", "x.parquet", "rows.parquet", "metadata.csv")


@pytest.mark.parametrize("kind", [*BLANKS, "metadata.parquet"])
def test_a_blank_text_counts_as_none_where_another_is_there(tmp_path, kind) -> None:
    path = write_blanks(tmp_path, kind)
    with open_shard(str(path)) as raw:
        # A CSV cannot say that a cell is missing.
        assert [raw.text(sample) for sample in raw.samples] == [
            "" if text is None and kind.endswith("csv") else text for text in EXPECTED
        ]


def test_a_blank_text_file_counts_as_none_where_metadata_or_json_have_one(tmp_path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"image")
        (tmp_path / f"{number}.txt").write_text(" \n")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.jpg,row\n1.jpg,\n2.jpg,\n")
    (tmp_path / "1.json").write_text('{"caption": "json"}')
    with open_shard(str(tmp_path)) as raw:
        assert [raw.text(sample) for sample in raw.samples] == ["row", "json", ""]


VALUES = [
    *(("  a dog \n", "a dog"), ("\ufeffa dog", "a dog"), ("a\0dog", "not_utf8"), ("\ud83d", "not_utf8")),
    *((["", "a dog"], "a dog"), (["a dog", "a cat"], "a dog"), ([" "], ""), ("", ""), (None, None)),
    *(
        (["", 5, "a dog"], "a dog"),
        ([5], "not_text"),
        (7, "not_text"),
        (True, "not_text"),
        ({"en": "a dog"}, "not_text"),
    ),
]


@pytest.mark.parametrize(("value", "expected"), VALUES)
def test_a_text_of_json_is_read_as_that_of_a_table(tmp_path, value, expected) -> None:
    """One rule for what a text is: in JSON beside the image, in a folder's metadata and in tables."""
    record = json.dumps({"caption": value})
    for kind in ("list", "beside", "metadata"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.jpg").write_bytes(b"image")
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"image"), ("a.json", record.encode())])
    (tmp_path / "beside" / "a.json").write_text(record)
    (tmp_path / "metadata" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "caption": value}))
    (tmp_path / "list" / "list.jsonl").write_text(json.dumps({"image_path": "a.jpg", "caption": value}))
    for shard in (path, tmp_path / "beside", tmp_path / "metadata", tmp_path / "list" / "list.jsonl"):
        with open_shard(str(shard)) as raw:
            try:
                text = raw.text(raw.samples[0])
            except SampleReject as reject:
                text = reject.reason
        assert (shard, text) == (shard, expected)


def test_fields_of_json_are_named_as_columns_are(tmp_path) -> None:
    records = {"a": {"Caption": "a dog"}, "b": {"meta": {"caption": "a cat"}}, "c": {"text": "", "TITLE": "a bird"}}
    members = [(f"{key}.jpg", b"i") for key in records]
    members += [(f"{key}.json", json.dumps(record).encode()) for key, record in records.items()]
    lines = [json.dumps({"key": key, "path": "a.jpg", **record}) for key, record in records.items()]
    (tmp_path / "a.jpg").write_bytes(b"i")
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    for path in (write_tar(tmp_path / "x.tar", members), str(tmp_path / "x.jsonl")):
        with open_shard(path) as raw:
            texts = {sample.key: raw.text(sample) for sample in raw.samples}
            nested = {sample.key: raw.named_text(sample, "meta.caption") for sample in raw.samples}
        assert texts == {"a": "a dog", "b": None, "c": "a bird"}
        assert nested == {"a": None, "b": "a cat", "c": None}


def test_of_a_list_the_named_text_counts_whatever_stands_beside_it() -> None:
    assert text_of_record({"captions": [0.9, "a dog"]}, "captions[1]") == "a dog"
    with pytest.raises(SampleReject, match="not_text"):
        text_of_record({"captions": [0.9, "a dog"]}, "captions[0]")
