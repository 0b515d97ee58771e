"""Tables of any format: the same rows from all of them, and every damage by name and line."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from errors import UserError
from pipelines.raw.images import SampleReject
from pipelines.raw.tables import json_tables
from pipelines.raw.tables.open_table import open_table, require_sound, table_format
from pipelines.raw.tables.rows import TableRow, key_of_cell
from pipelines.raw.texts import text_of_value

ALL = range(2**40)
KEYS = [f"a/{number}" for number in range(50)]
CAPTIONS = [f'a "red" dog, number {number}: été' for number in range(50)]
RECORDS = [{"key": key, "caption": caption} for key, caption in zip(KEYS, CAPTIONS, strict=True)]


def csv_text(separator: str = ",") -> str:
    quoted = ['"' + caption.replace('"', '""') + '"' for caption in CAPTIONS]
    lines = [f"{key}{separator}{caption}" for key, caption in zip(KEYS, quoted, strict=True)]
    return "\n".join([f"key{separator}caption", *lines]) + "\n"


def write_arrow(path: Path, *, is_stream: bool) -> None:
    table = pa.Table.from_pylist(RECORDS)
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_zstd(path: Path, data: bytes) -> None:
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
        stream.write(data)


WRITERS = {
    "a.csv": lambda path: path.write_text(csv_text()),
    "bom.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + csv_text().encode()),
    "utf16.csv": lambda path: path.write_text(csv_text(), encoding="utf-16"),
    "semicolons.csv": lambda path: path.write_text(csv_text(";")),
    "mac.csv": lambda path: path.write_bytes(csv_text().replace("\n", "\r").encode()),
    "windows.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_text().replace("\n", "\r\n").encode())),
    "a.tsv": lambda path: path.write_text("key\tcaption\n" + "".join(map("{}\t{}\n".format, KEYS, CAPTIONS))),
    "quoted.tsv.gz": lambda path: path.write_bytes(gzip.compress(csv_text("\t").encode())),
    "a.jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, RECORDS))),
    "utf16.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-16"),
    "a.ndjson.zst": lambda path: write_zstd(path, "\n".join(map(json.dumps, RECORDS)).encode()),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS))),
    "list.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1)),
    "list.jsonl": lambda path: path.write_text(json.dumps(RECORDS)),
    "coco.json.gz": lambda path: path.write_bytes(
        gzip.compress(json.dumps({"info": {"a": 1}, "images": [{"id": 1}], "annotations": RECORDS}).encode())
    ),
    "object.json": lambda path: path.write_text(json.dumps({"rows": RECORDS, "version": 1, "tags": [1, 2]})),
    "by_key.json": lambda path: path.write_text(
        json.dumps({key: {"caption": caption} for key, caption in zip(KEYS, CAPTIONS, strict=True)})
    ),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=8),
    "a.arrow": lambda path: write_arrow(path, is_stream=False),
    "stream.arrow": lambda path: write_arrow(path, is_stream=True),
}


def read(path: Path, columns: Sequence[str], rows: range | np.ndarray = ALL) -> list[TableRow]:
    with open_table(str(path)) as table:
        return list(table.rows(rows, columns))


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_tables, "WINDOW_CHARACTERS", 64)
    path = tmp_path / name
    WRITERS[name](path)
    expected = [TableRow(number, record) for number, record in enumerate(RECORDS)]
    with open_table(str(path)) as table:
        assert (sorted(table.columns), table.num_rows) == (["caption", "key"], 50)
        assert list(table.rows(ALL, ["key", "caption"])) == expected
        assert list(table.rows(range(11, 13), ["key", "caption"])) == expected[11:13]
        assert list(table.rows(np.array([0, 8, 9, 49]), ["key", "caption"])) == [expected[n] for n in (0, 8, 9, 49)]
        with pytest.raises(UserError, match=rf"{name}: no column 'captoin'; columns are .* \(did you mean caption\?\)"):
            list(table.rows(ALL, ["captoin"]))


def test_lines_lists_and_objects_of_plain_texts(tmp_path):
    (tmp_path / "a.txt").write_text("a red dog\n\na cat")
    (tmp_path / "list.json").write_text('["a red dog", null, "a cat"]')
    (tmp_path / "by_key.json").write_text('{"x.jpg": "a red dog", "y.jpg": "a cat"}')
    (tmp_path / "one.json").write_text('{"caption": "a red dog", "url": "http://x"}')
    assert [row.values for row in read(tmp_path / "a.txt", ["text"])] == [
        {"text": "a red dog"}, {"text": ""}, {"text": "a cat"},
    ]  # fmt: skip
    assert [(row.values["text"], row.reject) for row in read(tmp_path / "list.json", ["text"])] == [
        ("a red dog", None), (None, "not_json"), ("a cat", None),
    ]  # fmt: skip
    rows = read(tmp_path / "by_key.json", ["key", "text"])
    assert [row.values for row in rows] == [{"key": "x.jpg", "text": "a red dog"}, {"key": "y.jpg", "text": "a cat"}]
    assert read(tmp_path / "one.json", ["caption"]) == [TableRow(0, {"caption": "a red dog"})]


def test_fields_of_structs_and_objects_are_columns(tmp_path):
    records = [{"image": {"bytes": b"\xff\xd8", "path": None}, "meta": {"caption": "a dog"}}] * 3
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"meta": {"caption": "a dog"}}\n{"meta": null}\n')
    with open_table(str(tmp_path / "a.parquet")) as table:
        assert table.columns == ["image", "image.bytes", "image.path", "meta", "meta.caption"]
        row = next(iter(table.rows(range(1, 2), ["image.bytes", "meta.caption", "image"])))
    assert row == TableRow(1, {"image.bytes": b"\xff\xd8", "meta.caption": "a dog", "image": records[0]["image"]})
    assert [row.values["meta.caption"] for row in read(tmp_path / "a.jsonl", ["meta.caption"])] == ["a dog", None]


CLOSED_LATE = "".join(
    f"{n},{chr(34) if n == 3 else ''}a dog on bench {n}{chr(34) if n == 9 else ''}\n" for n in range(20)
)
QUOTES = {
    "never closed": ('0,a\n1,"b\n2,c\n', r"line 3: the quotation mark .* is never closed; put the whole field"),
    "closed by the next stray one": ('0,a\n1,"b\n2,c\n3,"d\n', r"line 3: .* is closed on line 5 before the field ends"),
    "inside a field": ('0,a\n1,"a "red" dog"\n', r"line 3: .* is closed there before the field ends; .* double those"),
    "closed where a row ends": (CLOSED_LATE, r"line 5: .* is closed on line 11, and the lines between are rows"),
}


@pytest.mark.parametrize("kind", QUOTES)
def test_a_quotation_mark_that_swallows_rows_is_a_fault_with_its_line(tmp_path, kind):
    text, message = QUOTES[kind]
    (tmp_path / "a.csv").write_text("key,caption\n" + text)
    with open_table(str(tmp_path / "a.csv")) as table:
        assert table.fault is not None
        with pytest.raises(UserError, match=rf"a\.csv: {message}"):
            require_sound(table)
        rows = list(table.rows(ALL, ["key", "caption"]))
    # The rows before it are sound; all that comes after is one reject, with the line on which it begins.
    lines = [line.split(",") for line in text.splitlines()]
    begin = next(number for number, (_, caption) in enumerate(lines) if caption.startswith('"'))
    expected = [
        TableRow(number, {"key": key, "caption": text}) for number, (key, text) in enumerate(lines[: begin + 1])
    ]
    assert rows == [*expected[:begin], expected[begin]._replace(reject="unclosed_quote")]
    assert table.num_rows == len(rows)


def test_names_of_columns_with_an_unclosed_quotation_mark_are_no_table(tmp_path):
    (tmp_path / "a.csv").write_text('key,"caption\n0,a\n')
    with pytest.raises(UserError, match=r"a\.csv: line 1: the quotation mark .* is never closed"):
        read(tmp_path / "a.csv", [])


def test_legal_quotes_are_texts(tmp_path):
    lines = '0,"A dog.\nA cat, grey\n1, 2 or 3 birds\n""Stop"""\n1,a 5" pipe\n2,"a ""red"" dog"\n\n3,\n'
    (tmp_path / "a.csv").write_text("key,caption\n" + lines)
    texts = [row.values["caption"] for row in read(tmp_path / "a.csv", ["caption"])]
    assert texts == ['A dog.\nA cat, grey\n1, 2 or 3 birds\n"Stop"', 'a 5" pipe', 'a "red" dog', ""]


