"""Captions that are there already and only need completing: rejects tried again, other limits, a CLIP score.

A finished shard that needs it is set aside in `captions/.earlier/`: file first, then a note of what it was made from,
and only then is its marker removed. The worker takes from it every row that stands and makes the others. Killed at any
moment, the next run goes on from there; the bytes are those of a run that never knew anything else.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.table import read_settings
from errors import UserError
from pipelines.as_typed import typed_flag
from pipelines.engine.pieces import Source, all_piece_reports, forget_pieces, read_piece_note
from pipelines.engine.progress import get_logger
from pipelines.store.files import (
    atomic_file,
    atomic_write_json,
    discard,
    discard_folder,
    is_file_itself,
    own_files,
    remove_temporary_files,
)
from pipelines.store.manifest import (
    MARKER_FOLDER,
    Fingerprint,
    ShardDirectory,
    manifest_path,
    read_manifest,
    require_same_fingerprint,
)
from pipelines.store.state_files import read_state
from pipelines.store.tables import read_table

EARLIER_FOLDER = ".earlier"
NOTE_NAME = re.compile(r"[^.].*\.json", re.DOTALL)
MEND = "its shard is captioned anew"
# Fields of the fingerprint that decide which samples have a caption, and what is measured of it, but not its words.
UPDATABLE = ("max_pixels", "max_aspect_ratio", "clip_model")

log = get_logger("captioning")


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The rows of a shard as they were, one per sample, and the settings of `UPDATABLE` they were made under."""

    rows: list[dict[str, Any]]
    settings: dict[str, Any]


def updatable(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return the fields of `UPDATABLE`."""
    return {name: fingerprint.fields[name] for name in UPDATABLE}


def found_settings(output: ShardDirectory) -> Iterator[dict[str, Any]]:
    """Yield the settings that the files of a folder of captions were made under, parts and those set aside too."""
    found = [output.file(name, ".parquet") for name in output.marked()]
    found += [path.with_suffix(".parquet") for path in own_files(output.path / EARLIER_FOLDER, NOTE_NAME)]
    found += [path.with_suffix(".parquet") for path in all_piece_reports(output)]
    for path in filter(Path.is_file, found):
        yield read_settings(path)


def read_earlier(folder: Path | None, name: str) -> Earlier | None:
    """Return what was set aside of a shard, or None; `set_aside` has made sure that it may be used."""
    path = (folder or Path()) / f"{name}.parquet"
    if folder is None or not path.with_suffix(".json").is_file():
        return None
    mend = "remove it and type the command again: this shard is captioned anew"
    return Earlier(rows=read_table(path, mend=mend).to_pylist(), settings=read_settings(path))


def to_set_aside(
    output: ShardDirectory, sources: Sequence[Source], fingerprint: Fingerprint, *, retry_rejects: bool
) -> list[str]:
    """Return the finished shards that need completing.

    Raises:
        UserError: rejects are to be tried again of captions that were made under other settings; names the field.
    """
    names = []
    for source in sources:
        path = output.file(source.name, ".parquet")
        if not path.is_file() or not (output.path / MARKER_FOLDER / f"{source.name}.json").is_file():
            continue
        report = output.report(source.name, fingerprint)
        is_current = report is not None
        if report is None:
            # Made under other limits, perhaps: the file knows which.
            report = output.report(source.name, _with(fingerprint, read_settings(path)))
        if report is None and retry_rejects:
            _refuse(output, source.name, fingerprint)
        if report is None or report.source != source.identity:
            continue
        if not is_current or (retry_rejects and report.rejected):
            names.append(source.name)
    return names


def set_aside(
    output: ShardDirectory, names: Sequence[str], sources: Sequence[Source], fingerprint: Fingerprint
) -> None:
    """Set finished shards aside, to be completed by the run that follows."""
    folder = output.path / EARLIER_FOLDER
    identities = {source.name: source.identity for source in sources}
    for name in names:
        folder.mkdir(exist_ok=True)
        output.clear_manifest()
        path = output.file(name, ".parquet")
        with atomic_file(folder / f"{name}.parquet") as temporary:
            temporary.unlink(missing_ok=True)
            _link(path, temporary)
        digest = _with(fingerprint, read_settings(path)).digest
        atomic_write_json(folder / f"{name}.json", {"source": identities[name], "fingerprint": digest})
        # A killed run has left parts behind its marker, perhaps: without it they would be joined again as they are.
        forget_pieces(name, output)
        output.clear_marker(name)


def forget_parts_with_rejects(output: ShardDirectory) -> None:
    """Let an interrupted run's parts be made again where they hold rejects, but not those of shards set aside."""
    for path in all_piece_reports(output):
        is_retried = (output.path / EARLIER_FOLDER / f"{path.parent.name}.json").is_file()
        with contextlib.suppress(UserError):  # the run that follows says so, and does the piece again
            if not is_retried and read_piece_note(path).report.rejected:
                path.unlink()


def clear_earlier(output: ShardDirectory, sources: Sequence[Source], fingerprint: Fingerprint) -> None:
    """Forget what was set aside of shards that are done, and what the recipe or the tars have left behind."""
    folder = output.path / EARLIER_FOLDER
    remove_temporary_files(folder, is_held=True)
    for source in sources:
        note, file = folder / f"{source.name}.json", folder / f"{source.name}.parquet"
        if note.is_file():
            is_done = output.is_done(source.name, source.identity, fingerprint)
            if is_done or not _is_usable(note, file, source, fingerprint):
                discard(note)
        # Without its note, a file is what a killed run has left.
        if not note.is_file() and is_file_itself(file):
            discard(file)
    discard_folder(folder)


def _is_usable(note: Path, file: Path, source: Source, fingerprint: Fingerprint) -> bool:
    try:
        found, settings = read_state(note, mend=MEND), read_settings(file)
    except UserError as error:
        log.warning(str(error))
        return False
    return found == {"source": source.identity, "fingerprint": _with(fingerprint, settings).digest}


def _with(fingerprint: Fingerprint, settings: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint.of({**fingerprint.fields, **settings})


def _refuse(output: ShardDirectory, name: str, fingerprint: Fingerprint) -> None:
    retry = typed_flag("retry", True)
    if manifest_path(output.path).is_file():
        require_same_fingerprint(
            fingerprint,
            read_manifest(output.path).fingerprint,
            where=f"captioning.retry_rejects ({retry})",
            mend=f"set it back to keep these captions, or name another run; without {retry} they are all made anew",
        )
    raise UserError(
        f"captioning.retry_rejects ({retry}): the captions of {name} were made under other settings than these; "
        f"only {', '.join(UPDATABLE)} may differ. Without {retry} they are all made anew"
    )


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        # Some shared storage has no hard links.
        shutil.copyfile(path, target)
