"""What belongs to no sample is a stray in tars and folders alike; what has lost its image is a reject."""

import logging

import pytest
from raw_shards import write_tar

from pipelines.raw.reading import Reading
from pipelines.raw.shards import describe_shards, open_shard

BESIDE = ["good.jpg", "good.txt"]


@pytest.fixture(params=["tar", "folder"])
def shard_of(request, tmp_path):
    def write(names: list[str]) -> str:
        if request.param == "tar":
            return str(write_tar(tmp_path / "set.tar", [(name, name.encode()) for name in names]))
        for name in names:
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(name.encode())
        return str(tmp_path / "set")

    return write


def samples_and_strays(path: str) -> tuple[dict[str, str | None], list[str]]:
    with open_shard(path) as raw:
        return {sample.key: sample.reject for sample in raw.samples}, sorted(raw.strays)


def test_files_of_systems_and_programs_are_strays_in_every_kind(shard_of) -> None:
    names = ["_SUCCESS", "_metadata", "part-0.crc", ".part-0.crc", "Icon\r", "ehthumbs.db", "Thumbs.db", "desktop.ini"]
    names += ["~$x.docx", "~$x.txt", ".~lock.x#", ".DS_Store", "._x", ".gitkeep", "GlobalHead.12", "film.mp4"]
    names += ["README.txt", "LICENSE", "notes.txt", "captions.txt", "in/classes.txt", "x.csv"]
    samples, strays = samples_and_strays(shard_of([*BESIDE, *names]))
    assert (samples, strays) == ({"good": None}, sorted(names))


def test_folders_of_systems_and_archivers_hold_no_samples(shard_of) -> None:
    names = ["PaxHeaders.12/x.jpg", "PaxHeader/x.jpg", "lost+found/x.jpg", "__MACOSX/x.jpg", ".git/x.jpg"]
    samples, strays = samples_and_strays(shard_of([*BESIDE, *names]))
    assert samples == {"good": None} and len(strays) == len(names)


def test_a_text_without_image_is_a_reject_beside_images_that_have_texts(shard_of) -> None:
    assert samples_and_strays(shard_of([*BESIDE, "lost.txt"])) == ({"good": None, "lost": "no_image"}, [])


def test_texts_in_another_folder_than_the_images_are_strays(shard_of, monkeypatch) -> None:
    path = shard_of(["images/1.jpg", "captions/1.txt", "captions/2.txt"])
    assert samples_and_strays(path) == ({"images/1": None}, ["captions/1.txt", "captions/2.txt"])
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("atelier.shards"), "warning", said.append)
    describe_shards([path])
    if not path.endswith(".tar"):
        assert f"captions/1.txt and its like are captions, type captioning.table={path}/captions" in said[-1]


def test_images_that_are_called_as_notes_are_samples(shard_of) -> None:
    names = ["index.jpg", "index.txt", "notes.jpg", "notes.txt", "license.png"]
    path = shard_of(names)
    assert samples_and_strays(path) == ({"index": None, "notes": None, "license": None}, [])
    with open_shard(path) as raw:
        texts = {sample.key: raw.text(sample) for sample in raw.samples}
    assert texts == {"index": "index.txt", "notes": "notes.txt", "license": None}


def test_a_text_under_a_word_of_the_users_is_of_its_image_and_said(shard_of, monkeypatch) -> None:
    path = shard_of(["x.jpg", "x.en.txt", "x.de.txt", "y.jpg", "y.en.txt"])
    assert samples_and_strays(path) == ({"x": None, "y": None}, [])
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("atelier.shards"), "warning", said.append)
    describe_shards([path])
    assert said == [
        "2 samples have a text called en.txt beside the image and none that is taken for the caption: "
        "data.text_column=en takes it"
    ]
    with open_shard(path, Reading(text_column="en")) as raw:
        assert [raw.text(sample) for sample in raw.samples] == ["x.en.txt", "y.en.txt"]
        describe_shards([path], Reading(text_column="en"))
        assert len(said) == 1