def test_rows_of_other_lengths_are_rejects(tmp_path):
    rows = ["0{}a dog", "1{}a dog{} red", "2", "3{}a cat"]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        lines = ["key{}caption", *rows]
        (tmp_path / name).write_text("\n".join(lines).replace("{}", separator) + "\n")
        found = [(row.values["key"], row.reject) for row in read(tmp_path / name, ["key", "caption"])]
        assert found == [("0", None), ("1", "wrong_number_of_fields"), ("2", "wrong_number_of_fields"), ("3", None)]


def test_what_is_not_utf8_spoils_its_own_cell(tmp_path):
    latin, good = "café".encode("latin-1"), "café".encode()
    (tmp_path / "a.csv").write_bytes(b"key,caption\n" + latin + b"," + good + b"\n1," + latin + b"\n2,a\0dog\n")
    (tmp_path / "a.txt").write_bytes(good + b"\n" + latin + b"\n")
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([good, latin], pa.binary()).buffers())
    pq.write_table(pa.table({"caption": column}), tmp_path / "a.parquet")

    def outcome(value: object) -> str | None:
        try:
            return text_of_value(value)
        except SampleReject as error:
            return error.reason

    rows = read(tmp_path / "a.csv", ["key", "caption"])
    assert [key_of_cell(row.values["key"]) for row in rows] == ["caf\\xe9", "1", "2"]
    assert [outcome(row.values["caption"]) for row in rows] == ["café", "not_utf8", "not_utf8"]
    assert [outcome(row.values["text"]) for row in read(tmp_path / "a.txt", ["text"])] == ["café", "not_utf8"]
    assert [outcome(row.values["caption"]) for row in read(tmp_path / "a.parquet", ["caption"])] == ["café", "not_utf8"]
    assert [outcome(value) for value in (5, {"a": 1}, ["a dog", "x"], [], float("nan"), b"\xef\xbb\xbf a ")] == [
        "not_text", "not_text", "a dog", None, None, "a",
    ]  # fmt: skip


