"""Where work is done, in the command's process or in Ray's workers, and who joins and hashes what comes of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pipelines.engine.pieces
import pipelines.engine.run
from errors import UserError
from pipelines.engine.pieces import (
    JoinedParts,
    Piece,
    PieceReport,
    Source,
    begun_attempts,
    cut_into_pieces,
    finished_pieces,
)
from pipelines.engine.run import EngineConfig, QuarantinedShardError, run_over_shards
from pipelines.engine.runner import PieceRunner, claimed
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory
from tests.line_worker import ON_RAY, LineWorker, calls, contents, make_sources, run

FINGERPRINT = Fingerprint.of({"version": 1})
UNSET = EngineConfig(num_workers=2, samples_per_slice=8, max_shard_attempts=2)


class PlaceWorker(LineWorker):
    """Notes in which process it works."""

    def __call__(self, piece: Piece) -> PieceReport:
        with Path(self.config["places"]).open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().__call__(piece)


def work(folder: Path, *, few_samples: int, **settings: str) -> list[int]:
    """Run three sources, 147 samples; returns the processes that have worked, one for each piece begun."""
    places = Path(f"{folder}.places")
    places.unlink(missing_ok=True)
    try:
        run_over_shards(
            PlaceWorker,
            {"calls": f"{folder}.calls", "places": str(places), **settings},
            sources=make_sources(3, 50),
            output=ShardDirectory(folder),
            fingerprint=FINGERPRINT,
            engine=UNSET,
            max_reject_fraction=0.5,
            room="test",
            few_samples=few_samples,
        )
    finally:
        found = [int(line) for line in places.read_text().split()] if places.exists() else []
    return found


def test_small_work_is_done_in_the_process_and_large_work_in_workers(tmp_path, monkeypatch, capfd) -> None:
    def refuse(*_, **__) -> None:
        raise UserError("Ray is started")

    monkeypatch.setattr(pipelines.engine.run, "choose_num_workers", refuse)
    assert set(work(tmp_path / "a", few_samples=147)) == {os.getpid()}
    said = " ".join(capfd.readouterr().err.split())
    assert "147 samples are done in this process (unless engine.in_process = false)" in said
    with pytest.raises(UserError, match="Ray is started"):
        work(tmp_path / "b", few_samples=146)


def test_what_an_interrupted_run_has_done_is_no_part_of_the_work(tmp_path) -> None:
    with pytest.raises(UserError, match="fp16 is refused"):
        run(tmp_path / "a", make_sources(3, 50), settings={"fails": "s2"})
    assert set(work(tmp_path / "a", few_samples=48)) == {os.getpid()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"num_workers": 8}, True),
        ({"gpus_per_worker": 1.0}, True),
        ({"in_process": False}, False),
        ({"in_process": True, "gpus_per_worker": 1.0}, True),
    ],
)
def test_what_needs_ray_goes_to_ray(settings, expected, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    engine = EngineConfig(**settings)
    assert engine.is_in_process(10, 10) is expected
    assert engine.is_in_process(11, 10) is bool(engine.in_process)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert engine.is_in_process(10, 10) is bool(engine.in_process)


CODE = (
    "import sys; from pathlib import Path; from tests.test_pipelines_small_work import work\n"
    "work(Path(sys.argv[1]), few_samples=1000, kills='s1')\n"
)


@pytest.mark.faults
def test_work_that_has_killed_its_command_goes_to_workers_and_is_quarantined(tmp_path, capfd) -> None:
    """A killed worker takes a small command with it; the same command typed again ends, and names the shard."""
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "a")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(QuarantinedShardError, match="after 2 attempts that killed the worker: s1"):
        work(tmp_path / "a", few_samples=1000, kills="s1")
    assert "the last run was killed at s1" in capfd.readouterr().err
    assert calls(tmp_path / "a").count("s0 0") == 1, "what the killed command had done is kept"
    run(tmp_path / "a", make_sources(3, 50))
    run(tmp_path / "undisturbed", make_sources(3, 50))
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def test_a_death_is_remembered_where_ray_does_not_start(tmp_path, monkeypatch) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "a")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL

    def refuse(*_, **__) -> None:
        raise UserError("Ray does not start")

    monkeypatch.setattr(pipelines.engine.run, "choose_num_workers", refuse)
    for _ in range(2):
        with pytest.raises(UserError, match="Ray does not start"):
            work(tmp_path / "a", few_samples=1000)


def test_a_finished_piece_is_no_death_whatever_becomes_of_its_report(tmp_path) -> None:
    output, _ = made_pieces(tmp_path / "a", num_workers=1)
    assert list((tmp_path / "a" / ".parts" / "s0").glob("*.report"))
    assert begun_attempts(make_sources(1, 50)[0], output, []) == []


class InterruptedWorker(LineWorker):
    """Its user types Ctrl-C."""

    def __call__(self, piece: Piece) -> PieceReport:
        if piece.source.name == self.config.get("interrupted"):
            raise KeyboardInterrupt
        return super().__call__(piece)


@pytest.mark.parametrize("settings", [{"interrupted": "s1"}, {"fails": "s1"}])
def test_an_exception_is_no_death(tmp_path, settings) -> None:
    """Ctrl-C or an error ends a command without a piece that would have killed it: nothing is counted."""
    sources, output = make_sources(3, 50), ShardDirectory(tmp_path / "a")
    with pytest.raises((KeyboardInterrupt, UserError)):
        run(tmp_path / "a", sources, settings=settings, worker_class=InterruptedWorker)
    assert [path.stat().st_size for source in sources for path in begun_attempts(source, output, [])] == [0]
    assert set(work(tmp_path / "a", few_samples=1000)) == {os.getpid()}


def forbid_hashing(monkeypatch) -> None:
    """Of the files of shards, in this process: Ray's workers are others."""
    monkeypatch.setattr(pipelines.engine.pieces, "sha256_file", lambda path: pytest.fail(f"the driver reads {path}"))


