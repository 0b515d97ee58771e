"""The check of a whole run: every folder's files, then what the folders say of each other."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from errors import MissingFileError, UserError
from pipelines.engine.progress import progress_bar
from pipelines.run_memory import recall_shards
from pipelines.store.files import sha256_file
from pipelines.store.verify.columns import check_columns
from pipelines.store.verify.coverage import check_coverage, check_families
from pipelines.store.verify.findings import SEE_TO_IT, Check, Findings, Problem, Row, Unfinished, unreadable
from pipelines.store.verify.folders import Folder, find_folders
from pipelines.store.verify.kinds import CHECKPOINT, FEATURES, RAW, RUN, TRAINING, WITH_IMAGES, FileKind
from pipelines.store.verify.raw import raw_notes
from pipelines.store.verify.samples import read_samples, sample_checks
from pipelines.store.verify.shards import check_counts, marker_checks, shard_checks
from pipelines.store.verify.training import checkpoint_checks, latest_checks, unfinished_training

NUM_READERS = 8
MEGABYTE = 10**6


def verify_run(run: Path) -> Findings:
    """Check every file of `run` that a room has written.

    Raises:
        MissingFileError: the run does not exist, or nothing of it has begun.
    """
    folders = find_folders(run) if run.is_dir() else []
    if all(folder.kind is RUN and not folder.faults for folder in folders):
        raise MissingFileError(f"{run}: nothing has finished here, there is no folder that a room writes")
    findings = check_folders(folders)
    raw_shards = _recall(run)
    check_coverage(run, findings, raw_shards)
    check_columns(run, findings, raw_shards)
    are_all_finished = all(folder.manifest is not None for folder in folders if folder.kind is FEATURES)
    check_families(run, findings, are_all_finished=are_all_finished)
    drawn = next((folder.path for folder in folders if folder.kind is RAW), None)
    theirs = [path for path in raw_shards if drawn is None or not Path(path).is_relative_to(drawn)]
    findings.notes += raw_notes(run, theirs)
    return findings


def check_folders(folders: Sequence[Folder]) -> Findings:
    """Check the files of some folders, each for itself."""
    findings = Findings()
    findings.manifests = {folder.path: folder.manifest for folder in folders if folder.manifest is not None}
    _run_checks([check for folder in folders for check in _plan(folder, findings)], findings)
    for folder in folders:
        findings.rows.append(_row(folder))
        findings.unfinished += filter(None, [_unfinished(folder)])
    return findings


def _plan(folder: Folder, findings: Findings) -> Iterator[Check]:
    """Yield what is to be looked into in a folder; sorts its files into those that are, and those that are not."""
    findings.problems += folder.faults
    findings.problems += check_counts(folder)
    checks: list[Check] = []
    if folder.kind.has_shards:
        checks += [*shard_checks(folder), *marker_checks(folder)]
    if folder.kind in WITH_IMAGES:
        checks += sample_checks(folder, read_samples(folder))
    if folder.kind is CHECKPOINT:
        checks += checkpoint_checks(folder)
    if folder.kind is TRAINING:
        checks += latest_checks(folder)
    known = {path for check in checks for path in check.files}
    if folder.manifest_name in folder.files and folder.kind.has_manifest:
        known.add(folder.files[folder.manifest_name])
        findings.checked.add(folder.files[folder.manifest_name])
    strangers = []
    for name, path in folder.files.items():
        if path in known:
            continue
        kind = folder.kind.file_kind(name)
        # A picture that is in no table of finished samples is the user's.
        is_stranger = kind is None or (folder.manifest is not None and kind.pattern == folder.kind.stranger)
        if is_stranger:
            findings.others.add(path)
            strangers += [path.name] if folder.kind.stranger and path.match(folder.kind.stranger) else []
        elif kind is not None and kind.check is not None:
            checks.append(_file_check(folder, kind, name))
        else:
            findings.unchecked.add(path)
    checks += _absent(folder)
    if strangers and folder.manifest is not None:
        findings.notes.append(
            f"{folder.path}: {len(strangers):,} files are not in its {folder.manifest_name}, such as {strangers[0]}"
        )
    yield from checks


def _file_check(folder: Folder, kind: FileKind, name: str) -> Check:
    path = folder.files[name]
    manifest, check = folder.manifest, kind.check
    hashes = manifest.extra.get("files", {}) if manifest is not None else {}

    def look() -> Problem | str | None:
        assert check is not None, name
        damage = check(path)
        if damage is None and name in hashes and sha256_file(path) != hashes[name]:
            damage = f"is not as it was written: its SHA-256 is not the one in {folder.manifest_name}"
        if damage is None:
            return None
        if kind.is_log:
            return f"{path}: {damage}"
        return folder.problem(f"{name} {damage}", mend=folder.mend(kind.mend, path, made_by=kind.made_by))

    return Check(directory=folder.path, files=(path,), look=look)


def _absent(folder: Folder) -> Iterator[Check]:
    """Yield a problem for each file that a finished folder must have and has not."""
    if folder.kind.has_manifest and folder.manifest is None:
        return
    for kind in folder.kind.files:
        if kind.is_required and kind.pattern not in folder.files:
            problem = folder.problem(f"{kind.pattern} does not exist", mend=f"`{folder.command}` makes it anew")
            yield Check(directory=folder.path, look=lambda problem=problem: problem)


def _run_checks(checks: Sequence[Check], findings: Findings) -> None:
    """Do the checks in threads, say how far they are, and collect what they find in their order."""
    sizes = [sum(map(_size, check.files)) for check in checks]
    findings.num_bytes = sum(sizes)
    findings.checked.update(path for check in checks for path in check.files)
    start_seconds, num_done = time.monotonic(), 0
    with (
        ThreadPoolExecutor(NUM_READERS) as pool,
        progress_bar("verify", findings.num_bytes // MEGABYTE, unit="MB") as progress,
    ):
        for check, size, found in zip(checks, sizes, pool.map(_look, checks), strict=True):
            before, num_done = num_done, num_done + size
            note = str(check.files[0]) if check.files else ""
            progress.advance(num_done // MEGABYTE - before // MEGABYTE, note=note)
            if isinstance(found, Problem):
                findings.problems.append(found)
            elif found is not None:
                findings.notes.append(found)
    findings.seconds = time.monotonic() - start_seconds


def _size(path: Path) -> int:
    """Return the bytes of a file; none if it is gone or out of reach, which its check tells."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _look(check: Check) -> Problem | str | None:
    try:
        return check.look()
    except OSError as error:
        # An error while a file is read has no name, and some checks find their files themselves.
        path = Path(error.filename) if isinstance(error.filename, str) else (*check.files, check.directory)[0]
        text = unreadable(path.name, error)
        return Problem(directory=check.directory, shard=check.shard, text=text, mend=SEE_TO_IT)


def _unfinished(folder: Folder) -> Unfinished | None:
    if folder.kind is TRAINING:
        return unfinished_training(folder)
    if not folder.kind.has_manifest or folder.manifest_name in folder.files:
        return None
    num_done = len(folder.markers())
    text = f"no {folder.manifest_name}: what writes here has not finished; {num_done:,} shards are done"
    if folder.kind in WITH_IMAGES:
        num_images = sum(name.endswith(".png") for name in folder.files)
        text = f"no {folder.manifest_name}: what draws here has not finished; {num_images:,} images are there"
    return Unfinished(directory=folder.path, text=text, command=folder.command)


def _row(folder: Folder) -> Row:
    reports = folder.reports.values()
    has_samples = folder.kind.has_shards
    return Row(
        directory=folder.path,
        num_files=len(folder.files),
        num_kept=sum(report.num_kept for report in reports) if has_samples else None,
        num_rejected=sum(sum(report.rejected.values()) for report in reports) if has_samples else None,
    )


def _recall(run: Path) -> list[str]:
    """Return the raw shards of a run; none where the list cannot be read, which the check of the file tells."""
    try:
        return recall_shards(run)
    except (UserError, ValueError, AttributeError, OSError):
        return []