def damaged(name: str, folder: Path) -> Path:
    path = folder / name
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    "name", ["a.parquet", "windows.csv.gz", "a.ndjson.zst", "list.json", "coco.json.gz", "a.arrow"]
)
def test_a_file_that_is_cut_off_is_named(tmp_path, name):
    path = damaged(name, tmp_path)
    with pytest.raises(UserError, match=rf"{name} is .*(fetch or write it again|not written or fetched to its end)"):
        read(path, ["caption"])


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "a.json", "a.arrow", "a.txt"])
def test_what_was_never_fetched_is_said(tmp_path, name):
    path = tmp_path / name
    for content, message in (
        (b"", "is empty"), (b"<!DOCTYPE html><p>404", "is a web page"), (b"version https://git-lfs", "lfs pull"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} .*{message}"):
            read(path, ["caption"])


def test_other_files_are_told_which_tables_there_are(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"a\.xlsx is not called as a table is: CSV, TSV, .*Parquet or Arrow"):
        read(tmp_path / "a.xlsx", ["caption"])
    names = ("a.CSV", "a.jsonl.gz", "https://x/y.parquet?download=1", "a.csv.tar", "csv")
    assert [table_format(name) for name in names] == ["csv", "jsonl", "parquet", None, None]
    (tmp_path / "a.parquet").write_bytes(b"key,caption\n")
    with pytest.raises(UserError, match=r"a\.parquet is neither Parquet nor Arrow"):
        read(tmp_path / "a.parquet", ["caption"])


def test_columns_of_one_name_are_refused_only_where_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text("x,x,caption\n1,2,a dog\n")
    assert read(tmp_path / "a.csv", ["caption"]) == [TableRow(0, {"caption": "a dog"})]
    with pytest.raises(UserError, match="the column 'x' is there 2 times; rename all but one"):
        read(tmp_path / "a.csv", ["x"])


def test_documents_that_do_not_say_where_their_rows_are(tmp_path):
    (tmp_path / "a.json").write_text('{"train": [{"caption": "a"}], "val": [{"caption": "b"}]}')
    with pytest.raises(UserError, match=r"a\.json holds several lists \(train, val\)"):
        read(tmp_path / "a.json", ["caption"])
    (tmp_path / "b.json").write_text('[{"caption": "a"},\n{"caption": b}]')
    with pytest.raises(UserError, match=r"b\.json is no JSON: line 2: Expecting value"):
        read(tmp_path / "b.json", ["caption"])


TAB_ROWS = {
    'k1\t"first\nsecond"\nk2\tb\n': [("k1", "first\nsecond"), ("k2", "b")],
    'k1\t"first\n\nk\tthird"\nk2\tb\n': [("k1", "first\n\nk\tthird"), ("k2", "b")],
    'k1\t"a\tb ""c"""\nk2\tb\n': [("k1", 'a\tb "c"'), ("k2", "b")],
    'k1\t"5 inch disk\nk2\tan 8" one"\nk3\tc\n': [("k1", '"5 inch disk'), ("k2", 'an 8" one"'), ("k3", "c")],
    'k1\ta 5" disk\nk2\t"so" he said\n': [("k1", 'a 5" disk'), ("k2", '"so" he said')],
    'k1\t"half of it\nand the rest\nk2\tb\n': [("k1", "unclosed_quote"), ("", "wrong_number_of_fields"), ("k2", "b")],
    '"k\n1"\tb\nk2\tb\n': [("k\n1", "b"), ("k2", "b")],
    'k1\t"a\tb2\nk3\tc\n': [("k1", "unclosed_quote"), ("k3", "c")],
}


@pytest.mark.parametrize("rows", TAB_ROWS)
def test_quotation_marks_of_tab_separated_values_never_give_half_a_text(tmp_path, rows):
    (tmp_path / "a.tsv").write_text("key\tcaption\n" + rows)
    with open_table(str(tmp_path / "a.tsv")) as table:
        found = list(table.rows(range(table.num_rows), ["key", "caption"]))
    for row, (key, caption) in zip(found, TAB_ROWS[rows], strict=True):
        assert (row.reject or row.values["caption"]) == caption
        assert row.values["key"] == key or row.reject is not None


def test_lines_that_are_no_json_are_named_with_the_first(tmp_path):
    (tmp_path / "a.jsonl").write_text("a.jpg;a dog\nb.jpg;a cat\n")
    said = r"a\.jsonl: none of its first 2 lines is an object of JSON.*'a\.jpg;a dog'"
    with pytest.raises(UserError, match=said), open_table(str(tmp_path / "a.jsonl")):
        pass


def test_spaces_behind_commas_and_in_names_are_no_part_of_fields(tmp_path):
    (tmp_path / "a.csv").write_text('path, caption\na.jpg, a dog\nb.jpg, "a cat, asleep"\n')
    (tmp_path / "b.csv").write_text('path,caption\na.jpg, "so" he said\n')
    (tmp_path / "c.tsv").write_text("path \t caption\na.jpg\ta dog\n")
    found = {}
    for path in tmp_path.iterdir():
        with open_table(str(path)) as table:
            found[path.name] = [row.values["caption"] for row in table.rows(range(table.num_rows), ["caption"])]
    assert found == {"a.csv": ["a dog", "a cat, asleep"], "b.csv": [' "so" he said'], "c.tsv": ["a dog"]}