def test_workers_join_and_hash_and_the_driver_reads_nothing(tmp_path, monkeypatch) -> None:
    """Two shards are cut for two workers, and one of a single slice is not."""
    forbid_hashing(monkeypatch)
    monkeypatch.setattr(LineWorker, "join", lambda *_: pytest.fail("the driver joins"))
    small = Source(name="small", path="", identity="id", num_samples=5)
    manifest = run(tmp_path / "a", [*make_sources(2, 50), small], engine=ON_RAY)
    assert sorted(manifest.shards) == ["s0", "s1", "small"]
    for name, report in manifest.shards.items():
        files = {suffix: sha256_file(tmp_path / "a" / f"{name}{suffix}") for suffix in LineWorker.suffixes}
        assert report.files == files
    assert len(calls(tmp_path / "a")) == 5, "two shards of two pieces, one of one"


def made_pieces(folder: Path, num_workers: int) -> tuple[ShardDirectory, list[JoinedParts | None]]:
    """Make all pieces of a source, as a run that was then killed; returns what each of them has joined."""
    output = ShardDirectory(folder)
    sources = make_sources(1, 50)
    pieces = cut_into_pieces(sources, output, num_workers=num_workers, samples_per_slice=8)
    with claimed(output) as claim:
        config = {"calls": f"{folder}.calls"}
        runner = PieceRunner(LineWorker, config, pieces, fingerprint=FINGERPRINT, max_attempts=3, claim=claim)
        joined = [runner.run(index, on_slice=lambda _: None).joined for index in reversed(range(len(pieces)))]
    return output, joined


def test_the_last_piece_of_a_shard_joins_it_and_a_killed_runs_join_is_made_anew(tmp_path) -> None:
    run(tmp_path / "undisturbed", make_sources(1, 50))
    output, joined = made_pieces(tmp_path / "a", num_workers=8)
    assert [whole is not None for whole in joined] == [False] * 6 + [True]
    whole, folder = joined[-1], tmp_path / "a" / ".parts" / "s0"
    assert whole is not None
    for suffix in LineWorker.suffixes:
        assert whole.path(folder, suffix).read_bytes() == (tmp_path / "undisturbed" / f"s0{suffix}").read_bytes()
    # The run is killed while it puts the joined files in place: one is, the other is not.
    whole.path(folder, ".txt").replace(output.file("s0", ".txt"))
    run(tmp_path / "a", make_sources(1, 50))
    assert len(calls(tmp_path / "a")) == 7, "no piece is made again"
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("num_workers", [1, 8])
def test_pieces_of_runs_before_there_were_hashes_go_on(tmp_path, num_workers: int) -> None:
    output, _ = made_pieces(tmp_path / "a", num_workers=num_workers)
    for path in (tmp_path / "a" / ".parts" / "s0").iterdir():
        if path.name.startswith("joined"):
            path.unlink()
        if path.suffix == ".report":
            content = json.loads(path.read_text())
            del content["report"]["files"]
            path.write_text(json.dumps(content))
    source = make_sources(1, 50)[0]
    assert finished_pieces(source, output, FINGERPRINT, LineWorker.suffixes, samples_per_slice=8)
    before = calls(tmp_path / "a")
    run(tmp_path / "a", [source])
    assert calls(tmp_path / "a") == before
    run(tmp_path / "undisturbed", [source])
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")
