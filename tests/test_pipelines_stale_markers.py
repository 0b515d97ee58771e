"""What a changed setting costs when it is stopped and set back: only the shards that were replaced meanwhile."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest

import pipelines.engine.pieces
from pipelines.engine.pieces import Piece, PieceReport, cut_into_pieces
from pipelines.engine.runner import PieceRunner, claimed
from pipelines.store.manifest import Fingerprint, ShardDirectory, read_manifest
from tests.line_worker import LineWorker, calls, contents, make_sources, run

SOURCES = make_sources(3, 50)
# Pieces of a single shard, which is cut in two.
S0_ALONE = ["s0 0", "s0 32"]
# Where a run is killed, and what a run under the former settings has to do again then.
POINTS = {
    "a marker goes": ((ShardDirectory, "clear_marker"), 1, []),
    "the first file is put in place": ((pipelines.engine.pieces, "put_in_place"), 1, S0_ALONE),
    "the second file is put in place": ((pipelines.engine.pieces, "put_in_place"), 2, S0_ALONE),
    "a marker is written": ((ShardDirectory, "write_marker"), 1, S0_ALONE),
    "the parts go": ((pipelines.engine.pieces, "drop_parts"), 1, S0_ALONE),
    "the next marker goes": ((ShardDirectory, "clear_marker"), 2, S0_ALONE),
}


class InterruptedWorker(LineWorker):
    """Gets a Ctrl-C with its second shard."""

    def __call__(self, piece: Piece) -> PieceReport:
        if piece.source.name == "s1":
            raise KeyboardInterrupt
        return super().__call__(piece)


def work(output: Path, *, version: int, **options) -> list[str]:
    """Do the whole job with settings that change its bytes; returns which pieces were done."""
    before = len(calls(output)) if Path(f"{output}.calls").exists() else 0
    run(output, SOURCES, version=version, settings={"word": f"v{version} "}, **options)
    return calls(output)[before:]


def test_a_changed_setting_that_is_stopped_and_set_back_costs_what_it_replaced(tmp_path) -> None:
    assert work(tmp_path / "a", version=1) == ["s0 0", "s1 0", "s2 0"]
    before = contents(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "a", version=2, worker_class=InterruptedWorker)
    assert (tmp_path / "a" / "s0.txt").read_text().startswith("v2 ")
    assert not (tmp_path / "a" / "manifest.json").exists()
    assert work(tmp_path / "a", version=1) == S0_ALONE
    assert contents(tmp_path / "a") == before
    assert read_manifest(tmp_path / "a").num_read == 147
    assert work(tmp_path / "a", version=1) == []


def test_a_changed_setting_that_is_stopped_before_its_first_shard_costs_nothing(tmp_path) -> None:
    work(tmp_path / "a", version=1)
    before = contents(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", SOURCES[1:], version=2, worker_class=InterruptedWorker)
    assert work(tmp_path / "a", version=1) == []
    assert contents(tmp_path / "a") == before


def killed_at(output: Path, place: tuple[object, str], count: int) -> None:
    """Change the settings in a child that ends at once when it comes to `place` for the `count`th time."""
    child = os.fork()
    if child == 0:
        owner, name = place
        kept, num_calls = getattr(owner, name), 0

        def die(*arguments) -> object:
            nonlocal num_calls
            num_calls += 1
            if num_calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return kept(*arguments)

        setattr(owner, name, die)
        try:
            work(output, version=2)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("point", POINTS)
def test_a_run_with_changed_settings_may_be_killed_anywhere(tmp_path, point) -> None:
    place, count, redone = POINTS[point]
    work(tmp_path / "back", version=1)
    before = contents(tmp_path / "back")
    killed_at(tmp_path / "back", place, count)
    shutil.copytree(tmp_path / "back", tmp_path / "on")
    assert work(tmp_path / "back", version=1) == redone
    assert contents(tmp_path / "back") == before
    work(tmp_path / "on", version=2)
    work(tmp_path / "undisturbed", version=2)
    assert contents(tmp_path / "on") == contents(tmp_path / "undisturbed")


def test_finished_pieces_of_a_shard_with_a_stale_marker_are_kept(tmp_path) -> None:
    run(tmp_path / "a", SOURCES)
    changed = [SOURCES[0], dataclasses.replace(SOURCES[1], identity="new"), SOURCES[2]]
    output, before = ShardDirectory(tmp_path / "a"), len(calls(tmp_path / "a"))
    pieces = cut_into_pieces(changed[1:2], output, num_workers=8, samples_per_slice=8)
    with claimed(output) as claim:
        config, fingerprint = {"calls": f"{output.path}.calls"}, Fingerprint.of({"version": 1})
        runner = PieceRunner(LineWorker, config, pieces, fingerprint=fingerprint, max_attempts=3, claim=claim)
        runner.run(0, on_slice=lambda _: None)
    run(tmp_path / "a", changed)
    assert calls(tmp_path / "a")[before:] == ["s1 0", "s1 8", "s1 40"]
    assert not (tmp_path / "a" / ".parts").exists()


def test_a_stale_marker_is_off_the_disk_before_its_files_are_replaced(tmp_path, monkeypatch) -> None:
    work(tmp_path / "a", version=1)
    events: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def record_fsync(descriptor: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        events.append(("rename", str(target)))
        return replace(path, target)

    def record_unlink(path: Path, missing_ok: bool = False) -> None:
        events.append(("unlink", str(path)))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    monkeypatch.setattr(Path, "unlink", record_unlink)
    work(tmp_path / "a", version=2)
    folder = tmp_path / "a"
    manifest = events.index(("unlink", str(folder / "manifest.json")))
    for name in ("s0", "s1", "s2"):
        gone = events.index(("unlink", str(folder / ".done" / f"{name}.json")))
        first = min(events.index(("rename", str(folder / f"{name}{suffix}"))) for suffix in LineWorker.suffixes)
        assert manifest < gone and ("fsync", str(folder / ".done")) in events[gone:first]
        assert ("fsync", str(folder)) in events[manifest:gone]
