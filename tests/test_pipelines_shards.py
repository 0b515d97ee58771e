import io
import logging
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest

import pipelines.raw.kinds.tar_shards
import pipelines.raw.shard_headers
import pipelines.raw.summaries
from errors import MissingFileError, UserError
from pipelines.raw.images import SampleReject
from pipelines.raw.patterns import expand_braces, expand_shards, select_shards
from pipelines.raw.reading import Reading
from pipelines.raw.shard_headers import RecentHeaders
from pipelines.raw.shards import describe_shards, open_shard, shard_source


def write_tar(path, members: list[tuple[str, bytes]], *, tar_format: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def test_members_are_grouped_in_any_order(tmp_path) -> None:
    path = write_tar(
        tmp_path / "sa_000001.tar",
        [("./sa_2.json", b"{}"), ("./sa_1.jpg", b"one"), ("./sa_2.jpg", b"two"), ("./sa_1.json", b"{}")],
    )
    with open_shard(path) as raw:
        assert {sample.key: raw.image_bytes(sample) for sample in raw.samples} == {"sa_1": b"one", "sa_2": b"two"}
        assert all(raw.alt_text(sample) is None for sample in raw.samples)


def test_dialects_text_and_labels(tmp_path) -> None:
    laion = write_tar(
        tmp_path / "laion_0.tar",
        [("000.jpg", b"i"), ("000.txt", "Grüße \U0001f600".encode()), ("000.json", b'{"caption": "x"}')],
    )
    imagenet = write_tar(tmp_path / "imagenet_0.tar", [("n01.JPEG", b"i"), ("n01.cls", b"17\n"), ("n02.png", b"j")])
    with open_shard(laion) as raw:
        assert raw.alt_text(raw.samples[0]) == "Grüße \U0001f600"
    with open_shard(imagenet, Reading(dialect="imagenet")) as raw:
        assert [raw.label(sample) for sample in raw.samples] == [17, None]


def test_a_class_that_no_index_can_hold_is_none(tmp_path) -> None:
    classes = ["2147483647", "2147483648", "99999999999", "9" * 5000, "000000000000017", "-1", ""]
    members = [(f"{i}.{extension}", data) for i, text in enumerate(classes) for extension, data in
               (("jpg", b"i"), ("cls", text.encode()))]  # fmt: skip
    with open_shard(write_tar(tmp_path / "imagenet_0.tar", members), Reading(dialect="imagenet")) as raw:
        assert [raw.label(sample) for sample in raw.samples] == [2**31 - 1, None, None, None, 17, None, None]


def test_alt_text_in_json_can_be_written_or_is_refused(tmp_path) -> None:
    records = [b'{"caption": "a cat \\ud83d"}', b'{"caption": "\\ud83d\\ude00"}', b"[" * 100_000]
    members = [(f"{i}.{extension}", data) for i, record in enumerate(records) for extension, data in
               (("jpg", b"i"), ("json", record))]  # fmt: skip
    with open_shard(write_tar(tmp_path / "laion_0.tar", members), Reading(dialect="img2dataset")) as raw:
        assert [raw.alt_text(sample) for sample in raw.samples] == [None, "\U0001f600", None]
        with pytest.raises(SampleReject, match=r"not_utf8: .* surrogates not allowed"):
            raw.text(raw.samples[0])
        with pytest.raises(SampleReject, match="corrupt_alt_text: maximum recursion depth"):
            raw.text(raw.samples[2])


def test_faulty_keys_are_named_not_guessed(tmp_path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [("a.jpg", b"1"), ("a.jpg", b"2"), ("b.json", b"{}"), ("c.jpg", b"1"), ("c.png", b"1"), ("d.seg.png", b"1")],
    )
    with open_shard(path) as raw:
        rejects = {sample.key: sample.reject for sample in raw.samples}
    assert rejects == {"a": "duplicate_member", "b": "no_image", "c": "several_images", "d": "dotted_name"}


def test_unsafe_members_are_not_samples(tmp_path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("evil.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name in ("../up.jpg", "/abs.jpg", "ok.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    with open_shard(str(path)) as raw:
        assert [sample.key for sample in raw.samples] == ["ok"]
        assert raw.unusable == ["evil.jpg", "../up.jpg", "/abs.jpg"]


def test_a_cut_tar_keeps_what_is_whole(tmp_path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{i}.jpg", bytes([i]) * 3000) for i in range(4)])
    path.write_bytes(path.read_bytes()[: 3 * 3584 + 512 + 1000])
    with open_shard(str(path)) as raw:
        assert [(sample.key, sample.reject) for sample in raw.samples] == [
            ("0", None),
            ("1", None),
            ("2", None),
            ("3", "cut_off"),
        ]
    path.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(UserError, match=r"x\.tar is not a readable tar"), open_shard(str(path)):
        pass


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"PK\x03\x04", "it is a ZIP file (as .xlsx and .npz are): unpack it and name the folder"),
        (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive"),
        (b"BZh91AY", "it is compressed by bzip2; uncompress it"),
        (b"\xfd7zXZ\x00", "it is compressed by xz"),
        (b"\x28\xb5\x2f\xfd", "it is compressed by zstd"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of git-lfs"),
        (b"<!DOCTYPE html>", "it is a web page"),
        (b'{"key": "1"}\n', "it begins as JSON does: a table is known by its name"),
    ],
)
@pytest.mark.parametrize("num_bytes", [120, 2000])
def test_another_file_that_is_named_tar_is_called_what_it_is(tmp_path, head, words, num_bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(head + b"a" * num_bytes)
    with pytest.raises(UserError, match=re.escape(f"{path} is not a readable tar: {words}")), open_shard(str(path)):
        pass


def test_identity_follows_content_not_time_of_copy(tmp_path) -> None:
    members = [("a.jpg", b"x" * 2000), ("b.jpg", b"y" * 2000)]
    first = shard_source(write_tar(tmp_path / "x.tar", members))
    again = shard_source(write_tar(tmp_path / "x.tar", members))
    other = shard_source(write_tar(tmp_path / "x.tar", [members[0], ("b.jpg", b"y" * 1999 + b"z")]))
    assert first == again
    assert (first.num_samples, first.name) == (2, "x")
    assert other.identity != first.identity


def test_braces_globs_folders_and_lists(tmp_path) -> None:
    assert expand_braces("a_{08..11}.tar") == ["a_08.tar", "a_09.tar", "a_10.tar", "a_11.tar"]
    assert expand_braces("a_{2..0}.tar") == ["a_0.tar", "a_1.tar", "a_2.tar"], "none is lost of a range that falls"
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    for name in ("a_0", "a_1", "b_0"):
        write_tar(tmp_path / f"{name}.tar", [])
    for spec in (f"{tmp_path}/a_{{0..1}}.tar,{tmp_path}/b_0.tar", f"{tmp_path}/*.tar", [str(tmp_path)]):
        assert [path.rsplit("/", 1)[1] for path in expand_shards(spec)] == ["a_0.tar", "a_1.tar", "b_0.tar"]
    paths = expand_shards(str(tmp_path))
    assert [path.rsplit("/", 1)[1] for path in select_shards(paths, ["a_*"], key="features.stage2.shards")] == [
        "a_0.tar",
        "a_1.tar",
    ]
    with pytest.raises(UserError, match=r"features.stage2.shards: pattern 'c_\*' matches none"):
        select_shards(paths, ["c_*"], key="features.stage2.shards")


def test_local_addresses_and_streams(tmp_path, monkeypatch) -> None:
    path = write_tar(tmp_path / "a.tar", [])
    assert expand_shards(f"file://{path}") == expand_shards(f"file://{tmp_path}/*.tar") == [path]
    monkeypatch.chdir(tmp_path)
    assert expand_shards("*.tar") == expand_shards("a.tar") == ["a.tar"]
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match=r"pipe\.tar is a stream; it is read by place"):
        describe_shards(expand_shards(str(tmp_path / "*.tar")))
    with pytest.raises(UserError, match=r"pipe\.tar is a stream; members are read by their place"):
        expand_shards(str(tmp_path / "pipe.tar"))


def test_missing_shards_and_equal_names_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no shard matches .*gone_2\.tar"):
        expand_shards(f"{tmp_path}/gone_{{2..3}}.tar")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "a.tar", [])
    with pytest.raises(UserError, match="have the same name 'a'"):
        expand_shards([str(tmp_path / "one"), str(tmp_path / "two")])


def test_dots_in_names_belong_to_the_key_only_where_the_standard_finds_no_image(tmp_path) -> None:
    """webdataset's key ends at the first dot. Where that finds no image at all, the last dot is tried."""
    names = ["v1.photo.jpg", "v1.photo.txt", "v2.photo.jpg", "v2.photo.txt", "www.site.com_a.png"]
    with open_shard(write_tar(tmp_path / "dotted.tar", [(name, b"x") for name in names])) as raw:
        assert {
            sample.key: (sample.image_extension, list(sample.members), sample.reject) for sample in raw.samples
        } == {
            "v1.photo": ("jpg", ["jpg", "txt"], None),
            "v2.photo": ("jpg", ["jpg", "txt"], None),
            "www.site.com_a": ("png", ["png"], None),
        }
    # Beside ordinary samples, nothing is guessed: a mask is not taken for a picture.
    names = ["a.jpg", "a.seg.png", "b.seg.png", "c.v2.jpg", "c.v3.jpg", "d.seg.npy"]
    with open_shard(write_tar(tmp_path / "mixed.tar", [(name, b"x") for name in names])) as raw:
        rejects = {sample.key: sample.reject for sample in raw.samples}
    assert rejects == {"a": None, "b": "dotted_name", "c": "dotted_name", "d": "no_image"}


def test_names_that_are_odd_but_usable(tmp_path) -> None:
    names = [
        "A.JPG",
        "\u5bcc\u58eb.Jpeg",
        "in/a.folder.v1/b.jpg",
        "in/a.folder.v1/b.txt",
        ".hidden.jpg",
        "no_extension",
    ]
    with open_shard(write_tar(tmp_path / "x.tar", [(name, b"x") for name in names])) as raw:
        samples = {sample.key: (sample.image_extension, sample.reject) for sample in raw.samples}
    assert samples == {
        "A": ("jpg", None),
        "\u5bcc\u58eb": ("jpeg", None),
        "in/a.folder.v1/b": ("jpg", None),
        "no_extension": (None, "no_image"),
    }


def test_paths_that_exist_are_no_patterns(tmp_path, monkeypatch) -> None:
    places = ["[2024] set", "a,b", "{x,y}", "what?", "s p"]
    for number, place in enumerate(places):
        (tmp_path / place).mkdir()
        write_tar(tmp_path / place / f"{number}.tar", [])
    for number, place in enumerate(places):
        tar = str(tmp_path / place / f"{number}.tar")
        for spec in (tar, f"{tmp_path}/{place}", f"{tmp_path}/{place}/", f"{tmp_path}/{place}/*.tar",
                     f"{tmp_path}/{place}/{{{number}..{number}}}.tar"):  # fmt: skip
            assert expand_shards(spec) == [tar], spec
    both = [str(tmp_path / place / f"{number}.tar") for number, place in enumerate(places)]
    assert expand_shards(", ".join(both)) == both
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_shards("~/a,b/1.tar,~/s p") == [both[1], both[4]]


def count_headers(monkeypatch) -> list[str]:
    """Note every walk over a tar's headers."""
    walks: list[str] = []
    walk = pipelines.raw.kinds.tar_shards.read_tar

    def counted(file):
        walks.append("walk")
        return walk(file)

    monkeypatch.setattr(pipelines.raw.kinds.tar_shards, "read_tar", counted)
    monkeypatch.setattr(pipelines.raw.summaries, "FEW_SAMPLES", 0)
    return walks


def test_headers_are_read_once_and_again_when_the_tar_changes(tmp_path, monkeypatch) -> None:
    walks = count_headers(monkeypatch)
    members = [
        ("sa_1.jpg", b"x" * 700),
        ("sa_1.json", b"{}"),
        ("../up.jpg", b""),
        ("sa_2.json", b"{}"),
        ("a.b.jpg", b""),
    ]
    paths = [write_tar(tmp_path / f"{number}.tar", [*members, (f"{number}.jpg", b"y")]) for number in range(5)]
    run = tmp_path / "run"
    first = describe_shards(paths, run=run)
    assert len(walks) == 5
    assert describe_shards(paths, run=run) == first == describe_shards(paths)
    assert len(walks) == 10  # the five without a run
    with open_shard(paths[3], run=run, identity=first[3].source.identity) as known, open_shard(paths[3]) as read:
        assert len(walks) == 11
        assert (known.samples, known.unusable, known.strays) == (read.samples, read.unusable, read.strays)
        assert (known.identity, known.fault, read.unusable) == (read.identity, None, ["../up.jpg"])
    monkeypatch.chdir(tmp_path)
    assert [shard.source.identity for shard in describe_shards(["1.tar", f"file://{paths[2]}"], run=run)] == [
        shard.source.identity for shard in first[1:3]
    ]
    assert len(walks) == 11
    # The same size and time of modification: the inode's own time tells.
    times = Path(paths[3]).stat()
    write_tar(tmp_path / "3.tar", [*members, ("3.jpg", b"z")])
    os.utime(paths[3], ns=(times.st_atime_ns, times.st_mtime_ns))
    walks.clear()
    again = describe_shards(paths, run=run)
    assert len(walks) == 1 and [a == b for a, b in zip(first, again, strict=True)] == [True, True, True, False, True]
    with (
        pytest.raises(UserError, match=r"3\.tar has changed since this command began"),
        open_shard(paths[3], run=run, identity=first[3].source.identity),
    ):
        pass
    # What is remembered is a copy: without it, or with one of another version, the tar is read.
    for file in (run / ".headers").iterdir():
        file.write_bytes(b'{"format": 0, "stamp": "old"}\n')
    assert describe_shards(paths, run=run) == again
    shutil.rmtree(run / ".headers")
    assert describe_shards(paths, run=run) == again


def test_many_shards_are_read_by_several_processes(tmp_path, monkeypatch) -> None:
    paths = [write_tar(tmp_path / f"{number:02d}.tar", [(f"{number}.jpg", b"x" * number)]) for number in range(12)]
    expected = describe_shards(paths)
    walks = count_headers(monkeypatch)
    monkeypatch.setattr(pipelines.raw.summaries, "MIN_SHARDS_PER_PROCESS", 4)
    monkeypatch.setattr(pipelines.raw.summaries, "SHARDS_PER_TASK", 3)
    monkeypatch.setattr(pipelines.raw.summaries, "MIN_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert describe_shards(paths, run=tmp_path / "run") == expected and not walks
    Path(paths[5]).write_bytes(b"<html>" * 200)
    Path(paths[0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"00\.tar"):
        describe_shards(paths)
    with pytest.raises(UserError, match=r"05\.tar is not a readable tar"):
        describe_shards(paths[1:])


def test_the_recipe_decides_which_texts_count_of_remembered_headers_too(tmp_path) -> None:
    members = [("a.jpg", b"x"), ("a.txt", b"t"), ("b.jpg", b"x"), ("b.json", b'{"caption": "c"}')]
    path = write_tar(tmp_path / "x.tar", members)
    for dialect, expected in (
        ("auto", ["t", "c"]),
        ("generic", ["t", None]),
        ("sa1b", [None, None]),
        ("auto", ["t", "c"]),
    ):
        (described,) = describe_shards([path], Reading(dialect=dialect), run=tmp_path)
        assert described.num_texts == (0 if dialect == "sa1b" else 2)
        with open_shard(path, Reading(dialect=dialect), run=tmp_path) as raw:
            assert [raw.alt_text(sample) for sample in raw.samples] == expected


def test_faulty_tars_are_all_named_at_once_and_damaged_ones_are_logged(tmp_path, caplog, monkeypatch) -> None:
    paths = []
    for number in range(7):
        paths.append(tmp_path / f"bad_{number}.tar")
        paths[-1].write_bytes(b"<html>" * 200)
    with pytest.raises(UserError, match=r"bad_0\.tar is not a readable tar: [\s\S]*bad_4[\s\S]*and 2 more"):
        describe_shards([str(path) for path in paths])
    cut = tmp_path / "cut.tar"
    write_tar(cut, [("a.jpg", b"x" * 512), ("b.jpg", b"y" * 512)])
    cut.write_bytes(cut.read_bytes()[:2048])
    monkeypatch.setattr(logging.getLogger("atelier"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert describe_shards([str(cut)])[0].source.num_samples == 2
    assert "cut.tar: cut off: 2,048 bytes, and no end-of-archive mark" in caplog.text


def test_a_tar_that_shrinks_while_it_is_read_is_an_error_not_a_broken_image(tmp_path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 100_000)])
    with open_shard(path) as raw:
        os.truncate(path, 2000)
        with pytest.raises(OSError, match=r"x\.tar: ends at byte 2,000; it has changed"):
            raw.image_bytes(raw.samples[0])


def test_what_a_runs_folder_is_called_is_no_pattern(tmp_path) -> None:
    run = tmp_path / "a, [b]{c,d}*"
    run.mkdir()
    (run / "[x]_0.tar").touch()
    for spec in ("{run}/*.tar", "{run}", "{run}/[x]_{0,0}.tar", ["{run}/[x]_0.tar"], "{run}/?x?_0.tar"):
        assert expand_shards(spec, run=run) == [str(run / "[x]_0.tar")]
    with pytest.raises(MissingFileError, match=re.escape(f"no shard matches {run}/y_*.tar")):
        expand_shards("{run}/y_*.tar", run=run)


def test_a_small_tar_is_read_as_it_was_when_it_was_opened_and_known_to_have_changed_after(tmp_path) -> None:
    """A small tar is read in one go, and its headers are not read twice by a command, unless it changes in between."""
    run, path = tmp_path / "run", write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 5000), ("a.txt", b"t")])
    (described,) = describe_shards([path], run=run)
    with open_shard(path) as raw:
        os.truncate(path, 2000)
        assert (raw.image_bytes(raw.samples[0]), raw.text(raw.samples[0])) == (b"x" * 5000, "t")
    for size in (2000, 9000):
        write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * size), ("a.txt", b"u")])
        with (
            pytest.raises(UserError, match=r"x\.tar has changed since this command began"),
            open_shard(path, run=run, identity=described.source.identity),
        ):
            pass
    assert not (run / ".headers").exists()


def test_headers_of_small_tars_are_read_once_by_a_process_up_to_a_number(tmp_path, monkeypatch) -> None:
    walks = count_headers(monkeypatch)
    monkeypatch.setattr(pipelines.raw.summaries, "FEW_SAMPLES", 16)
    monkeypatch.setattr(pipelines.raw.summaries, "RECENT", RecentHeaders())
    monkeypatch.setattr(pipelines.raw.shard_headers, "MAX_RECENT_SAMPLES", 6)
    paths = [write_tar(tmp_path / f"{number}.tar", [(f"{number}.jpg", b"x" * number)]) for number in range(5)]
    described = describe_shards(paths, run=tmp_path / "run")
    assert len(walks) == 5
    for shard in described:
        with open_shard(shard.source.path, run=tmp_path / "run", identity=shard.source.identity) as raw:
            assert len(raw.samples) == 1
    assert len(walks) == 7, "three are remembered, two are not"
    with open_shard(paths[0]) as raw:
        assert len(walks) == 8, "without a run it is looked at anew"
