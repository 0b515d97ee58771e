"""`run_over_shards`: map a worker over shards with a Ray Data actor pool; resume, retry, quarantine, and account."""

import contextlib
import json
import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pydantic

from pipelines.manifest import MANIFEST_NAME, Fingerprint, Manifest, StageDirectory, read_manifest
from pipelines.pieces import (
    Piece,
    PieceReport,
    ShardWorker,
    Source,
    cut_into_pieces,
    finish_shard,
    read_piece_report,
    write_piece_report,
)
from pipelines.progress import ProgressBar, get_logger, progress_bar
from pipelines.recipe import StageConfig
from pipelines.storage import exclusive

log = get_logger("engine")


class EngineConfig(StageConfig):
    """`[engine]`: how work is spread; none of it changes a byte of the outputs but `samples_per_slice`."""

    num_workers: int = pydantic.Field(
        default=0, ge=0, description="Worker processes; 0 = one per GPU, or one per CPU core where there is no GPU"
    )
    cpus_per_worker: float = pydantic.Field(default=1.0, gt=0, description="CPU cores Ray reserves for each worker")
    gpus_per_worker: float = pydantic.Field(
        default=0.0, ge=0, description="GPUs Ray reserves for each worker; 0.5 puts two workers on one GPU"
    )
    samples_per_slice: int = pydantic.Field(
        default=256, ge=1, description="Samples that are batched together; shards are cut only between slices"
    )
    max_shard_attempts: int = pydantic.Field(
        default=3, ge=1, description="Workers a shard may kill before it is put in quarantine"
    )
    in_process: bool = pydantic.Field(
        default=False, description="Run the worker in this process, without Ray: for debugging and tests"
    )


class QuarantinedShardError(ValueError):
    """Some shards killed every worker that took them; names them."""


