"""Units of work: a source file, the piece of it one worker takes, and how pieces become a finished shard again."""

import contextlib
import dataclasses
import math
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.store.files import (
    TEMPORARY_NAME,
    atomic_file,
    atomic_write_json,
    discard,
    discard_folder,
    fsync_directory,
    own_files,
    put_in_place,
    sha256_file,
)
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from pipelines.store.state_files import read_state, state_of

PARTS_FOLDER = ".parts"
_SPAN = r"(\d{9,})-(\d{9,})"
REPORT_NAME = re.compile(rf"{_SPAN}(?:\.[0-9a-f]{{8}})?\.report")
ATTEMPTS_NAME = re.compile(rf"{_SPAN}\.attempts")
_PART_NAME = re.compile(rf"({_SPAN}|joined)(\.[0-9a-f]{{8}})?\.[a-z.]+|{TEMPORARY_NAME.pattern}", re.DOTALL)

log = get_logger("engine")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file: `identity` changes when its content does, `num_samples` counts all of its samples."""

    name: str
    path: str
    identity: str
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The samples [start, stop) of a source, and the folder its part files go to.

    `attempt` is part of the files' names: a worker that outlives its killed driver never writes into the files of the
    worker that does the piece again. `on_slice` is told how many samples of the piece are done. `wanted` says of each
    sample of the piece whether it is looked at: others are rejects, `not_chosen`.
    """

    source: Source
    start: int
    stop: int
    folder: Path
    samples_per_slice: int
    attempt: str = ""
    on_slice: Callable[[int], None] | None = field(default=None, repr=False, compare=False)
    wanted: Sequence[bool] | None = field(default=None, repr=False, compare=False)

    @property
    def is_whole(self) -> bool:
        """Whether these are all samples of the source."""
        return (self.start, self.stop) == (0, self.source.num_samples)

    @property
    def span(self) -> str:
        """The piece's samples as its files are named."""
        return f"{self.start:09d}-{self.stop:09d}"

    def output(self, suffix: str) -> Path:
        """Return the path of this piece's part file; write it with `atomic_file`."""
        return self.folder / (self.span + (f".{self.attempt}" if self.attempt else "") + suffix)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each slice, cut at multiples of `samples_per_slice`.

        A batch must not cross a slice: then the bytes do not depend on how a shard was cut into pieces. Asking for
        the next slice says that the last one is done.
        """
        for start in range(self.start, self.stop, self.samples_per_slice):
            if self.on_slice is not None and start > self.start:
                self.on_slice(start - self.start)
            yield start, min(start + self.samples_per_slice, self.stop)


@dataclass(frozen=True, kw_only=True)
class PieceReport:
    """What happened to the samples of a piece.

    Over a shard's pieces, numbers in `details` are summed; of those called `max_*` the largest is taken.

    `wait_seconds` is how long the device waited for data; it, `busy_seconds` and `peak_memory_bytes` (resident, filled
    in by the engine) are shown, and never written. `files` (suffix -> SHA-256) is filled in by the engine for a piece
    that is all of its shard.
    """

    num_read: int
    num_kept: int
    rejected: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0
    peak_memory_bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JoinedParts:
    """The files of a shard of several pieces, joined under names with `attempt` in them; `files` is suffix -> SHA-256.

    The shard's last worker makes them, so that one driver need not read all that its workers have written.
    """

    attempt: str
    files: dict[str, str]

    def path(self, folder: Path, suffix: str) -> Path:
        """Return the path of a joined file in the folder of parts."""
        return folder / f"joined.{self.attempt}{suffix}"


class ShardWorker(Protocol):
    """What the engine runs: a plain class that loads its model once and then turns pieces into part files.

    Attributes:
        suffixes: the files a finished shard consists of, such as `(".tar", ".parquet")`.
    """

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any) -> None: ...

    def __call__(self, piece: Piece) -> PieceReport:
        """Write `piece.output(suffix)` for every suffix."""
        ...

    @staticmethod
    def join(parts: Sequence[Mapping[str, Path]], outputs: Mapping[str, Path]) -> None:
        """Concatenate the parts of a shard (suffix -> path, in order) into `outputs`."""
        ...


def cut_into_pieces(
    sources: Sequence[Source],
    output: ShardDirectory,
    *,
    num_workers: int,
    samples_per_slice: int,
    finished: Mapping[str, Sequence[Piece]] | None = None,
) -> list[Piece]:
    """Give every worker something to do: whole shards when there are enough, slices of shards otherwise.

    What `finished` (source name -> its finished pieces in order) covers is not cut again.
    """
    cuts_per_source = max(1, math.ceil(2 * num_workers / max(1, len(sources))))
    pieces = []
    for source in sources:
        num_slices = max(1, math.ceil(source.num_samples / samples_per_slice))
        step = math.ceil(num_slices / min(cuts_per_source, num_slices)) * samples_per_slice
        for gap_start, gap_stop in _gaps(source.num_samples, (finished or {}).get(source.name, ())):
            pieces += [
                Piece(
                    source=source,
                    start=start,
                    stop=min(start + step, gap_stop),
                    folder=_parts_folder(source, output),
                    samples_per_slice=samples_per_slice,
                )
                for start in range(gap_start, max(gap_start + 1, gap_stop), step)
            ]
    return pieces


def _parts_folder(source: Source, output: ShardDirectory) -> Path:
    return (output.path / PARTS_FOLDER / source.name).absolute()


def _gaps(num_samples: int, finished: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    position = 0
    for piece in finished:
        if piece.start > position:
            yield position, piece.start
        position = piece.stop
    if position < num_samples or not finished:
        yield position, num_samples


def finished_pieces(
    source: Source,
    output: ShardDirectory,
    fingerprint: Fingerprint,
    suffixes: Sequence[str],
    *,
    samples_per_slice: int,
) -> list[tuple[Piece, PieceReport]]:
    """Return the pieces of a source that earlier, interrupted runs finished under the same settings, in order.

    They count however those runs cut the source: with another number of workers it is cut at other places. A run killed
    while it put a shard in place has moved some of the part files, and their pieces are not finished.
    """
    folder = _parts_folder(source, output)
    found: list[tuple[Piece, PieceReport]] = []
    for path in piece_reports(output, source.name):
        try:
            note = read_piece_note(path)
        except UserError as error:
            log.warning(str(error))
            discard(path)
            continue
        if (note.fingerprint, note.source) != (fingerprint.digest, source.identity):
            continue
        piece = Piece(source=source, folder=folder, **dataclasses.asdict(note.piece))
        is_whole = piece.samples_per_slice == samples_per_slice and all(piece.output(s).is_file() for s in suffixes)
        if is_whole and piece.start >= (found[-1][0].stop if found else 0):
            found.append((piece, note.report))
    return found


def begun_attempts(source: Source, output: ShardDirectory, finished: Sequence[Piece]) -> list[Path]:
    """Return the counts of attempts at pieces of a source that have begun and are not among `finished`.

    A worker that raises takes its attempt back, so these are of workers that died, with their driver or without.
    """
    folder, spans = _parts_folder(source, output), {piece.span for piece in finished}
    return [path for path in own_files(folder, ATTEMPTS_NAME) if path.stem not in spans]


@dataclass(frozen=True, kw_only=True)
class PieceSpan:
    """Which samples a finished piece has, see `Piece`."""

    start: int
    stop: int
    samples_per_slice: int
    attempt: str


@dataclass(frozen=True, kw_only=True)
class PieceNote:
    """What stands in a `.report` beside the part files of a finished piece."""

    fingerprint: str
    source: str
    piece: PieceSpan
    report: PieceReport


def piece_reports(output: ShardDirectory, name: str) -> list[Path]:
    """Return the files that say which pieces of the source `name` are finished, in the order of their samples."""
    return own_files(output.path / PARTS_FOLDER / name, REPORT_NAME)


def all_piece_reports(output: ShardDirectory) -> list[Path]:
    """Return what `piece_reports` does, of every source that has parts."""
    folder = output.path / PARTS_FOLDER
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [path for name in names for path in piece_reports(output, name)]


def read_piece_note(path: Path) -> PieceNote:
    """Return what one of `piece_reports` says.

    Raises:
        UserError: it is damaged; names it.
    """
    mend = "its samples are done again"
    return state_of(PieceNote, read_state(path, mend=mend), where=str(path), mend=mend)


def drop_parts(folder: Path) -> None:
    """Remove the part files of a source that is done; what the house has not written there stays.

    What cannot be removed now, such as a file an orphaned worker holds open on NFS, goes with the next run.
    """
    for path in own_files(folder, _PART_NAME):
        discard(path)
    discard_folder(folder)


def forget_pieces(name: str, output: ShardDirectory) -> None:
    """Let a source's finished pieces count as not done: a run that takes the source makes them anew."""
    for path in piece_reports(output, name):
        path.unlink(missing_ok=True)


