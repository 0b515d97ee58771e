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


ENCODED = {
    "plain": b"ein Hund",
    "utf8_mark": b"\xef\xbb\xbf" + b"ein Hund",
    "utf16": "ein Hund".encode("utf-16"),
    "utf16_big": b"\xfe\xff" + "ein Hund".encode("utf-16-be"),
    "utf32": "ein Hund".encode("utf-32"),
    "windows": b"the dog\x92s bench",
    "utf16_without_mark": "ein Hund".encode("utf-16-le"),
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
    readable = dict.fromkeys(("plain", "utf8_mark", "utf16", "utf16_big", "utf32"), "ein Hund") | {"empty": ""}
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
