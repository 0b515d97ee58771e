"""`run_over_shards`: map a worker over shards, here or in Ray's workers; resume, retry, quarantine, and account."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic

from errors import StorageError, UserError, describe_lowering, describe_storage_error
from pipelines.engine.cluster import WorkerResources, choose_num_workers, is_cluster, run_on_ray
from pipelines.engine.pieces import (
    PARTS_FOLDER,
    JoinedParts,
    Piece,
    PieceReport,
    ShardWorker,
    Source,
    begun_attempts,
    cut_into_pieces,
    drop_parts,
    finish_shard,
    finished_pieces,
)
from pipelines.engine.progress import ProgressBar, clock, describe_rejects, get_logger, progress_bar
from pipelines.engine.rejects import NOT_CHOSEN, require_few_rejects
from pipelines.engine.runner import PieceOutcome, PieceRunner, claimed, drop_claims
from pipelines.recipe import TableConfig
from pipelines.store.files import discard_folder, exclusive
from pipelines.store.manifest import MARKER_FOLDER, Fingerprint, Manifest, ShardDirectory, manifest_path, read_manifest

GIGABYTE = 10**9


class EngineConfig(TableConfig):
    """`[engine]`: how work is spread; none of it changes a byte of the outputs but `samples_per_slice`."""

    num_workers: int = pydantic.Field(
        default=0,
        ge=0,
        description="Worker processes at most; 0 = as many as GPUs, or CPU cores if workers need no GPU, allow",
    )
    cpus_per_worker: float = pydantic.Field(default=1.0, gt=0, description="CPU cores Ray reserves for each worker")
    gpus_per_worker: float = pydantic.Field(
        default=0.0, ge=0, description="GPUs Ray reserves for each worker; 0.5 puts two workers on one GPU"
    )
    memory_gigabytes_per_worker: float = pydantic.Field(
        default=0.0, ge=0, description="Memory Ray reserves for each worker, in 10^9 bytes; 0 reserves none"
    )
    samples_per_slice: int = pydantic.Field(
        default=256, ge=1, description="Samples that are batched together; shards are cut only between slices"
    )
    max_shard_attempts: int = pydantic.Field(
        default=3, ge=1, description="Workers a shard may kill before it is put in quarantine"
    )
    in_process: bool | None = pydantic.Field(
        default=None,
        description="true: one worker in the command's own process; false: workers of Ray; left out: small work, which "
        "would be done before Ray's workers have started, in the process",
    )

    @property
    def worker_resources(self) -> WorkerResources:
        """What Ray reserves for each worker."""
        memory_bytes = int(self.memory_gigabytes_per_worker * GIGABYTE)
        return WorkerResources(cpus=self.cpus_per_worker, gpus=self.gpus_per_worker, memory_bytes=memory_bytes)

    def is_in_process(self, num_samples: int, few_samples: int) -> bool:
        """Whether the work on `num_samples` is done in this process; up to `few_samples` are small work of their room.

        A cluster is found by Ray alone.
        """
        if self.in_process is not None:
            return self.in_process
        return num_samples <= few_samples and not is_cluster()


class QuarantinedShardError(UserError):
    """Some shards killed every worker that took them; names them."""


def run_over_shards(
    worker_class: type[ShardWorker],
    config: Any,
    *,
    sources: Sequence[Source],
    output: ShardDirectory,
    fingerprint: Fingerprint,
    engine: EngineConfig,
    max_reject_fraction: float,
    room: str,
    few_samples: int = 0,
    memory_settings: Mapping[str, Any] | None = None,
    upstream: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
) -> Manifest:
    """Run `worker_class(config)` over every source that is not done yet and write the directory's manifest.

    Rerunning continues where an earlier run stopped: finished shards and finished pieces of shards are kept.
    `room` names the caller in the progress view; up to `few_samples` of it take a worker less time than Ray takes to
    start. `memory_settings` are keys of the recipe to lower where memory is short, with their values; several
    workers are one more. `upstream` and `extra` go into the manifest as they are. Work that is there and is done anew
    is said before, with `changes`, the settings that differ where the caller knows them.

    Raises:
        QuarantinedShardError: a shard killed its worker `engine.max_shard_attempts` times; the others are done.
        MemoryShortageError: names the piece that does not fit, and what to lower.
        TooManyRejectsError: this command rejected more than `max_reject_fraction`; names the three largest reasons.
        UserError: another process is writing `output`.
    """
    try:
        manifest = _finished_manifest(sources, output, fingerprint)
        if manifest is not None:
            require_few_rejects(output, sources, fingerprint, limit=max_reject_fraction, room=room)
            get_logger(room).info(f"nothing to do: all {len(sources)} shards of {output.path} are done")
            return manifest
        with exclusive(output.path):
            say_done_anew(output, sources, fingerprint, changes=changes, room=room)
            _run_pending(
                worker_class,
                config,
                sources,
                output,
                fingerprint=fingerprint,
                engine=engine,
                room=room,
                few_samples=few_samples,
                memory_settings=memory_settings or {},
            )
            require_few_rejects(output, sources, fingerprint, limit=max_reject_fraction, room=room)
            names = [source.name for source in sources]
            return output.write_manifest(fingerprint, names, upstream=upstream or {}, extra=extra or {})
    except OSError as error:
        if isinstance(error, UserError) or (message := describe_storage_error(error, output.path)) is None:
            raise
        raise StorageError(message) from error


def _finished_manifest(sources: Sequence[Source], output: ShardDirectory, fingerprint: Fingerprint) -> Manifest | None:
    if not manifest_path(output.path).is_file():
        return None
    manifest = read_manifest(output.path)
    is_finished = manifest.fingerprint.digest == fingerprint.digest and all(
        source.name in manifest.shards and output.is_done(source.name, source.identity, fingerprint)
        for source in sources
    )
    return manifest if is_finished else None


def say_done_anew(
    output: ShardDirectory, sources: Sequence[Source], fingerprint: Fingerprint, *, changes: Sequence[str], room: str
) -> None:
    """Say how many finished shards will be replaced, and why: it may be the work of hours."""
    there = [source for source in sources if (output.path / MARKER_FOLDER / f"{source.name}.json").is_file()]
    reports = {source.name: output.report(source.name, fingerprint) for source in there}
    others = [source.name for source in there if reports[source.name] is None]
    count = f"of {len(sources):,} shards"
    if others:
        which = f" ({'; '.join(changes)})" if changes else ""
        get_logger(room).warning(
            f"{output.path}: {len(others):,} {count} were made with other settings{which} and are made anew, first "
            f"{others[0]}; to keep such work, give changed settings another run"
        )
    moved = [each.name for each in there if (report := reports[each.name]) and report.source != each.identity]
    if moved:
        get_logger(room).warning(
            f"{output.path}: {len(moved):,} {count} were made from other files than there are now and are made anew, "
            f"first {moved[0]}"
        )


def _run_pending(
    worker_class: type[ShardWorker],
    config: Any,
    sources: Sequence[Source],
    output: ShardDirectory,
    *,
    fingerprint: Fingerprint,
    engine: EngineConfig,
    room: str,
    few_samples: int,
    memory_settings: Mapping[str, Any],
) -> None:
    # Asked anew under the lock: another command may have finished shards in the meantime.
    pending = [source for source in sources if not output.is_done(source.name, source.identity, fingerprint)]
    _clear(output, pending)
    _drop_parts(output, sources, fingerprint)
    if not pending:
        return
    cut = {"samples_per_slice": engine.samples_per_slice}
    found = {
        source.name: finished_pieces(source, output, fingerprint, worker_class.suffixes, **cut) for source in pending
    }
    finished = {name: [piece for piece, _ in parts] for name, parts in found.items()}
    attempts = [path for source in pending for path in begun_attempts(source, output, finished[source.name])]
    engine = _settle_place(engine, pending, attempts, finished=finished, room=room, few_samples=few_samples)
    num_workers = 1 if engine.in_process else choose_num_workers(engine.num_workers, engine.worker_resources)
    # Only now: where Ray does not start, the next run must know of the deaths, too.
    for path in attempts:
        path.unlink()
    memory_settings = {**memory_settings, **({"engine.num_workers": num_workers} if num_workers > 1 else {})}
    waiting = cut_into_pieces(pending, output, num_workers=num_workers, finished=finished, **cut)
    counts = _ProgressCounts(
        worker_class, output, fingerprint, num_shards=len(sources), num_done=len(sources) - len(pending)
    )
    counts.expect([*waiting, *(piece for pieces in finished.values() for piece in pieces)])
    with claimed(output) as claim, progress_bar(room, sum(source.num_samples for source in sources)) as progress:
        progress.skip(progress.total - sum(piece.stop - piece.start for piece in waiting))
        for parts in found.values():
            for piece, report in parts:
                counts.add(piece, report)
        runner = PieceRunner(
            worker_class,
            config,
            waiting,
            fingerprint=fingerprint,
            max_attempts=engine.max_shard_attempts,
            claim=claim,
            memory_settings=memory_settings,
        )
        for index, outcome in _outcomes(runner, waiting, engine, num_workers=num_workers, progress=progress):
            piece = replace(waiting[index], attempt=outcome.attempt)
            if outcome.num_deaths:
                place = f"{piece.source.name}, samples {piece.start:,} to {piece.stop:,}"
                get_logger(room).warning(f"{place}: {outcome.num_deaths} workers died with it")
            counts.add(piece, outcome.report, joined=outcome.joined)
            progress.advance(piece.stop - piece.start if outcome.report else 0, note=counts.note())
        get_logger(room).info(counts.summary(progress))
    _drop_parts(output, sources, fingerprint)
    if counts.quarantined:
        names = ", ".join(sorted(counts.quarantined))
        raise QuarantinedShardError(
            f"{output.path}: quarantined after {engine.max_shard_attempts} attempts that killed the worker: {names}; "
            f"if the machine is out of memory, {describe_lowering(memory_settings)}"
        )


def _settle_place(
    engine: EngineConfig,
    pending: Sequence[Source],
    attempts: Sequence[Path],
    *,
    finished: Mapping[str, Sequence[Piece]],
    room: str,
    few_samples: int,
) -> EngineConfig:
    """Return `engine` with `in_process` true or false.

    Small work that has taken its command with it, as `attempts` tell, goes to Ray, where deaths are counted.
    """
    num_left = sum(source.num_samples for source in pending)
    num_left -= sum(piece.stop - piece.start for pieces in finished.values() for piece in pieces)
    is_in_process = engine.is_in_process(num_left, few_samples)
    died = [path.parent.name for path in attempts if path.stat().st_size]
    if is_in_process and died and engine.in_process is None:
        is_in_process = False
        get_logger(room).info(f"the last run was killed at {died[0]}: this one works in Ray's workers, which may die")
    elif is_in_process and num_left and engine.in_process is None and engine.num_workers > 1:
        get_logger(room).info(f"{num_left:,} samples are done in this process (unless engine.in_process = false)")
    return engine.model_copy(update={"in_process": is_in_process})


def _clear(output: ShardDirectory, pending: Sequence[Source]) -> None:
    """Remove what killed drivers left half-written and, if something is to be done, the manifest of a whole directory.

    Stale markers stay until their files are replaced: whoever stops this run and sets a setting back has lost nothing.
    """
    output.clear_leftovers(is_held=True)
    drop_claims(output)
    if pending:
        output.clear_manifest()


def _drop_parts(output: ShardDirectory, sources: Sequence[Source], fingerprint: Fingerprint) -> None:
    """Remove the parts of done shards: of a killed driver, or of workers that outlived it."""
    parts, identities = output.path / PARTS_FOLDER, {source.name: source.identity for source in sources}
    for folder in parts.iterdir() if parts.is_dir() else ():
        if not folder.is_dir() or folder.is_symlink():
            continue
        report = output.report(folder.name, fingerprint)
        # A marker of another source, or of files that are gone, is one to be done again.
        if report is not None and output.is_done(folder.name, identities.get(folder.name, report.source), fingerprint):
            drop_parts(folder)
    discard_folder(parts)


def _outcomes(
    runner: PieceRunner, waiting: Sequence[Piece], engine: EngineConfig, *, num_workers: int, progress: ProgressBar
) -> Iterator[tuple[int, PieceOutcome]]:
    def show(num_samples: int) -> None:
        progress.under_way = num_samples

    if engine.in_process:
        for index in range(len(waiting)):
            outcome = runner.run(index, on_slice=show)
            show(0)
            yield index, outcome
        return
    yield from run_on_ray(
        runner,
        range(len(waiting)),
        num_workers=num_workers,
        resources=engine.worker_resources,
        on_progress=show,
    )


class _ProgressCounts:
    """Collects piece reports in the driver, and finishes a shard as soon as all of its pieces are there."""

    def __init__(
        self,
        worker_class: type[ShardWorker],
        output: ShardDirectory,
        fingerprint: Fingerprint,
        *,
        num_shards: int,
        num_done: int,
    ) -> None:
        self._worker_class = worker_class
        self._output = output
        self._fingerprint = fingerprint
        self._num_shards = num_shards
        self._num_done = num_done
        self._num_expected: Counter[str] = Counter()
        self._parts: dict[str, list[tuple[Piece, PieceReport]]] = {}
        self._joined: dict[str, JoinedParts] = {}
        self.quarantined: set[str] = set()
        self._num_read = 0
        self._rejected: Counter[str] = Counter()
        self._wait_seconds = 0.0
        self._busy_seconds = 0.0
        self._peak = (0, "")

    def expect(self, pieces: Sequence[Piece]) -> None:
        """Say which pieces there are; a shard is whole when all of its own have been added."""
        self._num_expected.update(piece.source.name for piece in pieces)

    def add(self, piece: Piece, report: PieceReport | None, *, joined: JoinedParts | None = None) -> None:
        """Count one piece; `report` is None when it killed its worker too often, `joined` the shard if it is whole."""
        name = piece.source.name
        if report is None:
            self.quarantined.add(name)
            return
        self._num_read += report.num_read
        self._rejected.update(report.rejected)
        self._wait_seconds += report.wait_seconds
        self._busy_seconds += report.busy_seconds
        self._peak = max(self._peak, (report.peak_memory_bytes, name))
        parts = self._parts.setdefault(name, [])
        parts.append((piece, report))
        if joined is not None:
            self._joined[name] = joined
        if len(parts) == self._num_expected[name]:
            parts.sort(key=lambda part: part[0].start)
            finish_shard(
                self._worker_class,
                self._parts.pop(name),
                self._output,
                fingerprint=self._fingerprint,
                joined=self._joined.pop(name, None),
            )
            self._num_done += 1

    def note(self) -> str:
        """Return what the progress view says beside the rate; rejects have a line of their own."""
        seconds = self._wait_seconds + self._busy_seconds
        asked = {reason: count for reason, count in self._rejected.items() if reason != NOT_CHOSEN}
        num_left_out = self._rejected[NOT_CHOSEN]
        memory_bytes, name = self._peak
        parts = (
            f"{self._num_done:,}/{self._num_shards:,} shards",
            f"device waits {self._wait_seconds / seconds:.0%}" if seconds else "",
            f"{num_left_out:,} not chosen" if num_left_out else "",
            f"peak memory {memory_bytes / GIGABYTE:.1f} GB ({name})" if memory_bytes else "",
        )
        rejects = describe_rejects(asked, num_read=self._num_read - num_left_out)
        return "\n".join(line for line in (" · ".join(part for part in parts if part), rejects) if line)

    def summary(self, progress: ProgressBar) -> str:
        """Return the line that ends the run."""
        counts = f"{progress.num_new:,} samples in {clock(progress.elapsed_seconds)}"
        return " · ".join([counts, progress.rate(), *self.note().splitlines()])
