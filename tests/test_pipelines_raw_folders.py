"""A folder loses no image and makes up no row: files of one name, metadata of odd names, data beside data."""

from pathlib import Path

from pipelines.raw.shards import open_shard


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