def write_piece_report(piece: Piece, report: PieceReport, fingerprint: Fingerprint) -> None:
    """Declare a piece finished, after its part files are in place."""
    settled = dataclasses.replace(report, wait_seconds=0.0, busy_seconds=0.0, peak_memory_bytes=0)
    content = {
        "fingerprint": fingerprint.digest,
        "source": piece.source.identity,
        "piece": {name: getattr(piece, name) for name in ("start", "stop", "samples_per_slice", "attempt")},
        "report": dataclasses.asdict(settled),
    }
    atomic_write_json(piece.output(".report"), content)


def hash_files(piece: Piece, suffixes: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of a piece's part files by suffix."""
    return {suffix: sha256_file(piece.output(suffix)) for suffix in suffixes}


def join_if_last(
    worker_class: type[ShardWorker], piece: Piece, output: ShardDirectory, fingerprint: Fingerprint
) -> JoinedParts | None:
    """Join and hash the parts of a shard if `piece`, just finished, was the last that it lacked.

    Of two that end at once both may do it, under names of their own. None may, where a node sees the other's files
    late: then the driver does.
    """
    if not _are_covered(piece):
        return None
    found = finished_pieces(
        piece.source, output, fingerprint, worker_class.suffixes, samples_per_slice=piece.samples_per_slice
    )
    pieces = [finished for finished, _ in found]
    if list(_gaps(piece.source.num_samples, pieces)):
        return None
    return _join(worker_class, pieces)


def _are_covered(piece: Piece) -> bool:
    """Whether there are reports over all samples of a piece's source, by their names: cheap to ask after each piece."""
    names = [REPORT_NAME.fullmatch(path.name) for path in piece.folder.iterdir()]
    position = 0
    for start, stop in sorted((int(name[1]), int(name[2])) for name in names if name):
        if start > position:
            return False
        position = max(position, stop)
    return position >= piece.source.num_samples


def _join(worker_class: type[ShardWorker], pieces: Sequence[Piece]) -> JoinedParts:
    folder = pieces[0].folder
    joined = JoinedParts(attempt=secrets.token_hex(4), files={})
    paths = {suffix: joined.path(folder, suffix) for suffix in worker_class.suffixes}
    parts = [{suffix: piece.output(suffix) for suffix in paths} for piece in pieces]
    with contextlib.ExitStack() as stack:
        worker_class.join(parts, {suffix: stack.enter_context(atomic_file(path)) for suffix, path in paths.items()})
    return dataclasses.replace(joined, files={suffix: sha256_file(path) for suffix, path in paths.items()})


def finish_shard(
    worker_class: type[ShardWorker],
    pieces: Sequence[tuple[Piece, PieceReport]],
    output: ShardDirectory,
    *,
    fingerprint: Fingerprint,
    joined: JoinedParts | None = None,
) -> ShardReport:
    """Remove a stale marker, put the shard's files in place, write its marker last, and drop the parts, given in order.

    A worker has joined and hashed them; what an earlier run's has not is done here.
    """
    source, folder = pieces[0][0].source, pieces[0][0].folder
    if len(pieces) == 1:
        piece, report = pieces[0]
        files = report.files or hash_files(piece, worker_class.suffixes)
        paths = {suffix: piece.output(suffix) for suffix in files}
    else:
        joined = joined or _join(worker_class, [piece for piece, _ in pieces])
        files = joined.files
        paths = {suffix: joined.path(folder, suffix) for suffix in files}
    output.clear_marker(source.name)
    for suffix, path in paths.items():
        put_in_place(path, output.file(source.name, suffix))
    # The marker must not reach the disk before the files it speaks of.
    fsync_directory(output.path)
    report = _sum_reports(source, [report for _, report in pieces], files)
    output.write_marker(report, fingerprint)
    drop_parts(folder)
    return report


def _sum_reports(source: Source, reports: Sequence[PieceReport], files: Mapping[str, str]) -> ShardReport:
    rejected: Counter[str] = Counter()
    details: dict[str, Any] = {}
    for report in reports:
        rejected.update(report.rejected)
        for key, value in report.details.items():
            if key in details:
                value = max(details[key], value) if key.startswith("max_") else details[key] + value
            details[key] = value
    return ShardReport(
        name=source.name,
        source=source.identity,
        num_read=sum(report.num_read for report in reports),
        num_kept=sum(report.num_kept for report in reports),
        rejected=dict(sorted(rejected.items())),
        files=dict(files),
        details=details,
    )
