import contextlib
import dataclasses
import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines.engine.pieces
import pipelines.engine.run
import pipelines.store.files
from errors import UserError
from pipelines.engine.cluster import WorkerResources, choose_num_workers
from pipelines.engine.pieces import Piece, PieceReport, Source, cut_into_pieces, finished_pieces
from pipelines.engine.run import QuarantinedShardError
from pipelines.engine.runner import PieceRunner, claimed
from pipelines.store.files import exclusive
from pipelines.store.manifest import Fingerprint, ShardDirectory, read_manifest
from tests.line_worker import ON_RAY, LineWorker, calls, contents, make_sources, run

FINGERPRINT = Fingerprint.of({"version": 1})


@pytest.fixture
def sources() -> list[Source]:
    return make_sources(3, 50)


def test_two_processes_cannot_write_one_directory(tmp_path, sources) -> None:
    script = (
        "import sys; from pathlib import Path; from pipelines.store.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being written by another process"):
            run(tmp_path / "a", sources)
        holder.kill()
    assert run(tmp_path / "a", sources).num_read == 147


def test_cutting_changes_no_byte_and_counts_balance(tmp_path, sources) -> None:
    """One worker takes whole shards, two Ray workers take pieces of two shards: the same files either way."""
    one = run(tmp_path / "one", sources[:2])
    two = run(tmp_path / "two", sources[:2], engine=ON_RAY)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one == two
    assert (one.num_read, one.num_kept, one.rejected) == (99, 89, {"tenth": 10})
    assert len(calls(tmp_path / "two")) > len(calls(tmp_path / "one"))
    assert one.shards["s0"].details == {"bytes": 50}


def test_a_third_run_does_nothing_and_a_change_redoes_just_what_it_must(tmp_path, sources) -> None:
    run(tmp_path / "a", sources)
    first = calls(tmp_path / "a")
    run(tmp_path / "a", sources)
    assert calls(tmp_path / "a") == first
    changed = [sources[0], dataclasses.replace(sources[1], identity="new"), sources[2]]
    run(tmp_path / "a", changed)
    redone = calls(tmp_path / "a")[len(first) :]
    assert {line.split()[0] for line in redone} == {"s1"}
    run(tmp_path / "a", changed, version=2)
    redone = calls(tmp_path / "a")[len(first) + len(redone) :]
    assert {line.split()[0] for line in redone} == {"s0", "s1", "s2"}


def test_finished_work_that_is_done_anew_is_said_before(tmp_path, sources, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("atelier"), "propagate", True)
    run(tmp_path / "a", sources)
    assert "anew" not in caplog.text
    changed = [sources[0], dataclasses.replace(sources[1], identity="new"), sources[2]]
    run(tmp_path / "a", changed)
    assert "a: 1 of 3 shards were made from other files than there are now and are made anew, first s1" in caplog.text
    assert "other settings" not in caplog.text
    run(tmp_path / "a", changed, version=2)
    assert "a: 3 of 3 shards were made with other settings and are made anew, first s0; to keep such" in caplog.text
    caplog.clear()
    run(tmp_path / "a", changed, version=2)
    assert "anew" not in caplog.text


def test_an_interrupted_run_keeps_its_finished_pieces(tmp_path, sources) -> None:
    with pytest.raises(UserError, match="fp16 is refused"):
        run(tmp_path / "a", sources, settings={"fails": "s1"})
    before = calls(tmp_path / "a")
    assert not (tmp_path / "a" / "manifest.json").exists()
    run(tmp_path / "a", sources)
    redone = calls(tmp_path / "a")[len(before) :]
    assert {line.split()[0] for line in redone} == {"s1", "s2"}
    run(tmp_path / "undisturbed", sources)
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def test_a_shard_that_kills_its_workers_is_quarantined_and_the_rest_is_done(tmp_path, sources) -> None:
    with pytest.raises(QuarantinedShardError, match="after 3 attempts that killed the worker: s1"):
        run(tmp_path / "a", sources, engine=ON_RAY, settings={"kills": "s1"})
    directory = ShardDirectory(tmp_path / "a")
    done = [source.name for source in sources if directory.report(source.name, Fingerprint.of({"version": 1}))]
    assert done == ["s0", "s2"]


