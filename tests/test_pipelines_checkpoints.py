"""Checkpoints on disk: which are ours, which one is in force, what damage is said, and what is removed."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

from errors import UserError
from pipelines.store.checkpoints import (
    TRAINER_KEYS,
    Checkpoint,
    checkpoint_folders,
    damage_of,
    drop_old,
    find_checkpoint,
    open_checkpoint,
    put_in_force,
    remove_unfinished,
    require_free_names,
    require_whole,
    weights_damage,
)

MODEL_STATES = "deepspeed/mp_rank_00_model_states.pt"
WEIGHTS = "model/diffusion_pytorch_model.safetensors"


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A stage of three checkpoints, the newest in force."""
    folder = tmp_path / "run" / "training" / "stage2"
    for step in (5, 15, 20):
        write_checkpoint(folder, step)
    (folder / "latest").write_text("step-20\n")
    return folder


def make_users_things(stage: Path) -> list[str]:
    """Put beside the checkpoints what a person may keep there; returns the names."""
    for copy in ("step-20-best", "step-15.bak", "step-020", "my-step-20", "step-0", "step-x", "step-٢"):
        shutil.copytree(stage / "step-20", stage / copy)
    (stage / "step-3").write_text("a note")
    (stage / "step-4").symlink_to(stage / "step-15.bak")
    for name in (".step-9.tmp.bak", ".step-x.tmp", ".step-09.tmp", ".step-9.best.tmp"):
        (stage / name).mkdir()
    (stage / ".step-7.tmp").write_text("a note")
    (stage / ".step-8.tmp").symlink_to(stage / "step-15.bak")
    return sorted(path.name for path in stage.iterdir() if path.name not in ("latest", "step-5", "step-15", "step-20"))


def found_to_train(stage: Path) -> Checkpoint:
    found = find_checkpoint(stage)
    assert found is not None
    require_whole(found.path)
    return found


def names(stage: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(stage)]


def test_only_folders_of_exactly_our_name_are_ours(stage: Path) -> None:
    make_users_things(stage)
    assert names(stage) == ["step-5", "step-15", "step-20"]
    assert checkpoint_folders(stage / "nothing") == []


def test_what_a_person_keeps_beside_is_neither_counted_nor_removed(stage: Path) -> None:
    theirs = make_users_things(stage)
    (stage / ".step-9.tmp" / "deepspeed").mkdir(parents=True)
    (stage / ".step-9.0123abcd.tmp" / "model").mkdir(parents=True)
    remove_unfinished(stage)
    drop_old(stage / "step-20", 2)
    assert sorted(path.name for path in stage.iterdir()) == sorted([*theirs, "latest", "step-15", "step-20"])
    assert (stage / "step-3").read_text() == "a note" and (stage / "step-4" / "trainer.json").is_file()


