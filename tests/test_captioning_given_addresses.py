"""`captioning.table` as people type it: folders, patterns, columns, lists and names of the samples' own texts."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioning.__main__ import main
from errors import UserError
from tests.given_run import command, rows_of, write_run
from tests.raw_shards import encode, photo, write_tar


@pytest.fixture
def run(tmp_path) -> Path:
    """A shard of SA-1B with sa_0 … sa_9, and one of LAION with ten texts of its own."""
    return write_run(tmp_path)


def test_a_folder_of_captions_is_the_same_folder_as_a_tar(run, monkeypatch) -> None:
    """One rule for the text of a key: an empty `.txt` gives way, strays are none, and `x.jpg.txt` is of `x`."""
    files = {
        "sa_0.txt": "zero",
        "sa_0.caption": "never",
        "sa_1.txt": "",
        "sa_1.caption": "one",
        "sa_2.jpg.txt": "two",
        "sa_3.caption.txt": "three",
        "sa_4.TXT": "four",
        "README.txt": "no caption",
        "__MACOSX/sa_5.txt": "no caption",
        "sa_6.text": "six",
    }
    for name, text in files.items():
        (run / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "texts" / name).write_text(text)
    write_tar(run / "texts.tar", [(name, text.encode()) for name, text in files.items()])
    found = []
    for table in ("texts", "texts.tar"):
        command(run, f"{{run}}/{table}", 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
        found.append({key: row["caption"] or row["reject"] for key, row in rows_of(run, "sa_000000").items()})
    texts = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four", 6: "six"}
    assert found == [{f"sa_{number}": texts.get(number, "no_caption") for number in range(10)}] * 2
    (run / "texts" / "sa_0.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds json .* and text .*, and only one of them can be meant"):
        command(run, "{run}/texts", 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
    command(run, "{run}/texts#caption", 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
    named = {key: row["caption"] for key, row in rows_of(run, "sa_000000").items() if row["reject"] is None}
    assert named == {"sa_0": "never", "sa_1": "one", "sa_3": "three"}


def test_every_part_of_a_pattern_must_be_there_and_every_file_one_of_captions(run, monkeypatch) -> None:
    for part in (0, 1, 3):
        (run / f"part_{part}.csv").write_text(f"key,caption\nsa_{part},text\n")
    for name in ("captions.zip", "captions.txt"):
        (run / name).write_bytes(b"x")
    write_tar(run / "plain.tar", [("sa_0.txt", b"text")])
    (run / "captions.tgz").write_bytes(gzip.compress((run / "plain.tar").read_bytes()))
    (run / "both").mkdir()
    for name in ("a.csv", "b.txt"):
        (run / "both" / name).write_text("key,caption\n")
    key = r"captioning\.table: caption = "
    for table, said in {
        "part_{0..3}.csv": rf"{key}.*no file matches .*part_2\.csv",
        "captions.zip": rf"{key}.*captions\.zip is not called as a file of captions is: CSV",
        "captions.txt": rf"{key}.*captions\.txt has texts and no keys: name the folder",
        "captions.tgz": rf"{key}.*captions\.tgz .*unpack it with gunzip",
        "both": rf"{key}.*both holds csv \(a\.csv\) and text \(b\.txt\), and only one of them can be meant",
        "plain.tar#nope": rf"{key}.*there is no row in it that has a text 'nope'",
    }.items():
        with pytest.raises(UserError, match=said):
            command(run, f"{{run}}/{table}", monkeypatch=monkeypatch)
    assert not (run / "captions").exists()


def test_keys_that_are_names_of_files_are_matched_as_rows_of_them(run, monkeypatch) -> None:
    keys = ["000.jpg", "imgs/1.png", "2"]
    rows = [{"key": key, "image": {"bytes": encode(photo(number)), "path": None}} for number, key in enumerate(keys)]
    pq.write_table(pa.Table.from_pylist(rows), run / "coco.parquet")
    pairs = {"000.jpg": "zero", "imgs/1.png": "one", "2.jpg": "two"}
    (run / "ids.csv").write_text("id,caption\n" + "".join(f"{key},{text}\n" for key, text in pairs.items()))
    (run / "ids.json").write_text(json.dumps({key: {"caption": text} for key, text in pairs.items()}))
    for table in ("ids.csv", "ids.json"):
        command(run, f"{{run}}/{table}", f"data.shards={run}/coco.parquet", monkeypatch=monkeypatch)
        found = {key: row["caption"] for key, row in rows_of(run, "coco").items()}
        assert found == dict(zip(keys, pairs.values(), strict=True)), table


def test_columns_are_known_in_any_case(run, monkeypatch) -> None:
    pq.write_table(pa.table({"Image": [encode(photo(1))], "Key": ["a"], "CAPTION": ["own"]}), run / "up.parquet")
    (run / "up.csv").write_text("FileName,Caption\na.jpg,given\n")
    table = '{caption = "{run}/up.csv", own = "#"}'
    command(run, table, f"data.shards={run}/up.parquet", monkeypatch=monkeypatch)
    assert [(key, row["caption"], row["own"]) for key, row in rows_of(run, "up").items()] == [("a", "given", "own")]
    (run / "a.jpg").write_bytes(encode(photo(1)))
    command(run, '{caption = "#"}', f"data.shards={run}/up.csv", monkeypatch=monkeypatch)
    assert [row["caption"] for row in rows_of(run, "up").values()] == ["given"]


def test_a_name_that_no_text_has_is_named_with_those_there_are(run, monkeypatch, caplog) -> None:
    table = pa.table({"image": [encode(photo(1))], "caption": ["a"], "words": ["b"], "texts": [["c", "d"]]})
    pq.write_table(table, run / "own.parquet")
    shards = f"data.shards={run}/own.parquet"
    for table, settings, said in (
        ("#wordss", (), r"'#wordss': none of the 1 samples .*caption, texts, image, words \(did you mean words\?\)"),
        ("", ("data.text_column=nosuch",), "data.text_column = 'nosuch': none of the 1 samples"),
    ):
        for is_plan in (True, False):
            with pytest.raises(UserError, match=said):
                command(run, table, shards, *settings, monkeypatch=monkeypatch, is_plan=is_plan)
    command(run, '{caption = "#words", other = "#texts[1]"}', shards, monkeypatch=monkeypatch)
    assert "of this name" not in caplog.text
    assert [(row["caption"], row["other"]) for row in rows_of(run, "own").values()] == [("b", "d")]
    monkeypatch.setattr("captioning.given.own_names.SAMPLES_LOOKED_AT", 9)
    command(run, "#jpg.txt", 'captioning.shards=["laion_*"]', monkeypatch=monkeypatch, is_plan=True)
    said = " ".join(caplog.text.split())
    assert "none of the first 9 samples has a text of this name; names there are txt" in said


def test_shards_without_a_text_of_their_own_are_refused_with_their_columns(run, monkeypatch) -> None:
    pq.write_table(pa.table({"image": [encode(photo(1))], "en": ["a"], "de": ["b"]}), run / "own.parquet")
    shards = f"data.shards={run}/own.parquet"
    for is_plan in (True, False):
        with pytest.raises(UserError, match=r"own\.parquet has the columns image, en, de: say with data\.text_column"):
            command(run, "", shards, monkeypatch=monkeypatch, is_plan=is_plan)
    command(run, "", shards, "data.text_column=de", monkeypatch=monkeypatch)
    assert [row["caption"] for row in rows_of(run, "own").values()] == ["b"]


def test_a_text_of_a_list_is_named_by_its_place(run, monkeypatch) -> None:
    lists = [["first", "second"], ["alone"], None]
    pq.write_table(pa.table({"key": ["sa_0", "sa_1", "sa_2"], "captions": lists}), run / "lists.parquet")
    table = '{caption = "{run}/lists.parquet", short = "{run}/lists.parquet#captions[1]"}'
    command(run, table, 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
    rows = rows_of(run, "sa_000000")
    found = [(rows[f"sa_{number}"]["caption"], rows[f"sa_{number}"]["short"]) for number in range(2)]
    assert found == [("first", "second"), ("alone", None)] and rows["sa_2"]["reject"] == "no_caption"
    with pytest.raises(UserError, match=r"no column 'texts'; columns are key, captions"):
        command(run, "{run}/lists.parquet#texts[1]", monkeypatch=monkeypatch)


def test_what_is_no_text_in_a_folder_of_texts_is_said_with_its_number(run, monkeypatch, caplog) -> None:
    folder = run / "texts"
    for name in ("sa_0.txt", "sa_1.txt", "sa_0.jpg", "sa_0.json", "in/sa_9.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("a dog")
    plain = "{run}/texts#txt"
    command(run, plain, 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
    assert "are no samples" not in caplog.text
    for name in ("._sa_0.txt", "__MACOSX/sa_0.txt", "README.md", "film.mp4"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("x")
    (folder / "sa_0.txt").write_text("a red dog")
    command(run, plain, 'captioning.shards=["sa_*"]', monkeypatch=monkeypatch)
    assert "texts: 4 members are no samples, such as ._sa_0.txt, README.md, __MACOSX/sa_0.txt" in " ".join(
        caplog.text.split()
    )
    assert rows_of(run, "sa_000000")["sa_0"]["caption"] == "a red dog"


def test_a_plan_refuses_a_clip_that_is_none_and_a_run_that_is_a_file(run, monkeypatch) -> None:
    clip = f"captioning.clip_model={Path(__file__).parent.parent}/toyworld/weights/vae"
    with pytest.raises(UserError, match=r"clip_model = '.*vae' is a .*, not a CLIP"):
        command(run, "#txt", 'captioning.shards=["laion_*"]', clip, monkeypatch=monkeypatch, is_plan=True)
    (run / "file").touch()
    argv = ["captioning", "--recipe", str(run / "recipe.toml"), "--run", str(run / "file"), "--plan"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(UserError, match=r"RUN .*/file is a file: a run is a folder|--run .*/file is a file"):
        main()


ROWS = {"numbers": (3, 2, 1, 0), "images": ("0.jpg", "1.jpg", "2.jpg", "3.jpg")}


@pytest.mark.parametrize(("number", "image"), [("id", "image_id"), ("key", "image"), ("id", "file_name")])
def test_numbers_of_rows_are_not_taken_for_those_of_images(run, monkeypatch, number, image) -> None:
    """A table with numbers of its rows beside names of images gave every image another's caption."""
    write_tar(run / "raw" / "photos.tar", [(f"{key}.jpg", encode(photo(key))) for key in range(4)])
    rows = [f"{row},{name},caption of {name}" for row, name in zip(*ROWS.values(), strict=True)]
    (run / "rows.csv").write_text("\n".join([f"{number},{image},caption", *rows]))
    shards = 'captioning.shards=["photos"]'
    table = f"{run}/rows.csv"
    if number == "key":  # it says itself that it is the image's
        for is_plan in (True, False):
            said = r"by column 'key' row 4 and by 'image' row 1 are of photos/0: say which .*rows\.csv#image,caption"
            with pytest.raises(UserError, match=said):
                command(run, table, shards, monkeypatch=monkeypatch, is_plan=is_plan)
        table += f"#{image},caption"
    command(run, table, shards, monkeypatch=monkeypatch)
    assert [row["caption"] for row in rows_of(run, "photos").values()] == [f"caption of {key}.jpg" for key in range(4)]