def test_a_users_mistake_in_a_ray_worker_reads_as_without_ray(tmp_path, sources) -> None:
    with pytest.raises(UserError) as error:
        run(tmp_path / "a", sources, engine=ON_RAY, settings={"fails": "s2"})
    assert str(error.value) == "features.dtype fp16 is refused"
    assert "in a worker process" in error.value.__notes__[0]


def test_too_many_rejects_fail_by_name_and_keep_the_work(tmp_path, sources) -> None:
    with pytest.raises(
        UserError, match=r"15 of 147 samples rejected \(10\.2%\), more than test\.max_reject_fraction = 5\.0%: tenth 15"
    ):
        run(tmp_path / "a", sources, limit=0.05)
    before = calls(tmp_path / "a")
    run(tmp_path / "a", sources, limit=0.2)
    assert calls(tmp_path / "a") == before
    assert read_manifest(tmp_path / "a").num_read == 147
    with pytest.raises(UserError, match=r"max_reject_fraction = 5\.0%"):
        run(tmp_path / "a", sources, limit=0.05)


def test_rejects_of_an_earlier_command_are_counted_and_held_against_its_own_limit_alone(tmp_path, sources) -> None:
    carried = run(tmp_path / "a", sources, limit=0.0, settings={"reason": "caption:loop"})
    assert (carried.num_read, carried.num_kept, carried.rejected) == (147, 132, {"caption:loop": 15})
    with pytest.raises(UserError, match=r"15 of 147 samples rejected \(10\.2%\): loop 15"):
        run(tmp_path / "b", sources, limit=0.0, settings={"reason": "loop"})


def test_pieces_cover_every_sample_once_for_any_number_of_workers(tmp_path, sources) -> None:
    directory = ShardDirectory(tmp_path)
    for num_workers in (1, 2, 3, 8, 64):
        pieces = cut_into_pieces(sources, directory, num_workers=num_workers, samples_per_slice=8)
        covered = [(piece.source.name, index) for piece in pieces for index in range(piece.start, piece.stop)]
        assert covered == [(source.name, index) for source in sources for index in range(source.num_samples)]
        assert all(piece.start % 8 == 0 for piece in pieces)


def test_an_empty_shard_is_a_done_shard(tmp_path) -> None:
    empty = Source(name="empty", path="", identity="e", num_samples=0)
    manifest = run(tmp_path / "a", [empty])
    assert manifest.shards["empty"].num_read == 0


def test_a_run_killed_between_moving_files_and_marking_them_redoes_the_shard(tmp_path, sources, monkeypatch) -> None:
    def die(*_) -> None:
        raise RuntimeError("killed here")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed here"):
        patch.setattr(ShardDirectory, "write_marker", die)
        run(tmp_path / "a", sources)
    assert run(tmp_path / "a", sources).num_read == 147


def test_parts_that_a_run_killed_after_the_last_marker_left_behind_go(tmp_path, sources, monkeypatch) -> None:
    def die(*_, **__) -> None:
        raise RuntimeError("killed here")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed here"):
        patch.setattr(pipelines.engine.pieces, "drop_parts", die)
        run(tmp_path / "a", sources[:1])
    assert ShardDirectory(tmp_path / "a").is_done("s0", "id0", FINGERPRINT) and (tmp_path / "a" / ".parts").exists()
    run(tmp_path / "a", sources[:1])
    run(tmp_path / "undisturbed", sources[:1])
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def make_runner(output: Path, pieces: list[Piece], claim: Path, *, worker_class=LineWorker, **settings) -> PieceRunner:
    config = {"calls": f"{output}.calls", **settings}
    return PieceRunner(worker_class, config, pieces, fingerprint=FINGERPRINT, max_attempts=3, claim=claim)