def run_over_shards(
    worker_class: type[ShardWorker],
    config: Any,
    *,
    sources: Sequence[Source],
    output: StageDirectory,
    fingerprint: Fingerprint,
    engine: EngineConfig,
    max_reject_fraction: float,
    room: str,
    upstream: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Manifest:
    """Run `worker_class(config)` over every source that is not done yet and write the directory's manifest.

    Rerunning continues where an earlier run stopped: finished shards and finished pieces of shards are kept.
    `room` names the caller in the progress view; `upstream` and `extra` go into the manifest as they are.

    Raises:
        QuarantinedShardError: a shard killed its worker `engine.max_shard_attempts` times; the others are done.
        ValueError: more than `max_reject_fraction` of all samples were rejected; names the three largest reasons.
            Or another process is writing `output`.
    """
    pending = [source for source in sources if not output.is_done(source.name, source.identity, fingerprint)]
    if not pending and (output.path / MANIFEST_NAME).is_file():
        manifest = read_manifest(output.path)
        wanted = {source.name for source in sources}
        if manifest.fingerprint.digest == fingerprint.digest and wanted <= manifest.shards.keys():
            _require_few_rejects(output, sources, fingerprint, max_reject_fraction=max_reject_fraction)
            get_logger(room).info(f"nothing to do: all {len(sources)} shards of {output.path} are done")
            return manifest
    with exclusive(output.path):
        for source in pending:
            output.clear_marker(source.name)
        if pending:
            _run_pending(worker_class, config, pending, output, fingerprint=fingerprint, engine=engine, room=room)
        _require_few_rejects(output, sources, fingerprint, max_reject_fraction=max_reject_fraction)
        names = [source.name for source in sources]
        return output.write_manifest(fingerprint, names, upstream=upstream or {}, extra=extra or {})


def _run_pending(
    worker_class: type[ShardWorker],
    config: Any,
    pending: Sequence[Source],
    output: StageDirectory,
    *,
    fingerprint: Fingerprint,
    engine: EngineConfig,
    room: str,
) -> None:
    num_workers = 1 if engine.in_process else engine.num_workers or _default_num_workers(engine)
    pieces = cut_into_pieces(pending, output, num_workers=num_workers, samples_per_slice=engine.samples_per_slice)
    reports = {
        index: read_piece_report(piece, fingerprint, worker_class.suffixes) for index, piece in enumerate(pieces)
    }
    waiting = [index for index, report in reports.items() if report is None]
    for index in waiting:
        pieces[index].output(".attempts").unlink(missing_ok=True)
    tally = _Tally(worker_class, pieces, output, fingerprint)
    num_samples = sum(source.num_samples for source in pending)
    runner_arguments = (worker_class, config, pieces, fingerprint, engine.max_shard_attempts)
    with progress_bar(room, num_samples) as progress:
        for index, report in reports.items():
            if report is not None:
                tally.add(index, report, progress)
        if engine.in_process:
            runner = _PieceRunner(*runner_arguments)
            results: Iterator[tuple[int, PieceReport | None]] = (runner.run(index) for index in waiting)
        else:
            results = _run_with_ray(runner_arguments, waiting, engine, num_workers=num_workers)
        for index, report in results:
            tally.add(index, report, progress)
    if tally.quarantined:
        names = ", ".join(sorted(tally.quarantined))
        raise QuarantinedShardError(
            f"{output.path}: quarantined after {engine.max_shard_attempts} attempts that killed the worker: {names}"
        )


class _Tally:
    """Collects piece reports in the driver and finishes a shard as soon as all of its pieces are there."""

    def __init__(
        self,
        worker_class: type[ShardWorker],
        pieces: Sequence[Piece],
        output: StageDirectory,
        fingerprint: Fingerprint,
    ) -> None:
        self._worker_class = worker_class
        self._pieces = pieces
        self._output = output
        self._fingerprint = fingerprint
        self._reports: dict[int, PieceReport] = {}
        self._indices: dict[str, list[int]] = {}
        for index, piece in enumerate(pieces):
            self._indices.setdefault(piece.source.name, []).append(index)
        self.quarantined: set[str] = set()
        self._num_rejected = 0
        self._wait_seconds = 0.0
        self._busy_seconds = 1e-9

    def add(self, index: int, report: PieceReport | None, progress: ProgressBar) -> None:
        """Count one piece; `report` is None when it killed its worker too often."""
        piece = self._pieces[index]
        if report is None:
            self.quarantined.add(piece.source.name)
            return
        self._reports[index] = report
        self._num_rejected += sum(report.rejected.values())
        self._wait_seconds += report.wait_seconds
        self._busy_seconds += report.busy_seconds
        wait_fraction = self._wait_seconds / (self._wait_seconds + self._busy_seconds)
        note = f"{self._num_rejected:,} rejected · device waits {wait_fraction:.0%}"
        progress.advance(piece.stop - piece.start, note=note)
        indices = self._indices[piece.source.name]
        if all(other in self._reports for other in indices):
            parts = [(self._pieces[other], self._reports[other]) for other in indices]
            finish_shard(self._worker_class, parts, self._output, fingerprint=self._fingerprint)


class _PieceRunner:
    """Lives in a worker process: holds the loaded worker, counts attempts on disk, writes piece reports."""

    def __init__(
        self,
        worker_class: type[ShardWorker],
        config: Any,
        pieces: Sequence[Piece],
        fingerprint: Fingerprint,
        max_attempts: int,
    ) -> None:
        self._load = lambda: worker_class(config)
        self._worker: ShardWorker | None = None
        self._pieces = pieces
        self._fingerprint = fingerprint
        self._max_attempts = max_attempts

    def run(self, index: int) -> tuple[int, PieceReport | None]:
        piece = self._pieces[index]
        piece.folder.mkdir(parents=True, exist_ok=True)
        attempts = piece.output(".attempts")
        if attempts.is_file() and attempts.stat().st_size >= self._max_attempts:
            return index, None
        with attempts.open("ab") as file:
            file.write(b".")
        self._worker = self._worker or self._load()
        report = self._worker(piece)
        write_piece_report(piece, report, self._fingerprint)
        return index, report

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run one piece for Ray Data; errors meant for the user travel as rows, as Ray would drop their type."""
        index = int(row["item"])
        try:
            report = self.run(index)[1]
        except (ValueError, OSError) as error:
            return {"index": index, "report": "", "error": str(error), "traceback": traceback.format_exc()}
        return {"index": index, "report": json.dumps(report and asdict(report)), "error": "", "traceback": ""}


def _default_num_workers(engine: EngineConfig) -> int:
    if engine.gpus_per_worker:
        ray = _start_ray()
        return max(1, int(ray.cluster_resources().get("GPU", 0) / engine.gpus_per_worker))
    if "RAY_ADDRESS" in os.environ:
        return max(1, int(_start_ray().cluster_resources().get("CPU", 1) / engine.cpus_per_worker))
    return max(1, int((os.cpu_count() or 1) / engine.cpus_per_worker))


def _start_ray() -> Any:
    """Connect to the cluster of `RAY_ADDRESS`, or start a local Ray; gives the `ray` module."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    if not ray.is_initialized():
        with _quiet_banner():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


@contextlib.contextmanager
def _quiet_banner() -> Iterator[None]:
    # Ray's C++ core announces its log level on file descriptor 2, whatever the level is.
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _run_with_ray(
    runner_arguments: tuple[Any, ...], waiting: Sequence[int], engine: EngineConfig, *, num_workers: int
) -> Iterator[tuple[int, PieceReport | None]]:
    if not waiting:
        return
    ray = _start_ray()
    # One block per piece: a worker that dies loses one piece, and Ray hands just that piece to another.
    dataset = ray.data.from_items(list(waiting), override_num_blocks=len(waiting)).map(
        _PieceRunner,
        fn_constructor_args=runner_arguments,
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(waiting))),
        num_cpus=engine.cpus_per_worker,
        num_gpus=engine.gpus_per_worker or None,
    )
    for row in dataset.iter_rows():
        if row["error"]:
            error = ValueError(row["error"])
            error.add_note(f"in a worker process:\n{row['traceback']}")
            raise error
        report = json.loads(row["report"])
        yield int(row["index"]), PieceReport(**report) if report else None


def _require_few_rejects(
    output: StageDirectory, sources: Sequence[Source], fingerprint: Fingerprint, *, max_reject_fraction: float
) -> None:
    reports = [report for source in sources if (report := output.report(source.name, fingerprint))]
    num_read = sum(report.num_read for report in reports)
    reasons: dict[str, int] = {}
    for report in reports:
        for reason, count in report.rejected.items():
            reasons[reason] = reasons.get(reason, 0) + count
    num_rejected = sum(reasons.values())
    if num_rejected > max_reject_fraction * num_read:
        largest = sorted(reasons.items(), key=lambda item: -item[1])[:3]
        raise ValueError(
            f"{output.path}: {num_rejected} of {num_read} samples rejected ({num_rejected / num_read:.1%}), more than "
            f"max_reject_fraction = {max_reject_fraction:.1%}: "
            + ", ".join(f"{name} {count}" for name, count in largest)
        )
