import io
import tarfile

import pytest

from pipelines.shards import expand_braces, expand_shards, open_shard, select_shards, shard_source


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
        assert raw.dialect == "sa1b"
        assert {sample.key: raw.image_bytes(sample) for sample in raw.samples} == {"sa_1": b"one", "sa_2": b"two"}
        assert all(raw.alt_text(sample) is None for sample in raw.samples)


def test_dialects_text_and_labels(tmp_path) -> None:
    laion = write_tar(
        tmp_path / "laion_0.tar",
        [("000.jpg", b"i"), ("000.txt", "Grüße \U0001f600".encode()), ("000.json", b'{"caption": "x"}')],
    )
    imagenet = write_tar(tmp_path / "imagenet_0.tar", [("n01.JPEG", b"i"), ("n01.cls", b"17\n"), ("n02.png", b"j")])
    with open_shard(laion) as raw:
        assert raw.dialect == "img2dataset"
        assert raw.alt_text(raw.samples[0]) == "Grüße \U0001f600"
    with open_shard(imagenet, "imagenet") as raw:
        assert [raw.label(sample) for sample in raw.samples] == [17, None]


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
    with pytest.raises(ValueError, match=r"x\.tar is not a readable tar"), open_shard(str(path)):
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
    with pytest.raises(ValueError, match=r"features.stage2.shards: pattern 'c_\*' matches none"):
        select_shards(paths, ["c_*"], key="features.stage2.shards")


def test_missing_shards_and_equal_names_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no shard matches .*gone_2\.tar"):
        expand_shards(f"{tmp_path}/gone_{{2..3}}.tar")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "a.tar", [])
    with pytest.raises(ValueError, match="have the same name 'a'"):
        expand_shards([str(tmp_path / "one"), str(tmp_path / "two")])
