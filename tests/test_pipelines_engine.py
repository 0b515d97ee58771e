import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from pipelines.engine import EngineConfig, QuarantinedShardError, run_over_shards
from pipelines.manifest import Fingerprint, Manifest, StageDirectory, read_manifest
from pipelines.pieces import Piece, PieceReport, Source, cut_into_pieces
from pipelines.storage import atomic_file

IN_PROCESS = EngineConfig(in_process=True, samples_per_slice=8)
ON_RAY = EngineConfig(num_workers=2, samples_per_slice=8)


class LineWorker:
    """Writes one line per sample, and a blank line after each slice; every 10th sample is rejected."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    def __init__(self, config: dict) -> None:
        self.config = config

    def __call__(self, piece: Piece) -> PieceReport:
        with Path(self.config["calls"]).open("a") as calls:
            calls.write(f"{piece.source.name} {piece.start}\n")
        if piece.source.name == self.config.get("kills"):
            os.kill(os.getpid(), 9)
        if piece.source.name == self.config.get("fails"):
            raise ValueError("features.dtype fp16 is refused")
        with atomic_file(piece.output(".txt")) as path, path.open("w") as file:
            for start, stop in piece.slices():
                file.writelines(f"{piece.source.name} {index}\n" for index in range(start, stop))
                file.write("\n")
        num_read = piece.stop - piece.start
        num_rejected = sum(index % 10 == 0 for index in range(piece.start, piece.stop))
        rejected = {"tenth": num_rejected} if num_rejected else {}
        return PieceReport(
            num_read=num_read, num_kept=num_read - num_rejected, rejected=rejected, details={"bytes": num_read}
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        outputs[".txt"].write_text("".join(part[".txt"].read_text() for part in parts))


@pytest.fixture
def sources() -> list[Source]:
    return [Source(name=f"s{index}", path="", identity=f"id{index}", num_samples=50 - index) for index in range(3)]


def run(tmp_path, folder: str, sources, *, engine=IN_PROCESS, limit=0.5, settings=None, version=1) -> Manifest:
    config = {"calls": str(tmp_path / f"{folder}.calls"), **(settings or {})}
    return run_over_shards(
        LineWorker,
        config,
        sources=sources,
        output=StageDirectory(tmp_path / folder),
        fingerprint=Fingerprint.of({"version": version}),
        engine=engine,
        max_reject_fraction=limit,
        room="test",
    )


def calls(tmp_path, folder: str) -> list[str]:
    return (tmp_path / f"{folder}.calls").read_text().splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_two_processes_cannot_write_one_directory(tmp_path, sources) -> None:
    script = (
        "import sys; from pathlib import Path; from pipelines.storage import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is being written by another process"):
            run(tmp_path, "a", sources)
        holder.kill()
    assert run(tmp_path, "a", sources).num_read == 147


def test_cutting_changes_no_byte_and_counts_balance(tmp_path, sources) -> None:
    """One worker takes whole shards, two Ray workers take pieces of two shards: the same files either way."""
    one = run(tmp_path, "one", sources[:2])
    two = run(tmp_path, "two", sources[:2], engine=ON_RAY)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one == two
    assert (one.num_read, one.num_kept, one.rejected) == (99, 89, {"tenth": 10})
    assert len(calls(tmp_path, "two")) > len(calls(tmp_path, "one"))
    assert one.shards["s0"].details == {"bytes": 50}


def test_a_third_run_does_nothing_and_a_change_redoes_just_what_it_must(tmp_path, sources) -> None:
    run(tmp_path, "a", sources)
    first = calls(tmp_path, "a")
    run(tmp_path, "a", sources)
    assert calls(tmp_path, "a") == first
    changed = [sources[0], dataclasses.replace(sources[1], identity="new"), sources[2]]
    run(tmp_path, "a", changed)
    redone = calls(tmp_path, "a")[len(first) :]
    assert {line.split()[0] for line in redone} == {"s1"}
    run(tmp_path, "a", changed, version=2)
    redone = calls(tmp_path, "a")[len(first) + len(redone) :]
    assert {line.split()[0] for line in redone} == {"s0", "s1", "s2"}


def test_an_interrupted_run_keeps_its_finished_pieces(tmp_path, sources) -> None:
    with pytest.raises(ValueError, match="fp16 is refused"):
        run(tmp_path, "a", sources, settings={"fails": "s1"})
    before = calls(tmp_path, "a")
    assert not (tmp_path / "a" / "manifest.json").exists()
    run(tmp_path, "a", sources)
    redone = calls(tmp_path, "a")[len(before) :]
    assert {line.split()[0] for line in redone} == {"s1", "s2"}
    run(tmp_path, "undisturbed", sources)
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def test_a_shard_that_kills_its_workers_is_quarantined_and_the_rest_is_done(tmp_path, sources) -> None:
    with pytest.raises(QuarantinedShardError, match="after 3 attempts that killed the worker: s1"):
        run(tmp_path, "a", sources, engine=ON_RAY, settings={"kills": "s1"})
    directory = StageDirectory(tmp_path / "a")
    done = [source.name for source in sources if directory.report(source.name, Fingerprint.of({"version": 1}))]
    assert done == ["s0", "s2"]


def test_a_users_mistake_in_a_ray_worker_reads_as_without_ray(tmp_path, sources) -> None:
    with pytest.raises(ValueError) as error:
        run(tmp_path, "a", sources, engine=ON_RAY, settings={"fails": "s2"})
    assert str(error.value) == "features.dtype fp16 is refused"
    assert "in a worker process" in error.value.__notes__[0]


def test_too_many_rejects_fail_by_name_and_keep_the_work(tmp_path, sources) -> None:
    with pytest.raises(
        ValueError, match=r"15 of 147 samples rejected \(10\.2%\).*max_reject_fraction = 5\.0%: tenth 15"
    ):
        run(tmp_path, "a", sources, limit=0.05)
    before = calls(tmp_path, "a")
    run(tmp_path, "a", sources, limit=0.2)
    assert calls(tmp_path, "a") == before
    assert read_manifest(tmp_path / "a").num_read == 147
    with pytest.raises(ValueError, match=r"max_reject_fraction = 5\.0%"):
        run(tmp_path, "a", sources, limit=0.05)


def test_pieces_cover_every_sample_once_for_any_number_of_workers(tmp_path, sources) -> None:
    directory = StageDirectory(tmp_path)
    for num_workers in (1, 2, 3, 8, 64):
        pieces = cut_into_pieces(sources, directory, num_workers=num_workers, samples_per_slice=8)
        covered = [(piece.source.name, index) for piece in pieces for index in range(piece.start, piece.stop)]
        assert covered == [(source.name, index) for source in sources for index in range(source.num_samples)]
        assert all(piece.start % 8 == 0 for piece in pieces)


def test_an_empty_shard_is_a_done_shard(tmp_path) -> None:
    empty = Source(name="empty", path="", identity="e", num_samples=0)
    manifest = run(tmp_path, "a", [empty])
    assert manifest.shards["empty"].num_read == 0


def test_a_run_killed_between_moving_files_and_marking_them_redoes_the_shard(tmp_path, sources, monkeypatch) -> None:
    def die(*_) -> None:
        raise RuntimeError("killed here")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed here"):
        patch.setattr(StageDirectory, "write_marker", die)
        run(tmp_path, "a", sources)
    assert run(tmp_path, "a", sources).num_read == 147


@pytest.mark.parametrize("delay_seconds", [0.0, 0.3])
def test_a_killed_driver_leaves_nothing_that_looks_whole(tmp_path, delay_seconds: float) -> None:
    """kill -9 while a shard is being written; the rerun's bytes equal an undisturbed run's."""
    script = (
        "import sys, os, threading; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "import test_pipelines_engine as t\n"
        f"threading.Timer({delay_seconds}, lambda: os.kill(os.getpid(), 9)).start()\n"
        "sources = [t.Source(name=f's{i}', path='', identity='x', num_samples=20000) for i in range(40)]\n"
        "t.run(Path(sys.argv[1]), 'a', sources)\n"
    )
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=False)
    assert process.returncode == -9
    sources = [Source(name=f"s{index}", path="", identity="x", num_samples=20000) for index in range(40)]
    run(tmp_path, "a", sources)
    run(tmp_path, "b", sources)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
