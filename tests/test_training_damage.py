"""A checkpoint damaged on disk: training names the file, the intact checkpoint and the way on, once for all ranks."""

import shutil
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint, write_universal
from training_run import make_run, train

from errors import ProgramFault, StorageError, UserError
from pipelines.store.checkpoints import open_checkpoint
from pipelines.store.deepspeed_files import conversion_damage, list_files
from training.loop.conversions import loadable_state
from training.loop.state import _naming_damage

SETTINGS = {
    "starts_from": "scratch",
    "checkpoint_every": 2,
    "log_every": 1,
    "keep_checkpoints": 3,
    "zero_stage": 1,
    "dtype": "bf16",
}
SHARD = "deepspeed/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that share the optimizer, with steps 2 and 4."""
    run = make_run(tmp_path_factory.mktemp("trained"))
    train(run, 2, **SETTINGS, num_steps=4)
    return run


@pytest.fixture
def stage(trained: Path, tmp_path: Path) -> Path:
    """The stage's folder in a copy of that run."""
    for name in ("features", "training"):
        shutil.copytree(trained / name, tmp_path / "run" / name)
    shutil.copy(trained.parent / "recipe.toml", tmp_path)
    return tmp_path / "run" / "training" / "stage2"


def way_back(stage: Path) -> str:
    return (
        f"the newest intact checkpoint beside it is step-2: to go on from that, type `echo step-2 > {stage}/latest` "
        "and then the same command again"
    )


def test_a_shard_that_was_cut_short_is_named_once(stage: Path) -> None:
    shard = stage / "step-4" / SHARD
    shard.write_bytes(shard.read_bytes()[:5000])
    said = train(stage.parent.parent, 2, status=2, **SETTINGS, num_steps=5)
    message = f"{stage}/step-4 is damaged: {SHARD} is cut short or overwritten; {way_back(stage)}"
    assert said.count(message) == 1 and said.count("is damaged") == 1 and "Traceback" not in said


def test_what_shows_only_on_loading_is_named_too(stage: Path) -> None:
    """The pickle in the file, not its length: rank 1 alone finds it."""
    shard = stage / "step-4" / SHARD
    content = bytearray(shard.read_bytes())
    content[content.index(b"exp_avg")] ^= 0x80
    shard.write_bytes(content)
    said = train(stage.parent.parent, 2, status=2, **SETTINGS, num_steps=5)
    assert f"rank 1: {stage}/step-4 is damaged: {SHARD} has changed since it was written: the checksum of" in said
    assert said.count(way_back(stage)) == 1 and "Traceback" not in said


def test_a_conversion_that_was_cut_short_is_made_anew_and_a_killed_one_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path, 4, zero_stage=1, num_ranks=2, trainer={"weight_layout": 2})
    made = []

    def make(source: Path, output: Path) -> None:
        made.append(source)
        write_universal(output)

    monkeypatch.setattr("training.loop.conversions._make_universal", make)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    for name in (".universal-ab_cd012", ".universal-mine"):
        (folder / name).mkdir()
    checkpoint = open_checkpoint(folder)
    assert loadable_state(checkpoint, 2) == "deepspeed" and made == []
    assert loadable_state(checkpoint, 1) == loadable_state(checkpoint, 3) == "deepspeed-universal"
    assert made == [folder / "deepspeed"], "once"
    names = ["deepspeed", "deepspeed-universal", "model", "trainer.json"]
    assert sorted(path.name for path in folder.iterdir()) == [".universal-mine", *names]
    lost = "deepspeed-universal/zero/final.bias/exp_avg.pt"
    (folder / lost).unlink()
    assert conversion_damage(folder / "deepspeed-universal") == f"{lost} does not exist"
    assert loadable_state(checkpoint, 1) == "deepspeed-universal" and len(made) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / lost} does not exist: it is made anew from deepspeed/"
    ]
    assert conversion_damage(folder / "deepspeed-universal", is_thorough=True) is None
    shutil.rmtree(folder / "deepspeed-universal" / "zero" / "final.weight")
    assert loadable_state(checkpoint, 1) == "deepspeed-universal" and len(made) == 3, "all of a weight is missed, too"


@pytest.mark.parametrize("is_listed", [True, False], ids=["listed", "of before"])
@pytest.mark.parametrize("file", ["zero/optimizer_state.pt", "zero/final.weight/fp32.pt", "mp_rank_00_model_states.pt"])
def test_every_file_of_a_conversion_must_be_there(tmp_path: Path, file: str, is_listed: bool) -> None:
    write_universal(tmp_path / "deepspeed-universal")
    if is_listed:
        list_files(tmp_path / "deepspeed-universal")
    path = tmp_path / "deepspeed-universal" / file
    path.write_bytes(path.read_bytes()[:-9])
    assert conversion_damage(path.parents[file.count("/")]) == f"deepspeed-universal/{file} is cut short or overwritten"
    path.unlink()
    assert conversion_damage(path.parents[file.count("/")]) == f"deepspeed-universal/{file} does not exist"


def test_a_list_of_a_conversion_that_is_damaged_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed-universal"
    write_universal(folder)
    (folder / "files.json").write_text("{")
    assert str(conversion_damage(folder)).startswith("deepspeed-universal/files.json is damaged (")


def test_a_disk_that_is_full_during_a_conversion_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, 4, zero_stage=1, num_ranks=2, trainer={"weight_layout": 2})

    def fill(source: Path, output: Path) -> None:
        write_universal(output)
        raise ProgramFault("OSError: [Errno 28] No space left on device")

    monkeypatch.setattr("training.loop.conversions._make_universal", fill)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with pytest.raises(StorageError, match=r"step-4: the disk is full, deepspeed-universal/ was not made; make room"):
        loadable_state(open_checkpoint(folder), 1)
    assert sorted(path.name for path in folder.iterdir()) == ["deepspeed", "model", "trainer.json"]


def test_a_link_with_the_name_of_a_coming_checkpoint_is_refused_before_training(stage: Path) -> None:
    (stage / "step-5").symlink_to(stage / "step-2")
    said = train(stage.parent.parent, 2, status=2, **SETTINGS, num_steps=5)
    assert f"{stage}/step-5 was not made by training, which needs that name for a checkpoint: move it away" in said
    assert (stage / "step-5").is_symlink() and (stage / "latest").read_text() == "step-4\n"


def test_a_conversion_that_has_changed_is_named_when_it_cannot_be_loaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4, zero_stage=1, num_ranks=2)
    write_universal(folder / "deepspeed-universal")
    path = folder / "deepspeed-universal" / "zero" / "final.bias" / "fp32.pt"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    said = (
        f"{path} has changed .*; remove {folder}/deepspeed-universal and type the command again: it is made anew from"
    )
    with pytest.raises(UserError, match=said), _naming_damage(open_checkpoint(folder), "deepspeed-universal"):
        raise ValueError("what a library says of it")
    with pytest.raises(ValueError, match="a fault"), _naming_damage(open_checkpoint(folder), "deepspeed"):
        raise ValueError("a fault of ours, for the state is whole")