def test_of_several_columns_of_texts_the_first_that_is_not_blank_counts_as_in_shards(run, monkeypatch) -> None:
    write_tar(run / "raw" / "photos.tar", [(f"{key}.jpg", encode(photo(key))) for key in range(3)])
    (run / "rows.csv").write_text("path,caption,text\n0.jpg,a,b\n1.jpg,,c\n2.jpg, ,\n")
    command(run, f"{run}/rows.csv", 'captioning.shards=["photos"]', monkeypatch=monkeypatch)
    assert [row["caption"] for row in rows_of(run, "photos").values()] == ["a", "c", None]
    command(run, f"{run}/rows.csv#path,caption", 'captioning.shards=["photos"]', monkeypatch=monkeypatch)
    assert [row["caption"] for row in rows_of(run, "photos").values()] == ["a", None, None]


def test_a_column_of_names_that_several_folders_have_refuses_no_keys_that_are_unique(run, monkeypatch) -> None:
    """`1.jpg` of two folders is of the first row as well as of the second: it was taken for the first's alone."""
    write_tar(run / "raw" / "photos.tar", [(f"{key}/1.jpg", encode(photo(0))) for key in "ab"])
    (run / "rows.csv").write_text("key,file_name,caption\na/1,1.jpg,of a\nb/1,1.jpg,of b\n")
    command(run, f"{run}/rows.csv", 'captioning.shards=["photos"]', monkeypatch=monkeypatch)
    assert [row["caption"] for row in rows_of(run, "photos").values()] == ["of a", "of b"]
