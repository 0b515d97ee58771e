import os
import stat
from pathlib import Path

import numpy as np
import pandas
import pytest
from safetensors.numpy import save_file

from encoders.weights import resolve_model
from errors import UserError
from pipelines.store.files import atomic_file
from pipelines.store.manifest import (
    Fingerprint,
    ShardDirectory,
    ShardReport,
    manifest_path,
    read_manifest,
    require_same_fingerprint,
)
from pipelines.store.summary import read_summary, update_summary

FINGERPRINT = Fingerprint.of({"resolution": 256, "model": {"id": "vae"}})


def report(name: str, **changes) -> ShardReport:
    values = {"name": name, "source": "s", "num_read": 3, "num_kept": 2, "rejected": {"corrupt_image": 1}, **changes}
    return ShardReport(**values)


def test_unbalanced_counts_cannot_be_reported() -> None:
    with pytest.raises(AssertionError, match="3 read, but 2 kept and 0 rejected"):
        report("a", rejected={})


def test_done_means_marker_fingerprint_source_and_files(tmp_path) -> None:
    directory = ShardDirectory(tmp_path)
    assert not directory.is_done("a", "s", FINGERPRINT)
    directory.file("a", ".parquet").write_bytes(b"x")
    directory.write_marker(report("a", files={".parquet": "0"}), FINGERPRINT)
    assert directory.is_done("a", "s", FINGERPRINT)
    assert not directory.is_done("a", "changed", FINGERPRINT)
    assert not directory.is_done("a", "s", Fingerprint.of({"resolution": 512, "model": {"id": "vae"}}))
    directory.file("a", ".parquet").unlink()
    assert not directory.is_done("a", "s", FINGERPRINT)


def test_manifest_sums_the_shards_and_survives_a_round_trip(tmp_path) -> None:
    directory = ShardDirectory(tmp_path)
    for name in ("a", "b"):
        directory.write_marker(report(name), FINGERPRINT)
    directory.write_marker(report("stale"), Fingerprint.of({"resolution": 1}))
    written = directory.write_manifest(FINGERPRINT, ["a"], upstream={"captions": "f00"}, extra={"max_tokens": 120})
    manifest = read_manifest(tmp_path)
    assert manifest == written
    assert (manifest.num_read, manifest.num_kept, manifest.rejected) == (6, 4, {"corrupt_image": 2})
    assert list(manifest.shards) == ["a", "b"]


def test_of_an_interrupted_run_only_what_it_wrote_under_its_last_settings_is_finished(tmp_path) -> None:
    directory, changed = ShardDirectory(tmp_path), Fingerprint.of({"resolution": 512})
    assert directory.finished() == []
    for name, fingerprint, written in (("a", FINGERPRINT, 1), ("b", changed, 2), ("c", FINGERPRINT, 3)):
        directory.write_marker(report(name), fingerprint)
        os.utime(tmp_path / ".done" / f"{name}.json", (written, written))
    assert directory.finished() == ["a", "c"]
    os.utime(tmp_path / ".done" / "b.json", (4, 4))
    assert directory.finished() == ["b"]


def test_equal_manifests_have_equal_bytes(tmp_path) -> None:
    contents = []
    for folder in ("one", "two"):
        directory = ShardDirectory(tmp_path / folder)
        for name in ("b", "a") if folder == "one" else ("a", "b"):
            directory.write_marker(report(name), FINGERPRINT)
        directory.write_manifest(FINGERPRINT, ["a", "b"], upstream={}, extra={})
        contents.append((tmp_path / folder / "manifest.json").read_bytes())
    assert contents[0] == contents[1]


def test_clearing_a_marker_takes_the_manifest_with_it(tmp_path) -> None:
    directory = ShardDirectory(tmp_path)
    directory.write_marker(report("a"), FINGERPRINT)
    directory.write_manifest(FINGERPRINT, ["a"], upstream={}, extra={})
    directory.clear_marker("a")
    with pytest.raises(FileNotFoundError, match="has not finished"):
        read_manifest(tmp_path)


def test_a_mismatch_names_the_field_and_both_values() -> None:
    other = Fingerprint.of({"resolution": 512, "model": {"id": "vae"}})
    with pytest.raises(UserError, match="features/latent: resolution is 512, but 256 is needed; set it back"):
        require_same_fingerprint(FINGERPRINT, other, where="features/latent", mend="set it back")


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk full")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_summary_keys_do_not_overwrite_each_other(tmp_path) -> None:
    update_summary(tmp_path, "seconds.captioning", 3.5)
    update_summary(tmp_path, "seconds.stats", 1)
    update_summary(tmp_path, "counts.captioning", {"read": 2})
    assert read_summary(tmp_path) == {"seconds": {"captioning": 3.5, "stats": 1}, "counts": {"captioning": {"read": 2}}}


def test_a_models_identity_is_its_content_or_its_revision(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    before = resolve_model(str(folder)).identity
    (folder / "config.json").write_text("{ }")
    assert resolve_model(str(folder)).identity != before
    assert resolve_model("google/flan-t5-xxl", "abc").identity == "google/flan-t5-xxl@abc"
    with pytest.raises(FileNotFoundError, match="no_such does not exist"):
        resolve_model(f"{tmp_path}/no_such")


def test_a_file_has_the_rights_that_the_umask_gives_whoever_writes_it(tmp_path: Path) -> None:
    """safetensors, as `tempfile`, puts one in the place that its owner alone may read."""
    former = os.umask(0o002)
    try:
        with atomic_file(tmp_path / "new" / "a") as temporary:
            save_file({"a": np.zeros(1)}, temporary)
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "new" / "a").stat().st_mode) == 0o664
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o775


def test_a_folder_of_captions_is_one_table_for_pandas(tmp_path: Path) -> None:
    captions = ShardDirectory(tmp_path / "captions")
    captions.path.mkdir()
    for name in ("a", "b"):
        pandas.DataFrame({"key": [name], "caption": ["a dog"]}).to_parquet(captions.file(name, ".parquet"))
        captions.write_marker(report(name), FINGERPRINT)
    written = captions.write_manifest(FINGERPRINT, ["a", "b"], upstream={}, extra={})
    assert list(pandas.read_parquet(captions.path)["key"]) == ["a", "b"]
    assert read_manifest(captions.path) == written


def test_captions_whose_manifest_is_called_as_formerly_stay_done(tmp_path: Path) -> None:
    captions = ShardDirectory(tmp_path / "captions")
    captions.write_marker(report("a"), FINGERPRINT)
    written = captions.write_manifest(FINGERPRINT, ["a"], upstream={}, extra={})
    path, former = manifest_path(captions.path), captions.path / "manifest.json"
    path.rename(former)
    assert (manifest_path(captions.path), read_manifest(captions.path)) == (former, written)
    captions.write_manifest(FINGERPRINT, ["a"], upstream={}, extra={"new": 1})
    assert (path.is_file(), former.exists(), read_manifest(captions.path).extra) == (True, False, {"new": 1})
    path.rename(former)
    captions.clear_manifest()
    assert not former.exists() and not path.exists()