def test_abandoned_later_steps_are_removed_before_older_ones_and_named(
    stage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(stage, 25)
    drop_old(stage / "step-15", 2)
    assert names(stage) == ["step-5", "step-15"]
    drop_old(stage / "step-15", 1)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "removed step-20, step-25: abandoned when latest was set back to train on to step-15"


@pytest.mark.parametrize(("latest", "reason"), [(None, "is gone"), ("", "is empty"), (" \n", "is empty")])
def test_without_latest_the_newest_whole_one_is_taken_and_that_is_said(
    stage: Path, latest: str | None, reason: str
) -> None:
    make_users_things(stage)
    (stage / "latest").unlink()
    if latest is not None:
        (stage / "latest").write_text(latest)
    found = find_checkpoint(stage)
    assert found is not None and found.path == stage / "step-20"
    assert found.note == f"{stage}/latest {reason}: the newest whole checkpoint is taken, step-20"


@pytest.mark.parametrize(
    "name", ["step-99", "../stage2/step-5", "/tmp", ".", "..", "step-5\nstep-15", "\0", "step-3", ".step-9.tmp"]
)
def test_a_latest_that_names_nothing_here_is_quoted(stage: Path, name: str) -> None:
    make_users_things(stage)
    shutil.copytree(stage / "step-5", stage / ".step-9.tmp")
    (stage / "latest").write_bytes(name.encode() + b"\n")
    found = find_checkpoint(stage)
    assert found is not None and found.path == stage / "step-20"
    assert found.note is not None and f"latest names {name!r}, which is not there" in found.note


def test_a_damaged_newest_one_is_passed_over_only_without_latest_and_named(stage: Path) -> None:
    (stage / "latest").unlink()
    (stage / "step-20" / MODEL_STATES).write_bytes(b"")
    found = find_checkpoint(stage)
    assert found is not None and found.path == stage / "step-15"
    assert found.note == (
        f"{stage}/latest is gone; step-20 is damaged ({MODEL_STATES} is empty): "
        "the newest whole checkpoint is taken, step-15"
    )


def test_latest_may_name_an_older_one_and_a_persons_copy(stage: Path) -> None:
    make_users_things(stage)
    for name in ("step-5", "step-20-best", "step-4"):
        (stage / "latest").write_text(name)
        found = find_checkpoint(stage)
        assert found is not None and found.path == stage / name and found.note is None


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nothing") is None
    (tmp_path / ".step-5.tmp").mkdir()
    (tmp_path / "latest").write_text("step-5\n")
    assert find_checkpoint(tmp_path) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("file", "harm", "damage"),
    [
        (MODEL_STATES, cut, "is cut short or overwritten"),
        (MODEL_STATES, empty, "is empty"),
        (MODEL_STATES, zeros, "is cut short or overwritten"),
        (MODEL_STATES, Path.unlink, "does not exist"),
        (WEIGHTS, cut, "is cut short or overwritten: it has 89 bytes and should have 96"),
        (WEIGHTS, empty, "is empty"),
        (WEIGHTS, zeros, "is cut short or overwritten"),
        (WEIGHTS, Path.unlink, "does not exist"),
        ("model/config.json", cut, "is damaged ("),
        ("model/config.json", Path.unlink, "does not exist"),
        ("trainer.json", cut, "is damaged ("),
        ("trainer.json", empty, "is empty"),
        ("trainer.json", Path.unlink, "does not exist"),
    ],
)
def test_a_damaged_file_is_named_with_the_intact_one_and_the_way_on(
    stage: Path, file: str, harm: Callable[[Path], None], damage: str
) -> None:
    assert damage_of(stage / "step-20") is None
    harm(stage / "step-20" / file)
    (stage / "step-15" / "trainer.json").write_text("{")
    with pytest.raises(UserError) as refusal:
        found_to_train(stage)
    said = str(refusal.value)
    assert said.startswith(f"{stage}/step-20 is damaged: {file} {damage}")
    way = f"echo step-5 > {stage}/latest"
    start = (
        f"; its weights are whole: or start another stage with training.<stage>.starts_from = '{stage}/step-20/model'"
    )
    assert said.endswith(
        "; the newest intact checkpoint beside it is step-5: to go on from that, "
        f"type `{way}` and then the same command again{start if file == MODEL_STATES else ''}"
    )
    os.system(way)
    found = found_to_train(stage)
    assert (found.path, found.note) == (stage / "step-5", None)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("harm", [cut, empty, Path.unlink])
def test_a_shard_of_any_rank_is_missed(tmp_path: Path, zero_stage: int, harm: Callable[[Path], None]) -> None:
    folder = write_checkpoint(tmp_path, 5, zero_stage=zero_stage, num_ranks=3)
    assert damage_of(folder) is None
    shards = sorted(path.name for path in (folder / "deepspeed").iterdir())
    assert len(shards) == (6 if zero_stage == 3 else 4)
    for shard in shards:
        path = folder / "deepspeed" / shard
        whole = path.read_bytes()
        harm(path)
        assert str(damage_of(folder)).startswith(f"deepspeed/{shard} ")
        path.write_bytes(whole)


def test_a_changed_byte_is_found_where_all_is_read(stage: Path) -> None:
    path = stage / "step-20" / MODEL_STATES
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    assert damage_of(stage / "step-20") is None
    assert damage_of(stage / "step-20", is_thorough=True) == (
        f"{MODEL_STATES} has changed since it was written: the checksum of mp_rank_00_model_states/data/0 differs"
    )
    assert damage_of(stage / "step-15", is_thorough=True) is None


