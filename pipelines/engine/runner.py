"""What lives in a worker process: it holds the loaded worker, counts attempts on disk, and declares pieces finished."""

import contextlib
import dataclasses
import os
import re
import resource
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError, memory_for
from pipelines.engine.pieces import (
    PARTS_FOLDER,
    JoinedParts,
    Piece,
    PieceReport,
    ShardWorker,
    hash_files,
    join_if_last,
    write_piece_report,
)
from pipelines.store.files import discard, fsync_directory, own_files
from pipelines.store.manifest import Fingerprint, ShardDirectory

_CLAIM_NAME = re.compile(r"\.claim-[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class PieceOutcome:
    """What became of a piece: `attempt` names its part files; `report` is None when it killed too many workers.

    `num_deaths` counts the workers that died with it; `joined` is the whole shard, if this was its last piece.
    """

    attempt: str
    report: PieceReport | None
    num_deaths: int
    joined: JoinedParts | None = None


@contextlib.contextmanager
def claimed(output: ShardDirectory) -> Iterator[Path]:
    """Yield a new file in `output`, the claim of this driver.

    A worker looks for the claim of its driver before it starts on a piece. The name is random and never used again, so
    that no node's cache of file names can be stale.
    """
    folder = (output.path / PARTS_FOLDER).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    claim = folder / f".claim-{secrets.token_hex(8)}"
    claim.touch()
    fsync_directory(folder)
    try:
        yield claim
    finally:
        discard(claim)


def drop_claims(output: ShardDirectory) -> None:
    """Remove the claims of drivers that were killed, so that workers which outlive them stop."""
    for stale in own_files(output.path / PARTS_FOLDER, _CLAIM_NAME):
        discard(stale)


class PieceRunner:
    """Runs pieces one after another; cheap to make, as the worker is loaded with the first piece."""

    def __init__(
        self,
        worker_class: type[ShardWorker],
        config: Any,
        pieces: Sequence[Piece],
        *,
        fingerprint: Fingerprint,
        max_attempts: int,
        claim: Path,
        memory_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._worker_class = worker_class
        self._config = config
        self._worker: ShardWorker | None = None
        self._pieces = pieces
        self._fingerprint = fingerprint
        self._max_attempts = max_attempts
        self._claim = claim
        self._memory_settings = memory_settings or {}

    @property
    def directory(self) -> Path:
        """The directory that the pieces belong to."""
        return self._claim.parent.parent

    def run(self, index: int, *, on_slice: Callable[[int], None]) -> PieceOutcome:
        """Run piece `index`, unless it has killed `max_attempts` workers; `on_slice` is told of its samples done.

        Raises:
            UserError: this node does not see the claim of the driver.
            MemoryShortageError: names the piece, and which of `memory_settings` to lower.
            Whatever the worker raises.
        """
        self._require_claim()
        piece = dataclasses.replace(self._pieces[index], attempt=secrets.token_hex(4), on_slice=on_slice)
        piece.folder.mkdir(parents=True, exist_ok=True)
        attempts = piece.folder / f"{piece.span}.attempts"
        num_deaths = attempts.stat().st_size if attempts.is_file() else 0
        if num_deaths >= self._max_attempts:
            return PieceOutcome(attempt=piece.attempt, report=None, num_deaths=num_deaths)
        place = f"{self.directory}: {piece.source.name}, samples {piece.start:,} to {piece.stop:,}"
        with memory_for(place, self._memory_settings), _counted(attempts, num_before=num_deaths):
            _reset_peak_memory()
            self._worker = self._worker or self._worker_class(self._config)
            report = dataclasses.replace(self._worker(piece), peak_memory_bytes=_peak_memory_bytes())
            if piece.is_whole:
                report = dataclasses.replace(report, files=hash_files(piece, self._worker_class.suffixes))
            self._require_claim()
            write_piece_report(piece, report, self._fingerprint)
            joined = None
            if not piece.is_whole:
                joined = join_if_last(self._worker_class, piece, ShardDirectory(self.directory), self._fingerprint)
        return PieceOutcome(attempt=piece.attempt, report=report, num_deaths=num_deaths, joined=joined)

    def _require_claim(self) -> None:
        if self._claim.is_file():
            return
        raise UserError(
            f"a worker on {socket.gethostname()} does not see {self._claim}: RUN must be on storage that all nodes "
            "share, under one path (or another command has taken over, and this worker is a leftover)"
        )


@contextlib.contextmanager
def _counted(attempts: Path, *, num_before: int) -> Iterator[None]:
    """Count an attempt before it begins; one that ends in an exception, Ctrl-C too, has killed nobody.

    A finished piece has no count: whatever becomes of its report, nobody died with it.
    """
    with attempts.open("ab") as file:
        file.write(b".")
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.truncate(attempts, num_before)
        raise
    discard(attempts)


def _reset_peak_memory() -> None:
    # Linux alone can forget an earlier peak; elsewhere the peak is that of the process so far.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