def test_pieces_are_kept_whatever_the_number_of_workers_was(tmp_path, sources) -> None:
    """Three of the pieces that eight workers would make are there; a run of one worker fills the gaps."""
    output = ShardDirectory(tmp_path / "a")
    pieces = cut_into_pieces(sources[:1], output, num_workers=8, samples_per_slice=8)
    assert len(pieces) == 7
    with claimed(output) as claim:
        runner = make_runner(output.path, pieces, claim)
        for index in (1, 2, 5):
            runner.run(index, on_slice=lambda _: None)
    before = len(calls(tmp_path / "a"))
    run(tmp_path / "a", sources[:1])
    assert calls(tmp_path / "a")[before:] == ["s0 0", "s0 24", "s0 48"]
    run(tmp_path / "undisturbed", sources[:1])
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def test_pieces_of_other_settings_are_not_taken_for_these(tmp_path, sources) -> None:
    output = ShardDirectory(tmp_path / "a")
    pieces = cut_into_pieces(sources[:1], output, num_workers=8, samples_per_slice=8)
    with claimed(output) as claim:
        make_runner(output.path, pieces, claim).run(1, on_slice=lambda _: None)

    def found(source=sources[0], fingerprint=FINGERPRINT, samples_per_slice=8) -> int:
        suffixes = LineWorker.suffixes
        return len(finished_pieces(source, output, fingerprint, suffixes, samples_per_slice=samples_per_slice))

    assert found() == 1
    assert found(source=dataclasses.replace(sources[0], identity="new")) == 0
    assert found(fingerprint=Fingerprint.of({"version": 2})) == 0
    assert found(samples_per_slice=16) == 0
    next(pieces[1].folder.glob("*.txt")).unlink()
    assert found() == 0


class OrphanWorker(LineWorker):
    """Outlives its driver: while it has its first piece, another command does the whole job under other settings."""

    takeover: threading.Event

    def __call__(self, piece: Piece) -> PieceReport:
        report = super().__call__(piece)
        if self.config.get("overtakes"):
            overtaken = {**self.config}
            overtaken.pop("overtakes")()
            # Written after everything of the new run is done.
            report = type(self)(overtaken)(piece)
        return report


def test_a_worker_that_outlives_its_driver_changes_nothing(tmp_path, sources) -> None:
    """Its driver is killed and the command typed again under other settings; then the old worker ends its piece."""
    output = ShardDirectory(tmp_path / "a")
    (tmp_path / "undisturbed").mkdir()
    run(tmp_path / "undisturbed", sources, version=2, settings={"word": "new "})
    pieces = cut_into_pieces(sources, output, num_workers=1, samples_per_slice=8)
    # A killed driver runs no exit code: its claim stays.
    claim = contextlib.ExitStack().enter_context(claimed(output))

    def overtake() -> None:
        run(tmp_path / "a", sources, version=2, settings={"word": "new "})

    orphan = make_runner(output.path, pieces, claim, worker_class=OrphanWorker, word="old ", overtakes=overtake)
    with pytest.raises(UserError, match="another command has taken over"):
        orphan.run(0, on_slice=lambda _: None)
    with pytest.raises(UserError, match="another command has taken over"):
        orphan.run(1, on_slice=lambda _: None)
    run(tmp_path / "a", sources, version=2, settings={"word": "new "})
    kept = {name: data for name, data in contents(tmp_path / "a").items() if not name.startswith(".parts")}
    assert kept == contents(tmp_path / "undisturbed")
    # What the orphan left beside it goes with the next run that has something to do.
    more = make_sources(4, 50)
    run(tmp_path / "a", more, version=2, settings={"word": "new "})
    run(tmp_path / "undisturbed", more, version=2, settings={"word": "new "})
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def test_a_command_that_waited_for_another_does_not_do_its_work_again(tmp_path, sources, monkeypatch) -> None:
    """The other one finishes between this one's look at the markers and its lock."""

    @contextlib.contextmanager
    def overtaken(directory: Path) -> Iterator[None]:
        monkeypatch.setattr(pipelines.engine.run, "exclusive", exclusive)
        run(tmp_path / "a", sources)
        with exclusive(directory):
            yield

    monkeypatch.setattr(pipelines.engine.run, "exclusive", overtaken)
    run(tmp_path / "a", sources)
    assert calls(tmp_path / "a") == ["s0 0", "s1 0", "s2 0"]