def test_a_persons_copy_of_the_damaged_one_is_the_intact_one_beside_it(stage: Path) -> None:
    make_users_things(stage)
    empty(stage / "step-20" / WEIGHTS)
    for copy in ("step-020", "my-step-20", "step-0", "step-x", "step-٢", "step-15.bak", "step-4"):
        path = stage / copy
        shutil.rmtree(path) if not path.is_symlink() else path.unlink()
    with pytest.raises(UserError, match="the newest intact checkpoint beside it is step-20-best: to go on"):
        find_checkpoint(stage)


def test_without_an_intact_one_the_way_is_to_train_anew(stage: Path) -> None:
    for step in (5, 15, 20):
        empty(stage / f"step-{step}" / MODEL_STATES)
    way = f"mv {stage}/step-20 {stage}/step-20.damaged"
    start = rf"start another stage with training\.<stage>\.starts_from = '{stage}/step-20/model', or `{way}` and train"
    with pytest.raises(UserError, match=f"no intact checkpoint is beside it: restore the file from a copy, {start}"):
        found_to_train(stage)
    (stage / "latest").unlink()
    with pytest.raises(UserError, match=r"step-20 is damaged: .* no intact checkpoint is beside it"):
        found_to_train(stage)
    for step in (5, 15, 20):
        empty(stage / f"step-{step}" / WEIGHTS)
    with pytest.raises(UserError, match=f"no intact checkpoint is beside it: restore the file from a copy, or `{way}`"):
        find_checkpoint(stage)


def test_a_named_folder_that_is_damaged_is_not_replaced(stage: Path) -> None:
    assert open_checkpoint(stage / "step-15").step == 15
    cut(stage / "step-15" / WEIGHTS)
    with pytest.raises(UserError, match=r"step-15 is damaged: model/.* beside it is .*/step-20, name that instead"):
        open_checkpoint(stage / "step-15")


def test_without_optimizer_state_the_weights_are_taken_and_training_names_who_has_it(stage: Path) -> None:
    shutil.rmtree(stage / "step-20" / "deepspeed")
    found = find_checkpoint(stage)
    assert found is not None and (found.step, found.note) == (20, None)
    assert open_checkpoint(stage / "step-20").note is None and weights_damage(stage / "step-20") is None
    with pytest.raises(UserError, match=rf"step-20 is damaged: deepspeed/ does not exist; .* `echo step-15 > {stage}/"):
        require_whole(found.path)
    (stage / "latest").unlink()
    assert found_to_train(stage).note == (
        f"{stage}/latest is gone; step-20 is damaged (deepspeed/ does not exist): "
        "the newest whole checkpoint is taken, step-15"
    )
    for step in (5, 15):
        shutil.rmtree(stage / f"step-{step}" / "deepspeed")
    found = find_checkpoint(stage)
    assert found is not None and found.path == stage / "step-20"
    assert found.note == f"{stage}/latest is gone: the newest checkpoint of whole weights is taken, step-20"


def test_what_only_training_needs_is_a_note_for_all_others(stage: Path) -> None:
    empty(stage / "step-20" / MODEL_STATES)
    said = (
        f"{stage}/step-20 is damaged: {MODEL_STATES} is empty; "
        "its weights are whole and are taken, but training cannot go on from it"
    )
    found = find_checkpoint(stage)
    assert found is not None and found.note == open_checkpoint(stage / "step-20").note == said


def test_files_are_not_looked_at_where_another_rank_has_done_so(stage: Path) -> None:
    empty(stage / "step-20" / MODEL_STATES)
    empty(stage / "step-20" / WEIGHTS)
    found = find_checkpoint(stage, checks_files=False)
    assert found is not None and (found.step, found.note) == (20, None)


def test_a_save_again_replaces_ours_and_moves_latest(stage: Path) -> None:
    (stage / "step-15" / "old").touch()
    shutil.copytree(stage / "step-5", stage / ".step-15.tmp")
    put_in_force(stage / ".step-15.tmp", stage / "step-15")
    assert not (stage / "step-15" / "old").exists()
    assert (stage / "latest").read_text() == "step-15\n"
    assert sorted(path.name for path in stage.iterdir()) == ["latest", "step-15", "step-20", "step-5"]


