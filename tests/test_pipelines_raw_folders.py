"""A folder loses no image and makes up no row: files of one name, metadata of odd names, data beside data."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from errors import UserError
from pipelines.raw.patterns import expand_shards
from pipelines.raw.reading import Reading
from pipelines.raw.shards import describe_shards, open_shard


def put(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return folder


def found(folder: Path) -> dict[str, tuple[str | None, bytes | None, str | None]]:
    """Reject, image and text of each sample."""
    with open_shard(str(folder)) as raw:
        assert len({sample.key for sample in raw.samples}) == len(raw.samples)
        return {
            sample.key: (
                sample.reject,
                raw.image_bytes(sample) if sample.image_extension else None,
                raw.alt_text(sample),
            )
            for sample in raw.samples
        }


def test_the_file_that_metadata_name_is_the_sample(tmp_path) -> None:
    folder = put(tmp_path / "photos", "1.JPG", "1.jpg", "a.jpg", "d.jpg", "d.png", "x.jpg", "x.png", "sub/y.jpg")
    put(folder, "p.HEIC", "p.JPG")
    rows = ("1.jpg,small", "1.JPG,large", "a.JPG,a", "d.jpg,djpg", "d.png,dpng", "x.png,xpng")
    (folder / "metadata.csv").write_text(
        "\n".join(["file_name,text", *rows, "sub\\y.jpg,windows", "p.JPG,phone", "gone\\z.jpg,gone"])
    )
    assert found(folder) == {
        "1.JPG": (None, b"1.JPG", "large"),
        "1.jpg": (None, b"1.jpg", "small"),
        "a": (None, b"a.jpg", "a"),
        "d.jpg": (None, b"d.jpg", "djpg"),
        "d.png": (None, b"d.png", "dpng"),
        "p": (None, b"p.JPG", "phone"),
        "sub/y": (None, b"sub/y.jpg", "windows"),
        "x.jpg": ("not_in_metadata", b"x.jpg", None),
        "x.png": (None, b"x.png", "xpng"),
        "gone/z": ("missing_image_file", None, "gone"),
    }


def test_a_table_names_files_as_people_and_systems_write_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    put(tmp_path, "home/a.jpg", "in/b b.jpg", "in/c.jpg", "in/d\\d.jpg")
    cells = ("~/a.jpg", f"file://{tmp_path}/in/b%20b.jpg", "in\\c.jpg", "in/d\\d.jpg", "in\\gone.jpg", "~/gone.jpg")
    (tmp_path / "list.csv").write_text("\n".join(["file_name,text", *(f"{cell},text" for cell in cells)]))
    samples = list(found(tmp_path / "list.csv").values())
    assert [image for _, image, _ in samples] == [b"home/a.jpg", b"in/b b.jpg", b"in/c.jpg", b"in/d\\d.jpg", None, None]
    assert [reject for reject, _, _ in samples[4:]] == ["missing_image_file"] * 2
    put(tmp_path, "C:/x/a.jpg")
    (tmp_path / "list.csv").write_text("file_name,text\nC:\\x\\a.jpg,a\nC:\\x\\in\\b.jpg,b\n")
    assert list(found(tmp_path / "list.csv")) == ["a", "in/b"]
    (tmp_path / "list.csv").write_text("file_name,text\n~/a.jpg,a\nhttps://host/b.jpg,b\n")
    with pytest.raises(UserError, match=r"has addresses, such as https://host/b\.jpg"):
        describe_shards([str(tmp_path / "list.csv")])


@pytest.mark.parametrize("column", ["key", "id", "file_name"])
def test_a_table_without_its_images_is_refused_with_where_captions_go(tmp_path, column) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"{column},caption\n0.jpg,a dog\n1.jpg,a cat\n")
    with pytest.raises(UserError) as error:
        describe_shards([str(path)])
    said = str(error.value)
    assert f"captioning.engine=given captioning.table={path}" in said
    assert f"make stats SETS='mine={path}#caption'" in said
    if column != "id":
        assert (
            f"none of the 2 files that column '{column}' names is there: '0.jpg' was looked for at {path.parent}"
            in said
        )


def test_rejects_that_names_tell_of_are_said_before_any_sample_is_read(tmp_path, monkeypatch) -> None:
    put(tmp_path / "set", "0.jpg")
    (tmp_path / "set" / "empty.tar").write_bytes(bytes(10_240))
    (tmp_path / "set" / "list.csv").write_text("file_name\n0.jpg\n3.jpg\n4.jpg\n")
    paths = [str(tmp_path / "set" / name) for name in ("list.csv", "empty.tar")]
    paths.append(str(put(tmp_path / "images", "2.jpg", "2.png", "3.jpg")))
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("atelier.shards"), "warning", said.append)
    for run in (None, tmp_path / "run", tmp_path / "run"):  # the last remembers
        said.clear()
        describe_shards(paths, run=run)
        assert said == [
            f"1 of 3 shards have no samples: {paths[1]}",
            "3 of 5 samples will be rejects, as is known before any is read: 2 missing_image_file ('3.jpg' was looked "
            f"for at {tmp_path}/set/3.jpg in {paths[0]}); 1 several_images (2 in {tmp_path}/images)",
        ]


def test_columns_inside_of_columns_name_files_and_hold_no_images(tmp_path) -> None:
    put(tmp_path, "in/a.jpg")
    paths = pa.table({"row": [{"file": "in/a.jpg"}], "caption": ["a dog"]})
    pq.write_table(paths, tmp_path / "paths.parquet")
    with open_shard(str(tmp_path / "paths.parquet"), Reading(image_column="row.file")) as raw:
        assert [(sample.key, raw.image_bytes(sample)) for sample in raw.samples] == [("a", b"in/a.jpg")]
    pq.write_table(pa.table({"row": [{"image": b"image"}], "caption": ["a dog"]}), tmp_path / "bytes.parquet")
    with pytest.raises(
        UserError, match=r"'row\.image' has images inside of a column: write them as a column of its own"
    ):
        describe_shards([str(tmp_path / "bytes.parquet")], Reading(image_column="row.image"))


def test_addresses_of_files_and_objects_by_path_have_the_keys_of_plain_paths(tmp_path) -> None:
    put(tmp_path, "in/a b.jpg", "in/c.jpg")
    (tmp_path / "plain.csv").write_text("path,text\nin/a b.jpg,a\nin/c.jpg,c\n")
    rows = "".join(f"file://{tmp_path}/in/{name},text\n" for name in ("a%20b.jpg", "c.jpg"))
    (tmp_path / "address.csv").write_text(f"path,text\n{rows}")
    (tmp_path / "object.json").write_text('{"in/a b.jpg": "a", "in/c.jpg": "c"}')
    assert [list(found(tmp_path / name)) for name in ("plain.csv", "address.csv", "object.json")] == [["a b", "c"]] * 3


def test_metadata_name_images_of_their_folder_by_whole_paths_too(tmp_path) -> None:
    folder = put(tmp_path / "photos", "a.jpg", "in/b b.jpg", "c.jpg")
    rows = [f"{folder}/a.jpg,a", f"file://{folder}/in/b%20b.jpg,b", "/elsewhere/d.jpg,d"]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    rejects = {key: (reject, text) for key, (reject, _, text) in found(folder).items()}
    assert [rejects[key] for key in ("a", "in/b b")] == [(None, "a"), (None, "b")]
    assert sorted(reject for reject, _ in rejects.values() if reject) == ["missing_image_file", "not_in_metadata"]


def test_images_of_one_name_with_texts_of_their_own_are_samples_each(tmp_path) -> None:
    folder = put(
        tmp_path / "photos", "e.jpg", "e.jpg.txt", "e.png", "e.png.TXT", "f.jpg", "f.jpg.txt", "g.jpg", "g.png"
    )
    assert found(folder) == {
        "e.jpg": (None, b"e.jpg", "e.jpg.txt"),
        "e.png": (None, b"e.png", "e.png.TXT"),
        "f": (None, b"f.jpg", "f.jpg.txt"),
        "g": ("several_images", None, None),
    }


IMAGE_ROWS, CAPTION_ROWS = {"image": [b"image"]}, {"key": ["a"], "caption": ["a dog"]}
# Files of a folder, which of them are read, and what is said of the others.
BESIDE = {
    "tars below": (("a.tar", "sub/b.tar"), ["a.tar"], "1 tars, which are read, and beside them 1 tars (sub/b.tar)"),
    "rows by tars": (
        *(("a.tar", "d.parquet", "sub/e.parquet"), ["a.tar"]),
        "1 tars, which are read, and beside them 2 Parquet or Arrow files (d.parquet, ...)",
    ),
    "rows below": (
        *(("d.parquet", "data/e.parquet", "sub/b.tar", ".x/f.parquet"), ["d.parquet"]),
        "1 Parquet or Arrow files, which are read, and beside them 1 tars (sub/b.tar) and 1 Parquet or Arrow files "
        "(data/e.parquet)",
    ),
    "images by rows": (
        *(("photos/x.jpg", "photos/y.jpg", "a/d.parquet", "a/z/more.jpg"), ["a/d.parquet"]),
        "1 Parquet or Arrow files, which are read, and beside them 3 images (a/z/more.jpg, ...)",
    ),
    "captions by rows": (
        *(("a_captions.parquet", "b.parquet", "run/captions/c_captions.parquet"), ["b.parquet"]),
        "1 Parquet or Arrow files, which are read, and beside them 1 Parquet or Arrow files (a_captions.parquet)",
    ),
    "rows by images": (
        *(("a/x.jpg", "a/y.jpg", "b/d.parquet", "b/t.tar"), ["."]),
        "2 images, which are read, and beside them 1 tars (b/t.tar) and 1 Parquet or Arrow files (b/d.parquet)",
    ),
    "all is read": (("train/d.parquet", "test/e.parquet"), ["test/e.parquet", "train/d.parquet"], ""),
    "images alone": (("x.jpg", "a/y.jpg", "metadata.parquet", "captions.parquet"), ["."], ""),
    "a table of images": (("images/x.jpg", "captions.parquet"), ["captions.parquet"], ""),
}


@pytest.mark.parametrize("layout", BESIDE)
def test_what_is_left_out_beside_shards_is_said(tmp_path, layout, caplog, monkeypatch) -> None:
    names, expected, said = BESIDE[layout]
    put(tmp_path / "set", *names)
    for name in names:
        if name.endswith(".parquet"):
            pq.write_table(pa.table(CAPTION_ROWS if "captions" in name else IMAGE_ROWS), tmp_path / "set" / name)
    monkeypatch.setattr(logging.getLogger("atelier"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        found = expand_shards(str(tmp_path / "set"))
    assert sorted(str(Path(path).relative_to(tmp_path / "set")) for path in found) == expected
    warnings = {record.getMessage() for record in caplog.records}
    assert len(warnings) == bool(said)
    assert all(f"{said}, which are not; name them" in warning for warning in warnings)


def test_a_table_beside_images_without_texts_is_named(tmp_path, caplog, monkeypatch) -> None:
    folder = put(tmp_path / "set", "images/0.jpg", "images/1.jpg", "README.md", "captions.csv")
    monkeypatch.setattr(logging.getLogger("atelier"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        describe_shards([str(folder)])
        said = f"SHARDS={folder}/captions.csv; if it has captions by their keys or names, captioning.table={folder}"
        assert said in caplog.text
        caplog.clear()
        put(folder, "images/0.txt")
        describe_shards([str(folder)])
        assert "captions.csv" in caplog.text and "SHARDS=" not in caplog.text


def test_images_as_text_and_lists_of_images_are_one_error(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": ["A" * 5000, "B" * 5000], "text": ["a", "b"]}), path)
    with pytest.raises(
        UserError, match=r"a\.parquet: column 'image' is text, and too long for paths, as images in base64"
    ):
        describe_shards([str(path)])
    pq.write_table(pa.table({"images": [[{"bytes": b"a", "path": None}]], "text": ["a"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: column 'images' has lists of images \(list<.*bytes: binary"):
        describe_shards([str(path)])


def test_what_parts_the_columns_is_said_once(tmp_path, monkeypatch) -> None:
    folder = put(tmp_path / "set", "a.jpg")
    (folder / "metadata.csv").write_text("file_name;text\na.jpg;a, or b\n")
    messages: list[str] = []
    monkeypatch.setattr(logging.getLogger("atelier.tables"), "info", messages.append)
    assert found(folder) == {"a": (None, b"a.jpg", "a, or b")}
    assert messages == [f"{folder}/metadata.csv: its columns are parted by semicolons"]
