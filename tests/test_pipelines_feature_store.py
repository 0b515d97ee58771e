import gc
import itertools
import string
import tarfile
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from errors import UserError
from pipelines.store.families import LATENT_SCHEMA, TEXT_SCHEMA, latent_directory, text_directory
from pipelines.store.feature_store import (
    FeatureTarWriter,
    escape_key,
    join_shards,
    load_index,
    read_payload,
    serialize_tensors,
    unescape_key,
    write_index,
    write_tensors,
)


def read_with_webdataset(path):
    with warnings.catch_warnings():
        # webdataset leaves closing its files to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        gc.collect()
    return samples


def latent_tensors(index: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(index)
    shape = (4, 8, 4 + 4 * (index % 3))
    return {name: generator.standard_normal(shape).astype(np.float16) for name in ("mean", "std")}


def write_part(folder, indices: range):
    """Write samples `indices` as one part; every fifth is a reject without a payload."""
    folder.mkdir(parents=True)
    rows = []
    with FeatureTarWriter(folder / "s.tar") as tar:
        for index in indices:
            key = f"{index:05d}"
            if index % 5 == 4:
                rows.append({"key": key, "shard": "s", "reject": "corrupt_image"})
                continue
            tensors = latent_tensors(index)
            offsets = tar.add(key, tensors)
            _, height, width = tensors["mean"].shape
            rows.append(
                {
                    "key": key,
                    "shard": "s",
                    "mean_offset": offsets["mean"],
                    "std_offset": offsets["std"],
                    "nbytes": tensors["mean"].nbytes,
                    "channels": 4,
                    "height": height,
                    "width": width,
                }
            )
    write_index(folder / "s.parquet", rows, LATENT_SCHEMA)
    return {".tar": folder / "s.tar", ".parquet": folder / "s.parquet"}


@pytest.mark.parametrize("cuts", [[0, 23], [0, 1, 23], [0, 4, 5, 9, 23], [0, 23, 23]])
def test_joined_parts_are_byte_equal_to_a_shard_written_in_one_go(tmp_path, cuts):
    whole = write_part(tmp_path / "whole", range(23))
    parts = [
        write_part(tmp_path / f"part{start}-{stop}", range(start, stop)) for start, stop in itertools.pairwise(cuts)
    ]
    outputs = {suffix: tmp_path / f"joined{suffix}" for suffix in whole}
    join_shards(parts, outputs)
    for suffix in whole:
        assert outputs[suffix].read_bytes() == whole[suffix].read_bytes(), suffix


def test_index_offsets_give_the_tensors_that_safetensors_reads(tmp_path):
    write_part(tmp_path / "features", range(23))
    index = load_index(tmp_path / "features", ["s"])
    tar = np.memmap(tmp_path / "features" / "s.tar", np.uint8, mode="r")
    with tarfile.open(tmp_path / "features" / "s.tar") as archive:
        names = archive.getnames()
        kept = [row for row in index.to_pylist() if row["reject"] is None]
        assert names == [f"{row['key']}.safetensors" for row in kept]
        assert len(kept) == 19
        for row in kept:
            loaded = safetensors.numpy.load(archive.extractfile(f"{row['key']}.safetensors").read())
            shape = (row["channels"], row["height"], row["width"])
            for name in ("mean", "std"):
                payload = read_payload(tar, row[f"{name}_offset"], dtype="float16", shape=shape)
                assert payload.nbytes == row["nbytes"]
                assert row[f"{name}_offset"] % 64 == 0
                np.testing.assert_array_equal(payload, loaded[name])
                np.testing.assert_array_equal(payload, latent_tensors(int(row["key"]))[name])
    rejected = [row for row in index.to_pylist() if row["reject"] is not None]
    assert {row["mean_offset"] for row in rejected} == {None}


def test_plain_webdataset_reads_bfloat16_text(tmp_path):
    values = {f"sa_{index}": torch.randn(3 + index, 6).to(torch.bfloat16) for index in range(4)}
    with FeatureTarWriter(tmp_path / "text.tar") as tar:
        for key, tensor in values.items():
            tar.add(key, {"embedding_0": tensor.view(torch.uint16).numpy()})
    samples = read_with_webdataset(tmp_path / "text.tar")
    assert [sample["__key__"] for sample in samples] == list(values)
    for sample in samples:
        loaded = safetensors.torch.load(sample["safetensors"])["embedding_0"]
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded, values[sample["__key__"]])