def test_what_cannot_be_removed_is_a_warning_and_no_checkpoint_any_more(
    stage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(folder: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(folder / ".nfs0001"))

    monkeypatch.setattr(shutil, "rmtree", busy)
    drop_old(stage / "step-20", 2)
    assert names(stage) == ["step-15", "step-20"]
    (left,) = stage.glob(".step-5.*.tmp")
    (stage / ".step-25.tmp").mkdir()
    remove_unfinished(stage)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"{left} cannot be removed (Device or resource busy): remove it by hand"
    assert len(said) == 3 and not (stage / ".step-25.tmp").exists(), "a save of that step finds its name free"
    monkeypatch.undo()
    remove_unfinished(stage)
    assert sorted(path.name for path in stage.iterdir()) == ["latest", "step-15", "step-20"]


def test_a_folder_that_may_not_be_written_keeps_all(
    stage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    drop_old(stage / "step-20", 1)
    assert names(stage) == ["step-5", "step-15", "step-20"]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{stage}/step-{step} cannot be removed (Permission denied): remove it by hand" for step in (5, 15)]


@pytest.mark.parametrize("key", TRAINER_KEYS)
def test_a_trainer_json_without_a_key_or_of_another_type_is_damaged(stage: Path, key: str) -> None:
    path = stage / "step-20" / "trainer.json"
    trainer = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in trainer.items() if name != key}))
    with pytest.raises(UserError, match=rf"step-20 is damaged: trainer\.json is damaged: it lacks {key}; .* step-15"):
        find_checkpoint(stage)
    path.write_text(json.dumps(trainer | {key: True if key in ("vae", "text", "fingerprint") else {}}))
    with pytest.raises(UserError, match=rf"trainer\.json is damaged: {key} is a (bool|dict); "):
        find_checkpoint(stage)


def test_trainer_json_of_a_former_version_is_read_in_todays_words(stage: Path) -> None:
    path = stage / "step-20" / "trainer.json"
    former = {"stage": 2, "kind": "pixart", "init_from": None, "fingerprint": {"stage": 2, "training.init_from": "x"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | former))
    found = find_checkpoint(stage)
    assert found is not None and found.trainer["stage"] == "stage2" and found.trainer["starts_from"] == "stage1"


def test_a_former_checkpoint_of_that_name_that_cannot_be_removed_is_called_ours(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    shutil.copytree(stage / "step-5", stage / ".step-15.tmp")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=rf"^{stage}/step-15 is a former checkpoint .*: remove it by hand and type"):
        put_in_force(stage / ".step-15.tmp", stage / "step-15")
    assert (stage / "latest").read_text() == "step-20\n" and damage_of(stage / "step-15") is None


@pytest.mark.parametrize("name", ["step-21", ".step-21.tmp"])
@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("step-5")])
def test_what_is_in_the_way_of_a_coming_checkpoint_is_refused_and_kept(
    stage: Path, name: str, make: Callable[[Path], None]
) -> None:
    make_users_things(stage)
    require_free_names(stage, after_step=20)
    make(stage / name)
    require_free_names(stage, after_step=21)
    with pytest.raises(UserError, match=rf"{stage}/{name} was not made by training, which needs that name"):
        require_free_names(stage, after_step=20)
    shutil.copytree(stage / "step-5", stage / ".step-15.tmp")
    if name == "step-21":
        with pytest.raises(UserError, match=rf"{stage}/step-21 was not made .* what is saved stays in force"):
            put_in_force(stage / ".step-15.tmp", stage / "step-21")
    assert os.path.lexists(stage / name) and (stage / "latest").read_text() == "step-20\n"


def test_a_folder_called_latest_is_in_the_way(stage: Path) -> None:
    (stage / "latest").unlink()
    (stage / "latest").mkdir()
    with pytest.raises(UserError, match=f"{stage}/latest was not made by training"):
        require_free_names(stage, after_step=20)