def test_every_file_is_on_disk_before_the_marker_that_speaks_of_it(tmp_path, sources, monkeypatch) -> None:
    """Renames of files that were synced first; the folder of the data synced before the marker gets its name."""
    events: list[tuple[str, str]] = []
    synced: set[int] = set()
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        assert path.stat().st_ino in synced, f"{path} is renamed to {target} and may be empty after a power cut"
        events.append(("rename", str(target)))
        return replace(path, target)

    # Pieces of more than one worker, so that shards are joined.
    output = ShardDirectory(tmp_path / "a")
    pieces = cut_into_pieces(sources, output, num_workers=8, samples_per_slice=8)
    with claimed(output) as claim:
        runner = make_runner(output.path, pieces, claim)
        for index in range(0, len(pieces), 2):
            runner.run(index, on_slice=lambda _: None)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    synced.update(path.stat().st_ino for path in tmp_path.rglob("*.txt"))
    synced.update(path.stat().st_ino for path in tmp_path.rglob("*.slices"))
    run(tmp_path / "a", sources)
    for name in ("s0", "s1", "s2"):
        marker = events.index(("rename", str(tmp_path / "a" / ".done" / f"{name}.json")))
        data = [events.index(("rename", str(tmp_path / "a" / f"{name}{suffix}"))) for suffix in LineWorker.suffixes]
        assert ("fsync", str(tmp_path / "a")) in events[max(data) : marker]
    assert events[-2:] == [("rename", str(tmp_path / "a" / "manifest.json")), ("fsync", str(tmp_path / "a"))]


def test_what_killed_drivers_left_half_written_goes(tmp_path, sources) -> None:
    run(tmp_path / "undisturbed", sources)
    (tmp_path / "a" / ".done").mkdir(parents=True)
    for name in (".manifest.json.0a1b2c3d.tmp", ".done/.s1.json.0a1b2c3d.tmp"):
        (tmp_path / "a" / name).write_text("{")
    run(tmp_path / "a", sources)
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def test_storage_without_locks_is_refused(tmp_path, sources, monkeypatch) -> None:
    def no_locks(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(pipelines.store.files.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="this storage has no file locks"):
        run(tmp_path / "a", sources)


def test_a_worker_that_fits_no_node_is_an_error_and_not_a_wait(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"but Ray sees no GPU: set engine\.gpus_per_worker=0 to work on the CPU$"):
        choose_num_workers(2, WorkerResources(cpus=1, gpus=1, memory_bytes=0))
    with pytest.raises(
        UserError, match=r"4096, but Ray sees at most \d+ CPUs on one node: lower engine\.cpus_per_worker"
    ):
        choose_num_workers(0, WorkerResources(cpus=4096, gpus=0, memory_bytes=0))
    assert choose_num_workers(0, WorkerResources(cpus=0.5, gpus=0, memory_bytes=0)) >= 2


@pytest.mark.parametrize(
    ("address", "message"),
    [("ray://127.0.0.1:10001", "is not the address of a cluster"), ("127.0.0.1:1", "no Ray answers there")],
)
def test_a_wrong_address_is_said_in_one_line(tmp_path, address: str, message: str) -> None:
    script = "from pipelines.command import run_command; from pipelines.engine.cluster import start_ray; import sys\n"
    line = [sys.executable, "-c", script + "sys.exit(run_command('test', start_ray))"]
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and address in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