def test_headers_do_not_depend_on_clock_user_or_umask(tmp_path):
    with FeatureTarWriter(tmp_path / "a.tar") as tar:
        tar.add("key", latent_tensors(0))
    with tarfile.open(tmp_path / "a.tar") as archive:
        (member,) = archive.getmembers()
    assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
    assert member.mode == 0o644


def test_a_tar_left_by_an_exception_has_no_end(tmp_path):
    def write() -> None:
        with FeatureTarWriter(tmp_path / "a.tar") as tar:
            tar.add("key", latent_tensors(0))
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        write()
    assert not (tmp_path / "a.tar").read_bytes().endswith(bytes(1024))


@given(st.text(min_size=1))
def test_escaped_keys_are_safe_and_reversible(key):
    if any("\ud800" <= character <= "\udfff" for character in key):
        return
    escaped = escape_key(key)
    assert set(escaped) <= set(string.ascii_letters + string.digits + "_-%")
    assert unescape_key(escaped) == key


@pytest.mark.parametrize(
    "key", ["photo.v2", "n01/n01_7", "Grüße", "~", "x" * 150, b"\xff\xfe".decode(errors="surrogateescape")]
)
def test_odd_keys_survive_webdataset(tmp_path, key):
    with FeatureTarWriter(tmp_path / "odd.tar") as tar:
        tar.add(key, latent_tensors(0))
    (sample,) = read_with_webdataset(tmp_path / "odd.tar")
    assert unescape_key(sample["__key__"]) == key
    assert set(sample) >= {"safetensors"}


def test_ordinary_keys_are_not_changed():
    assert escape_key("sa_000123-A") == "sa_000123-A"


def test_wrong_dtype_is_refused():
    with pytest.raises(TypeError, match="float64"):
        serialize_tensors({"mean": np.zeros(3)})


def test_write_tensors_is_plain_safetensors(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(tmp_path / "null.safetensors", {"embedding_0": array, "empty": np.zeros((0, 4), np.float16)})
    loaded = safetensors.numpy.load_file(tmp_path / "null.safetensors")
    np.testing.assert_array_equal(loaded["embedding_0"], array)
    assert loaded["empty"].shape == (0, 4)


def test_load_index_joins_shards_in_order_and_names_what_is_missing(tmp_path):
    for name in ("b", "a"):
        write_index(tmp_path / f"{name}.parquet", [{"key": name, "shard": name}], TEXT_SCHEMA)
    assert load_index(tmp_path, ["b", "a"]).column("key").to_pylist() == ["b", "a"]
    assert load_index(tmp_path, ["a"], columns=["weight", "key"]).column_names == ["weight", "key"]
    with pytest.raises(FileNotFoundError, match="shard c"):
        load_index(tmp_path, ["a", "c"])
    with pytest.raises(UserError, match=r"a\.parquet.*mean_offset"):
        load_index(tmp_path, ["a"], columns=["mean_offset"])


def test_all_rejected_shard_is_an_empty_tar_with_an_index(tmp_path):
    part = write_part(tmp_path / "empty", range(4, 5))
    with tarfile.open(part[".tar"]) as archive:
        assert archive.getmembers() == []
    assert pq.read_table(part[".parquet"]).num_rows == 1
    assert part[".tar"].stat().st_size == 1024


def test_directories_of_a_run(tmp_path):
    assert text_directory(tmp_path) == tmp_path / "features" / "text"
    assert text_directory(tmp_path, ["alt_text"]) == tmp_path / "features" / "text-alt_text"
    assert text_directory(tmp_path, ["caption", "alt_text"]) == tmp_path / "features" / "text-caption+alt_text"
    assert latent_directory(tmp_path, 64) == tmp_path / "features" / "latent-64"
