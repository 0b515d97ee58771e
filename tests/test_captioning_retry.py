"""What RETRY=1 finds after a kill, and what text features are told of captions that are completed."""

from pathlib import Path
from typing import Any

import pytest
from test_captioning_earlier import RAISED, RETRY, Killed, command, make_run, rows

from pipelines.raw.images import SampleReject
from pipelines.raw.kinds.file_shard import FileShard
from pipelines.store.manifest import read_manifest
from tests.tiny_models import save_clip, save_llava


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """One shard, so that it is cut into pieces."""
    monkeypatch.setattr("captioning.worker.check_engine", lambda *_: None)
    run = make_run(tmp_path, save_llava(tmp_path / "llava"))
    (run / "raw" / "laion_00001.tar").unlink()
    return run


def test_rejects_in_parts_behind_a_marker_are_tried_again(run, monkeypatch) -> None:
    """A run killed between a shard's marker and the removal of its parts has left them whole, rejects included."""
    read = FileShard.image_bytes

    def failing(self: FileShard, sample: Any) -> bytes:
        if sample.key == "000000002":
            raise SampleReject("corrupt_image")
        return read(self, sample)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FileShard, "image_bytes", failing)
        patch.setattr("pipelines.engine.pieces.drop_parts", die)
        command(run, *RAISED, monkeypatch=patch)
    assert len(list((run / "captions" / ".parts" / "laion_00000").glob("*.report"))) == 2
    assert [row["key"] for row in rows(run) if row["reject"]] == ["000000002"]
    command(run, *RAISED, *RETRY, monkeypatch=monkeypatch)
    assert [row["key"] for row in rows(run) if row["reject"]] == []
    assert read_manifest(run / "captions").rejected == {} and not (run / "captions" / ".parts").exists()


def test_text_features_are_told_of_other_limits_and_not_of_a_score(run, tmp_path, monkeypatch) -> None:
    command(run, monkeypatch=monkeypatch)
    plain = read_manifest(run / "captions")
    assert plain.extra["texts"] == plain.fingerprint.digest
    command(run, "--set", f"captioning.clip_model={save_clip(tmp_path / 'clip')}", monkeypatch=monkeypatch)
    scored = read_manifest(run / "captions")
    assert scored.fingerprint.digest != plain.fingerprint.digest and scored.extra["texts"] == plain.extra["texts"]
    command(run, *RAISED, monkeypatch=monkeypatch)
    assert read_manifest(run / "captions").extra["texts"] != plain.extra["texts"]
