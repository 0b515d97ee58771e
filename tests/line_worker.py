"""A worker without a model, and a command that runs it: `python -m tests.line_worker OUTPUT SETTINGS`."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from errors import UserError
from pipelines.command import run_command
from pipelines.engine.pieces import Piece, PieceReport, Source
from pipelines.engine.run import EngineConfig, run_over_shards
from pipelines.store.files import atomic_file
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory

IN_PROCESS = EngineConfig(in_process=True, samples_per_slice=8)
ON_RAY = EngineConfig(num_workers=2, samples_per_slice=8)


class LineWorker:
    """Writes two files: a line per sample with a blank one after each slice, and the slices; every 10th is rejected."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".slices")

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def __call__(self, piece: Piece) -> PieceReport:
        with Path(self.config["calls"]).open("a") as calls:
            calls.write(f"{piece.source.name} {piece.start}\n")
        while "waits_for" in self.config and not Path(self.config["waits_for"]).exists():
            time.sleep(0.02)
        if piece.source.name == self.config.get("kills"):
            os.kill(os.getpid(), 9)
        if piece.source.name == self.config.get("fails"):
            raise UserError("features.dtype fp16 is refused")
        with atomic_file(piece.output(".txt")) as path, path.open("w") as file:
            for start, stop in piece.slices():
                time.sleep(self.config.get("seconds_per_slice", 0.0))
                file.writelines(f"{self.config.get('word', '')}{piece.source.name} {i}\n" for i in range(start, stop))
                file.write("\n")
        with atomic_file(piece.output(".slices")) as path:
            path.write_text("".join(f"{start} {stop}\n" for start, stop in piece.slices()))
        num_read = piece.stop - piece.start
        num_rejected = sum(index % 10 == 0 for index in range(piece.start, piece.stop))
        return PieceReport(
            num_read=num_read,
            num_kept=num_read - num_rejected,
            rejected={self.config.get("reason", "tenth"): num_rejected} if num_rejected else {},
            details={"bytes": num_read},
            wait_seconds=1.0,
            busy_seconds=3.0,
        )

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        for suffix, output in outputs.items():
            output.write_text("".join(part[suffix].read_text() for part in parts))


def make_sources(count: int, num_samples: int) -> list[Source]:
    return [
        Source(name=f"s{index}", path="", identity=f"id{index}", num_samples=num_samples - index)
        for index in range(count)
    ]


def run(
    output: Path,
    sources: Sequence[Source],
    *,
    engine: EngineConfig = IN_PROCESS,
    limit: float = 0.5,
    settings: Mapping[str, Any] | None = None,
    version: int = 1,
    worker_class: type[LineWorker] = LineWorker,
) -> Manifest:
    return run_over_shards(
        worker_class,
        {"calls": f"{output}.calls", **(settings or {})},
        sources=sources,
        output=ShardDirectory(output),
        fingerprint=Fingerprint.of({"version": version}),
        engine=engine,
        max_reject_fraction=limit,
        room="test",
    )


def calls(output: Path) -> list[str]:
    return Path(f"{output}.calls").read_text().splitlines()


def contents(folder: Path) -> dict[str, bytes | None]:
    """The bytes of every file of a directory, hidden ones too, and its folders."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def command(output: Path, **settings: Any) -> list[str]:
    """What to type for `main`; settings: engine, count, num_samples, and those of the worker."""
    return [sys.executable, "-m", "tests.line_worker", str(output), json.dumps(settings)]


def main() -> None:
    settings = json.loads(sys.argv[2])
    engine = EngineConfig(**settings.pop("engine"))
    sources = make_sources(settings.pop("count"), settings.pop("num_samples"))
    run(Path(sys.argv[1]), sources, engine=engine, settings=settings)


if __name__ == "__main__":
    # Named as Ray's workers import it, which know no `__main__` of the driver's.
    from tests import line_worker

    sys.exit(run_command("test", line_worker.main))
