"""What goes in: every layout through the room, several sets at once, and texts that are none."""

import csv
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from unittest.mock import ANY

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_shards import encode, photo, write_tar
from stats_run import RECIPE, caption_rows, run_stage, write_caption_shards

from dataset_stats.captions import Address, CaptionRow, RawOpening, count_rows, read_rows
from errors import UserError
from pipelines.raw import summaries
from pipelines.raw.shards import describe_shards
from pipelines.store.summary import read_summary

REPOSITORY = Path(__file__).resolve().parent.parent
CAPTION = "A red dog near a wooden bench."
NOT_UTF8 = b"dog" + b"\xff"
ODD_TEXTS = {
    "emoji": "😀 👩‍👩‍👧‍👦 🏳️‍🌈",
    "cjk": "日本の犬と猫、公園で",
    "control characters": "dog\x07\x1b[31m\u202e\u2028cat\x7f",
    "markup": '<script>alert(1)</script> <img src=x onerror=alert(2)> "dog" & cat',
    "formula": '=HYPERLINK("http://x.y","dog")',
    "tab and newline": "\tdog\r\n\ncat\x0b\x0c",
    "zalgo": "d\u0336\u0317o\u0336g\u0336\u0300\u0301",
    "marks only": "... !!! ???",
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    write_caption_shards(tmp_path / "run", {"laion_0": caption_rows("laion_0", ["Dog SALE"] * 20, [CAPTION] * 20)})
    return tmp_path / "run"


def rows_of(layout: str, path: Path, column: str = "text") -> list[CaptionRow]:
    address = Address(layout=layout, column=column, path=str(path))
    return [row for block in read_rows(address, 0, 99, opening=RawOpening()) for row in block]


def outcome(rows: list[CaptionRow]) -> list[str | None]:
    return [row.text or row.reject for row in rows]


def stage_summary(run: Path, sets: str, *overrides: str) -> dict:
    run_stage(run, f"dataset_stats.sets={sets}", *overrides)
    return read_summary(run)["dataset_stats"]


def test_every_layout_gives_rows_and_counts_what_is_unreadable(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "dog"}\n{"text": "\\ud800"}\nnot json\n{"text": 5}\n[1]\n\xff\n')
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfkey,text\n7,dog\n8," + NOT_UTF8 + b"\n")
    pq.write_table(pa.table({"text": pa.array(["dog", None])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([b"dog", NOT_UTF8])}), tmp_path / "b.parquet")
    assert outcome(rows_of("jsonl", tmp_path / "a.jsonl")) == [
        "dog", "not_utf8", "not_json", "not_text", "not_json", "not_json",
    ]  # fmt: skip
    assert outcome(rows_of("csv", tmp_path / "a.csv")) == ["dog", "not_utf8"]
    assert [row.key for row in rows_of("csv", tmp_path / "a.csv")] == ["7", "8"]
    assert outcome(rows_of("parquet", tmp_path / "a.parquet")) == ["dog", None]
    assert outcome(rows_of("parquet", tmp_path / "b.parquet")) == ["dog", "not_utf8"]


def test_rows_that_a_quotation_mark_swallows_are_a_counted_reject(tmp_path):
    lines = [f"{number},{chr(34) if number == 3 else ''}a red dog {number}\n" for number in range(99)]
    (tmp_path / "a.csv").write_text("key,text\n" + "".join(lines))
    rows = rows_of("csv", tmp_path / "a.csv")
    assert [(row.key, row.text, row.reject) for row in rows[2:]] == [
        ("2", "a red dog 2", None), ("3", '"a red dog 3', "unclosed_quote"),
    ]  # fmt: skip
    assert count_rows(Address(layout="csv", column="text", path=str(tmp_path / "a.csv"))) == len(rows) == 4


def test_img2datasets_table_rejects_what_was_not_downloaded(run):
    """img2dataset writes one row per link, failed ones too, with these columns."""
    table = pa.table(
        {
            "url": [f"http://x.y/{number}" for number in range(4)],
            "caption": ["A dog", "A cat", "A bench", None],
            "key": [f"00000000{number}" for number in range(4)],
            "status": ["success", "failed_to_download", "success", "success"],
            "error_message": [None, "HTTP Error 404: Not Found", None, None],
            "width": [256, None, 256, 256],
        }
    )
    pq.write_table(table, run.parent / "00000.parquet")
    summary = stage_summary(run, f"web={run.parent}/0*.parquet")["web"]
    assert (summary["num_captions"], summary["total_nouns"]) == (2, 2)
    assert summary["rejected"] == {"failed_to_download": 1, "no_text": 1}


def test_the_published_sam_llava_layout_in_tars_and_folders(run):
    """One `sa_<id>.txt` per image and no image beside it, as in SAM-LLaVA-Captions10M."""
    texts = {f"sa_{number}": "The image features a dog." for number in range(8)} | {"sa_8": "", "sa_9": NOT_UTF8}
    folder = run.parent / "captions" / "part0"
    folder.mkdir(parents=True)
    for key, text in texts.items():
        (folder / f"{key}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    tar_path = run.parent / "part0.tar"
    with tarfile.open(tar_path, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"./{path.name}")
    summary = stage_summary(run, f"tar={tar_path},folder={folder},above={folder.parent}")
    assert summary["tar"] == summary["folder"] == summary["above"]
    assert summary["tar"]["num_captions"] == 8
    assert summary["tar"]["rejected"] == {"blank_text": 1, "not_utf8": 1}


def test_alt_texts_straight_from_raw_shards(run):
    members = [(f"{n}.jpg", encode(photo(n))) for n in range(3)] + [(f"{n}.txt", b"a dog") for n in range(2)]
    write_tar(run / "raw" / "laion_0.tar", sorted(members))
    summary = stage_summary(run, '{web = {layout = "raw"}}')["web"]
    assert (summary["num_captions"], summary["rejected"]) == (2, {"no_text": 1})


def test_a_set_of_raw_shards_is_read_as_data_says(tmp_path):
    """The texts that the report quotes, too; another column is another text, and is counted anew."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encode(photo(number)))
    rows = [{"image": f"{number}.jpg", "caption": "a dog", "long": f"a red sofa {number}"} for number in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets, shards = '{web = {layout = "raw"}}', f"data.shards={tmp_path}/t.jsonl"
    run = tmp_path / "run"
    for chosen, noun, text in ((), "dog", "a dog"), (("data.text_column=long",), "sofa", "a red sofa"):
        assert stage_summary(run, sets, shards, *chosen)["web"]["num_captions"] == 3
        (row,) = csv.DictReader((run / "stats/nouns.csv").read_text().splitlines())
        assert row["noun"] == noun and text in (run / "stats/report.html").read_text()
    with pytest.raises(UserError, match="no_text 3"):
        stage_summary(run, sets, shards, "data.dialect=sa1b")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_without_a_text_are_missing_captions(tmp_path, kind):
    """A folder of photos was counted by its text files, so that those without one were in no number."""
    members = [(f"{number}.jpg", encode(photo(number))) for number in range(10)]
    members += [(f"{number}.txt", b"a red dog") for number in range(2, 10)]
    files = tmp_path / "photos"
    if kind == "tar":
        write_tar(files.with_suffix(".tar"), members)
    else:
        (files / "more").mkdir(parents=True)
        for name, content in members:
            (files / "more" / name).write_bytes(content)
    typed = files if kind == "folder" else files.with_suffix(".tar")
    summary = stage_summary(tmp_path / "run", f'{{web = {{files = "{typed}"}}}}')["web"]
    assert (summary["num_captions"], summary["rejected"]) == (8, {"no_text": 2})


def test_the_pieces_of_a_raw_shard_are_read_with_what_the_run_remembers_of_it(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for number in range(30):  # those of fewer are looked at again: that is as fast
        (tmp_path / "photos" / f"{number:02d}.jpg").write_bytes(encode(photo(0)))
        (tmp_path / "photos" / f"{number:02d}.txt").write_text(f"{number} dogs")
    photos = str(tmp_path / "photos")
    describe_shards([photos], run=tmp_path / "run")
    looked_at: list[str] = []
    read = summaries.read_headers
    monkeypatch.setattr(summaries, "read_headers", lambda path, *others: looked_at.append(path) or read(path, *others))
    address = Address(layout="raw", column="", path=photos)
    for run, num_looks in ((tmp_path / "run", 0), (None, 3)):
        looked_at.clear()
        opening = RawOpening(run=run)
        blocks = [block for start in (0, 10, 20) for block in read_rows(address, start, start + 10, opening=opening)]
        assert [row.text for block in blocks for row in block] == [f"{number} dogs" for number in range(30)]
        assert len(looked_at) == num_looks


def test_several_sets_by_make(run):
    """`make stats SETS=…`, as typed: a pattern of shards, a table with its column, and brace lists with commas."""
    for name in ("a", "b"):
        with (run.parent / f"web_{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["TEXT"], ["A dog."], ["Two dogs."]])
    (run.parent / "recipe.toml").write_text(RECIPE)
    sets = f"laion=laion_*#alt_text,web={run.parent}/web_{{a,b}}.csv#TEXT,laion-llava=laion_0"
    command = ["make", "--no-print-directory", "stats", f"RUN={run}", f"RECIPE={run.parent}/recipe.toml"]
    subprocess.run([*command, f"SETS={sets}"], check=True, cwd=REPOSITORY, env=os.environ, capture_output=True)
    summary = read_summary(run)["dataset_stats"]
    assert {name: summary[name]["num_captions"] for name in summary} == {"laion": 20, "web": 4, "laion-llava": 20}
    table = (run / "stats" / "table1.md").read_text()
    assert table.index("| laion |") < table.index("| web |") < table.index("| laion-llava |"), "in the order typed"
    assert summary["web"]["distinct_nouns"] == 2 and summary["web"]["plurals_folded"]["distinct_nouns"] == 1


def test_a_list_of_sets_that_says_no_files_is_refused(run):
    with pytest.raises(UserError, match="name=files#column"):
        stage_summary(run, "laion_0")


def test_odd_texts_are_captions_and_break_no_file(run):
    table = run.parent / "odd.jsonl"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in ODD_TEXTS.values()), encoding="utf-8")
    odd = stage_summary(run, f"odd={table}#text")["odd"]
    assert odd["num_captions"] == len(ODD_TEXTS) and odd["rejected"] == {}
    nouns = pq.read_table(run / "stats" / "nouns.parquet").to_pandas()
    assert int(nouns["odd"].sum()) == odd["total_nouns"] and {"dog", "cat"} <= set(nouns["noun"])
    with (run / "stats" / "nouns.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == len(nouns) + 1 and {len(row) for row in rows} == {3}
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for cell in row)


def test_captions_without_a_single_noun_have_numbers_too(run):
    table = run.parent / "a.jsonl"
    table.write_text('{"text": "... !!!"}\n{"text": "slowly"}\n')
    alone = stage_summary(run, f"none={table}#text")["none"]
    assert (alone["num_captions"], alone["distinct_nouns"], alone["valid_fraction"]) == (2, 0, 0.0)
    beside = stage_summary(run, f"none={table}#text,some=laion_0")
    assert beside["none"]["total_nouns"] == 0 < beside["some"]["total_nouns"]
    run_stage(run, f"dataset_stats.sets=none={table}#text,some=laion_0", "dataset_stats.sample=100")
    assert read_summary(run)["dataset_stats_sample"]["none"] == {**beside["none"], "estimate": ANY}


def test_null_blank_broken_and_huge_captions_are_counted_rows(run):
    huge = "dog " * 250_000
    texts = ["A dog.", None, "   \n", huge, "A cat."]
    pq.write_table(pa.table({"text": texts}), run.parent / "a.parquet")
    with (run.parent / "a.csv").open("wb") as file:
        lines = [text.encode() if text else b"" for text in texts]
        file.write(b"text\n" + b"".join(b'"' + line + b'"\n' for line in [*lines, NOT_UTF8]))
    sets = f"table={run.parent}/a.parquet#text,csv={run.parent}/a.csv#text"
    summary = stage_summary(run, sets)
    assert summary["table"]["rejected"] == {"blank_text": 1, "no_text": 1, "too_long": 1}
    assert summary["csv"]["rejected"] == {"blank_text": 2, "not_utf8": 1, "too_long": 1}
    assert summary["table"]["num_captions"] == summary["csv"]["num_captions"] == 2
    longest = stage_summary(run, f"table={run.parent}/a.parquet#text", "dataset_stats.max_characters=2000000")["table"]
    assert (longest["num_captions"], longest["total_nouns"]) == (3, 250_002)


def test_an_empty_set_is_one_clear_error_that_names_it(run):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), run.parent / "empty.parquet")
    with pytest.raises(UserError, match=r"dataset_stats\.sets\.web is empty: no samples in .*empty\.parquet"):
        stage_summary(run, f"web={run.parent}/empty.parquet#text")
    with pytest.raises(UserError, match=r"dataset_stats\.sets\.web\.files: no file matches .*gone"):
        stage_summary(run, f"web={run.parent}/gone_*.parquet#text")
    with pytest.raises(UserError, match=r"dataset_stats\.sets\.web\.shards: pattern 'sam_\*' matches none"):
        stage_summary(run, "web=sam_*")
    pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), run.parent / "null.parquet")
    with pytest.raises(UserError, match=r"dataset_stats\.sets\.web: none of its 2 samples has a text \(no_text 2\)"):
        stage_summary(run, f"good=laion_0,web={run.parent}/null.parquet#text")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_column_is_known_by_its_name_or_those_there_are_are_named(run, kind):
    path = run.parent / f"a.{kind}"

    def write(column: str) -> None:
        if kind == "parquet":
            pq.write_table(pa.table({"url": ["x"], column: ["dog"]}), path)
        else:
            path.write_text(f"url,{column}\nx,dog\n" if kind == "csv" else f'{{"url": "x", "{column}": "dog"}}\n')

    write("TEXT")
    assert stage_summary(run, f"web={path}")["web"]["num_captions"] == 1
    with pytest.raises(UserError, match=rf"a\.{kind}: no column 'caption'; columns are url, TEXT"):
        stage_summary(run, f"web={path}#caption")
    write("words")
    message = rf"web\.column: .*a\.{kind}: none of its columns is known .* such as caption, .*columns are url, words"
    with pytest.raises(UserError, match=message):
        stage_summary(run, f"web={path}")
    assert stage_summary(run, f"web={path}#words")["web"]["num_captions"] == 1


def test_a_missing_stage_column_or_file_is_one_clear_error(run):
    with pytest.raises(UserError, match=r"no column 'capton'; columns are key, alt_text, caption"):
        run_stage(run, "dataset_stats.sets.dense.column=capton")
    with pytest.raises(UserError, match=r"dataset_stats\.sets\.dense\.files is missing"):
        run_stage(run, "dataset_stats.sets.dense.layout=csv")
    shutil.rmtree(run / "captions")
    with pytest.raises(FileNotFoundError, match="has not finished"):
        run_stage(run)
