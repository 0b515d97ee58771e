"""Units of work: a source file, the piece of it one worker takes, and how pieces become a finished shard again."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pipelines.manifest import Fingerprint, ShardReport, StageDirectory
from pipelines.storage import atomic_write_json, sha256_file

PARTS_FOLDER = ".parts"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file: `identity` changes when its content does, `num_samples` counts all of its samples."""

    name: str
    path: str
    identity: str
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The samples [start, stop) of a source, and the folder its part files go to."""

    source: Source
    start: int
    stop: int
    folder: Path
    samples_per_slice: int

    def output(self, suffix: str) -> Path:
        """Return the path of this piece's part file; write it with `atomic_file`."""
        return self.folder / f"{self.start:09d}-{self.stop:09d}{suffix}"

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each slice, cut at multiples of `samples_per_slice`.

        A batch must not cross a slice: then the bytes do not depend on how a shard was cut into pieces.
        """
        for start in range(self.start, self.stop, self.samples_per_slice):
            yield start, min(start + self.samples_per_slice, self.stop)


@dataclass(frozen=True, kw_only=True)
class PieceReport:
    """What happened to the samples of a piece.

    Over a shard's pieces, numbers in `details` are summed; of those called `max_*` the largest is taken.

    `wait_seconds` is how long the device waited for data: it is shown, and never written.
    """

    num_read: int
    num_kept: int
    rejected: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0


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
    sources: Sequence[Source], output: StageDirectory, *, num_workers: int, samples_per_slice: int
) -> list[Piece]:
    """Give every worker something to do: whole shards when there are enough, slices of shards otherwise."""
    cuts_per_source = max(1, math.ceil(2 * num_workers / max(1, len(sources))))
    pieces = []
    for source in sources:
        num_slices = max(1, math.ceil(source.num_samples / samples_per_slice))
        slices_per_piece = math.ceil(num_slices / min(cuts_per_source, num_slices))
        step = slices_per_piece * samples_per_slice
        for start in range(0, max(1, source.num_samples), step):
            pieces.append(
                Piece(
                    source=source,
                    start=start,
                    stop=min(start + step, source.num_samples),
                    folder=(output.path / PARTS_FOLDER / source.name).absolute(),
                    samples_per_slice=samples_per_slice,
                )
            )
    return pieces


def read_piece_report(piece: Piece, fingerprint: Fingerprint, suffixes: Sequence[str]) -> PieceReport | None:
    """Return the report of a piece that an earlier, interrupted run finished under the same settings, or None.

    A run killed while it put a shard in place has moved some of the part files: such a piece is not finished.
    """
    path = piece.output(".report")
    if not path.is_file() or not all(piece.output(suffix).is_file() for suffix in suffixes):
        return None
    content = json.loads(path.read_text())
    if content["fingerprint"] != fingerprint.digest or content["source"] != piece.source.identity:
        return None
    return PieceReport(**content["report"])


def write_piece_report(piece: Piece, report: PieceReport, fingerprint: Fingerprint) -> None:
    """Declare a piece finished, after its part files are in place."""
    settled = dataclasses.replace(report, wait_seconds=0.0, busy_seconds=0.0)
    content = {"fingerprint": fingerprint.digest, "source": piece.source.identity}
    atomic_write_json(piece.output(".report"), {**content, "report": dataclasses.asdict(settled)})


def finish_shard(
    worker_class: type[ShardWorker],
    pieces: Sequence[tuple[Piece, PieceReport]],
    output: StageDirectory,
    *,
    fingerprint: Fingerprint,
) -> ShardReport:
    """Join the parts of one shard, put its files in place, write its marker last, and drop the parts."""
    source = pieces[0][0].source
    outputs = {suffix: output.file(source.name, suffix) for suffix in worker_class.suffixes}
    parts = [{suffix: piece.output(suffix) for suffix in outputs} for piece, _ in pieces]
    joined = parts[0]
    if len(parts) > 1:
        joined = {suffix: pieces[0][0].folder / f"joined{suffix}" for suffix in outputs}
        worker_class.join(parts, joined)
    for suffix, path in outputs.items():
        joined[suffix].replace(path)
    report = _sum_reports(source, [report for _, report in pieces], outputs)
    output.write_marker(report, fingerprint)
    shutil.rmtree(pieces[0][0].folder)
    return report


def _sum_reports(source: Source, reports: Sequence[PieceReport], outputs: Mapping[str, Path]) -> ShardReport:
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
        files={suffix: sha256_file(path) for suffix, path in outputs.items()},
        details=details,
    )
